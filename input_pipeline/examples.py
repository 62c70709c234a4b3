"""Reads a split from any source of texts, and shows values from the data in messages."""

import difflib
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from configs.schema import DataConfig
from errors import UserError

brief = reprlib.Repr()
"""`brief.repr(value)` shows a value from the data in one short line, however long or deep."""
brief.maxlist = brief.maxtuple = brief.maxdict = 20


class Rows(NamedTuple):
    """Holds one split, read whole: N examples in the source's order."""

    texts: list[tuple[str, ...]]  # the text features asked for; '' is possible
    labels: list[str]  # empty if no label was asked for
    classes: tuple[str, ...]  # the labels that the source declares, in order; () if it does not
    place: Callable[[int], str]  # example -> where it is, for messages
    skipped: int = 0  # bad rows that were left out


def read_rows(
    data: DataConfig, split: str, texts: Sequence[str], label: str = '', every: bool = False
) -> Rows:
    """Reads the features `texts` and `label` of a split from the source that the config names.

    A row needs some text in one of the features or, with `every`, in each of them. Bad rows are
    refused or skipped, as `data.bad_rows` says. Raises UserError for data that is missing,
    malformed or empty.
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

        rows = text_files.read(split, texts, label, data.columns, bad)
    good = []
    for row, found in enumerate(rows.texts):
        empty = [repr(name) for name, text in zip(texts, found, strict=True) if not text]
        if empty and (every or len(empty) == len(texts)):
            bad(f'{rows.place(row)}: {" and ".join(empty)} is empty, expected some text')
        else:
            good.append(row)
    if not good:
        reason = (
            f'no usable row, the first problem is: {problems[0]}' if problems else 'no examples'
        )
        raise UserError(f'{split}: {reason}, expected one or more rows of data')
    return Rows(
        [rows.texts[row] for row in good],
        [rows.labels[row] for row in good] if label else [],
        rows.classes,
        lambda row: rows.place(good[row]),
        len(problems),
    )


def not_among(name: str, known: Collection[str]) -> str:
    """Returns in one line that `name` is not one of `known`, and which of them is nearest."""
    # Bounded: a column of sentences mistaken for labels would keep this busy for long.
    nearest = difflib.get_close_matches(name, list(known)[:1000], n=1)
    hint = f'; did you mean {brief.repr(nearest[0])}?' if nearest else ''
    return f'{brief.repr(name)} is not among {brief.repr(list(known))}{hint}'
