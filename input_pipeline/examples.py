"""What every source of texts returns, and how messages show values from the data."""

import difflib
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from configs.schema import DataConfig

brief = reprlib.Repr()
"""`brief.repr(value)` shows a value from the data in one short line, however long or deep."""
brief.maxlist = brief.maxtuple = 20


class Rows(NamedTuple):
    """One split, read whole: N examples in the source's order."""

    texts: list[tuple[str, ...]]  # the text features asked for; one may be ''
    labels: list[str]  # empty where no label was asked for
    classes: tuple[str, ...]  # the labels that the source declares, in order; () if it does not
    place: Callable[[int], str]  # example -> where it is, for messages


def read_rows(data: DataConfig, split: str, texts: Sequence[str], label: str = '') -> Rows:
    """Reads the features `texts` and `label` of a split from the source that the config names.

    Raises UserError for data that is missing, malformed or empty.
    """
    # Imported when used: TFDS takes seconds to load, and most runs read one kind of source.
    if data.source == 'tfds':
        from input_pipeline import tfds_source

        return tfds_source.read(data.name, split, texts, label, data.data_dir)
    from input_pipeline import text_files

    return text_files.read(split, texts, label)


def not_among(name: str, known: Collection[str]) -> str:
    """Says in one line that `name` is not one of `known`, and which of these is nearest."""
    # Bounded: a column of sentences mistaken for labels would keep this busy for long.
    nearest = difflib.get_close_matches(name, list(known)[:1000], n=1)
    hint = f'; did you mean {brief.repr(nearest[0])}?' if nearest else ''
    return f'{brief.repr(name)} is not among {brief.repr(list(known))}{hint}'
