"""Reads a split from any source of texts, and shows values from the data in messages."""

import difflib
import hashlib
import itertools
import re
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from configs.schema import DataConfig
from errors import UserError
from input_pipeline.labels import missing_labels, visible

brief = reprlib.Repr()
"""`brief.repr(value)` shows a value from the data in one short line, however long or deep."""
brief.maxlist = brief.maxtuple = brief.maxdict = 20

SHARE = re.compile(r'(\d+(?:\.\d+)?)%(?::(.+))?')  # of the training rows; another split


class Rows(NamedTuple):
    """Holds one split, read whole: N examples in the source's order."""

    texts: list[tuple[str, ...]]  # the text features asked for; '' is possible
    labels: list[list[str]]  # of each example, one unless separated; empty if not asked for
    classes: tuple[str, ...]  # the labels that the source declares, in order; () if it does not
    place: Callable[[int], str]  # example -> where it is, for messages
    skipped: tuple[str, ...] = ()  # the problems of bad rows that were left out


class Features(NamedTuple):
    """Names the features of a split to read. With `separator`, a row has any number of labels."""

    texts: Sequence[str]
    label: str = ''
    separator: str = ''
    pairs: bool = False  # each text is needed, not only one of them


def read_splits(data: DataConfig, features: Features) -> tuple[Rows, Rows]:
    """Reads the training and the evaluation split, as `read_rows` does.

    The evaluation split may be a share of the training split, such as '10%'. A hash of the texts,
    or of a pair's source, decides which rows it gets, so rows that are equal there stay together,
    and a row stays where it is when others are added. '10%:SPLIT' also holds out 10%, but evaluates
    on SPLIT.
    """
    train = read_rows(data, data.train, features)
    evaluation = data.evaluation
    if share := SHARE.fullmatch(evaluation):
        parts: tuple[list[int], list[int]] = [], []
        for row, found in enumerate(train.texts):
            content = '\0'.join(found[:1] if features.pairs else found).encode()
            number = int.from_bytes(hashlib.sha256(content).digest()[:8], 'big')
            parts[number < float(share[1]) / 100 * 2**64].append(row)
        if not all(parts):
            raise UserError(
                f'config.data.evaluation = {evaluation!r}: holds out {len(parts[1])} of '
                f'{len(train.texts)} rows, expected some and not all'
            )
        held_out = _selected(train, parts[1], (), ' (held out of training)')
        train = _selected(train, parts[0], train.skipped)
        if not share[2]:
            return train, held_out
        evaluation = share[2]
    classes = set(itertools.chain.from_iterable(train.labels))
    return train, read_rows(data, evaluation, features, classes)


def read_rows(
    data: DataConfig, split: str, features: Features, classes: Collection[str] = ()
) -> Rows:
    """Reads features of a split from the source that the config names.

    A row needs some text in one of the features or, in `pairs`, in each of them, and labels that
    are among the `classes` or not missing ones. Bad rows are refused or skipped, as
    `data.bad_rows` says. Raises UserError for data that is missing, malformed or empty.
    """
    problems: list[str] = []

    def bad(problem: str) -> None:
        if data.bad_rows == 'stop':
            raise UserError(problem)
        problems.append(problem)

    # Imported when used: TFDS takes seconds to load, and most runs read one kind of source.
    if data.source == 'tfds':
        from input_pipeline import tfds_source

        rows = tfds_source.read(data, split, features)
    else:
        from input_pipeline import text_files

        rows = text_files.read(data, split, features, bad)
    found = [name for labels in rows.labels for name in labels]
    missing = {''} if rows.classes else missing_labels(found) - set(classes)

    def problem(row: int) -> str:
        named = zip(features.texts, rows.texts[row], strict=True)
        empty = [repr(name) for name, text in named if not any(visible(text))]
        if empty and (features.pairs or len(empty) == len(features.texts)):
            return f'{" and ".join(empty)} is empty, expected some text'
        if wrong := missing.intersection(rows.labels[row] if features.label else ()):
            return (
                f'{features.label!r} is {min(wrong)!a}, which marks a missing label; expected a '
                "class (give it another name, or set config.data.bad_rows='skip')"
            )
        return ''

    good = []
    for row in range(len(rows.texts)):
        if reason := problem(row):
            bad(f'{rows.place(row)}: {reason}')
        else:
            good.append(row)
    if not good:
        reason = f'no usable row; the first problem: {problems[0]}' if problems else 'no examples'
        raise UserError(f'{split}: {reason}, expected one or more rows of data')
    return _selected(rows, good, tuple(problems))


def _selected(rows: Rows, keep: Sequence[int], skipped: tuple[str, ...], note: str = '') -> Rows:
    texts = [rows.texts[row] for row in keep]
    labels = [rows.labels[row] for row in keep if rows.labels]
    return Rows(texts, labels, rows.classes, lambda row: rows.place(keep[row]) + note, skipped)


def not_among(name: str, known: Collection[str]) -> str:
    """Returns in one line that `name` is not one of `known`, and which of them is nearest."""
    # Bounded: a column of sentences mistaken for labels would keep this busy for long.
    nearest = difflib.get_close_matches(name, list(known)[:1000], n=1)
    hint = f'; did you mean {brief.repr(nearest[0])}?' if nearest else ''
    return f'{brief.repr(name)} is not among {brief.repr(list(known))}{hint}'
