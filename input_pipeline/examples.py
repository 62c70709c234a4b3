"""What every text source hands on, labelled texts or pairs of texts, and the errors they share."""

import difflib
import reprlib
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

SEPARATOR = '[sep]'
"""Word between two text features of one example; the vocabulary treats it like any other."""

brief = reprlib.Repr()
"""`brief.repr(value)` shows a value from the data in one short line, however long or deep."""
brief.maxlist = brief.maxtuple = 20


class TextSplit(NamedTuple):
    """One split, read whole: `N` texts and their labels, in the source's order."""

    texts: list[str]
    """One text per example, its features joined by `join_features`."""
    labels: np.ndarray
    """int32[N], each an index into the data set's `label_names`."""


class TextDataset(NamedTuple):
    """A training split, an evaluation split and the classes they share."""

    train: TextSplit
    evaluation: TextSplit
    label_names: tuple[str, ...]


def join_features(texts: Iterable[str]) -> str:
    """Joins the text features of one example (premise and hypothesis, say) into one text."""
    return f' {SEPARATOR} '.join(texts)


def not_among(name: str, known: Collection[str]) -> str:
    """Says in one line that `name` is not one of `known`, and which of these comes nearest."""
    # A bound, lest a column of sentences mistaken for labels keeps this busy for long.
    nearest = difflib.get_close_matches(name, list(known)[:1000], n=1)
    hint = f'; did you mean {brief.repr(nearest[0])}?' if nearest else ''
    return f'{brief.repr(name)} is not among {brief.repr(list(known))}{hint}'


# seq2seq: from here to the end (docs/fork.md)


class PairSplit(NamedTuple):
    """One split, read whole: `N` sources and `N` targets, in the source's order."""

    sources: list[str]
    targets: list[str]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> 'PairSplit':
        """From (source, target) one by one."""
        sources, targets = zip(*pairs, strict=True)
        return cls(list(sources), list(targets))


class PairDataset(NamedTuple):
    """A training split and an evaluation split of pairs."""

    train: PairSplit
    evaluation: PairSplit
