"""Reads a split from any source of texts, and shows values from the data in messages."""

import difflib
import hashlib
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
    labels: list[str]  # empty if no label was asked for
    classes: tuple[str, ...]  # the labels that the source declares, in order; () if it does not
    place: Callable[[int], str]  # example -> where it is, for messages
    skipped: tuple[str, ...] = ()  # the problems of bad rows that were left out


def read_splits(
    data: DataConfig,
    texts: Sequence[str],
    label: str = '',
    every: bool = False,
    compared: int | None = None,
) -> tuple[Rows, Rows]:
    """Reads the training and the evaluation split, as `read_rows` does.

    The evaluation split may be a share of the training split, such as '10%'. A hash of the first
    `compared` texts, by default of all, decides which rows it gets, so rows that are equal there
    stay together, and a row stays where it is when others are added. '10%:SPLIT' also holds out
    10%, but evaluates on SPLIT.
    """
    train, evaluation = read_rows(data, data.train, texts, label, every), data.evaluation
    if share := SHARE.fullmatch(evaluation):
        parts: tuple[list[int], list[int]] = [], []
        for row, found in enumerate(train.texts):
            content = '\0'.join(found[:compared]).encode()
            number = int.from_bytes(hashlib.sha256(content).digest()[:8], 'big')
            parts[number < float(share[1]) / 100 * 2**64].append(row)
        if not all(parts):
            raise UserError(
                f'config.data.evaluation = {evaluation!r}: holds out {len(parts[1])} of '
                f'{len(train.texts)} rows, expected some and not all'
            )
        train, held_out = (_selected(train, rows, train.skipped) for rows in parts)
        if not share[2]:
            return train, held_out._replace(skipped=())
        evaluation = share[2]
    return train, read_rows(data, evaluation, texts, label, every, set(train.labels))


def read_rows(
    data: DataConfig,
    split: str,
    texts: Sequence[str],
    label: str = '',
    every: bool = False,
    classes: Collection[str] = (),
) -> Rows:
    """Reads the features `texts` and `label` of a split from the source that the config names.

    A row needs some text in one of the features or, with `every`, in each of them, and a label
    that is among the `classes` or not a missing one. Bad rows are refused or skipped, as
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

        rows = tfds_source.read(data.name, split, texts, label, data.data_dir)
    else:
        from input_pipeline import text_files

        rows = text_files.read(data, split, texts, label, bad)
    missing = {''} if rows.classes else missing_labels(rows.labels) - set(classes)

    def problem(row: int) -> str:
        named = zip(texts, rows.texts[row], strict=True)
        empty = [repr(name) for name, text in named if not any(visible(text))]
        if empty and (every or len(empty) == len(texts)):
            return f'{" and ".join(empty)} is empty, expected some text'
        if label and rows.labels[row] in missing:
            return missing_label(label, rows.labels[row])
        return ''

    return usable(data, split, rows._replace(skipped=tuple(problems)), problem)


def usable(data: DataConfig, split: str, rows: Rows, problem: Callable[[int], str]) -> Rows:
    """Leaves out the rows of a split that have a problem ('' for none), and notes it.

    Raises UserError for the first one unless `data.bad_rows` says to skip, or if no row is left.
    """
    good, skipped = [], [*rows.skipped]
    for row in range(len(rows.texts)):
        if found := problem(row):
            skipped.append(f'{rows.place(row)}: {found}')
            if data.bad_rows == 'stop':
                raise UserError(skipped[-1])
        else:
            good.append(row)
    if not good:
        reason = f'no usable row; the first problem: {skipped[0]}' if skipped else 'no examples'
        raise UserError(f'{split}: {reason}, expected one or more rows of data')
    return _selected(rows, good, tuple(skipped))


def missing_label(feature: str, label: str) -> str:
    """Returns the problem of a row whose label stands for none."""
    return (
        f'{feature!r} is {label!a}, which marks a missing label; expected a class (give it another '
        "name, or set config.data.bad_rows='skip')"
    )


def _selected(rows: Rows, keep: Sequence[int], skipped: tuple[str, ...]) -> Rows:
    texts = [rows.texts[row] for row in keep]
    labels = [rows.labels[row] for row in keep if rows.labels]
    return Rows(texts, labels, rows.classes, lambda row: rows.place(keep[row]), skipped)


def not_among(name: str, known: Collection[str]) -> str:
    """Returns in one line that `name` is not one of `known`, and which of them is nearest."""
    # Bounded: a column of sentences mistaken for labels would keep this busy for long.
    nearest = difflib.get_close_matches(name, list(known)[:1000], n=1)
    hint = f'; did you mean {brief.repr(nearest[0])}?' if nearest else ''
    return f'{brief.repr(name)} is not among {brief.repr(list(known))}{hint}'
