"""Finds what is wrong with a data set although every row can be read."""

import collections
import decimal
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from errors import UserError
from input_pipeline.examples import Rows, brief

FEWEST_ROWS, SMALLEST_SHARE = 5, 0.01  # of a class
MOST_UNKNOWN = 0.2  # share of the tokens
MOST_NUMBERS = 20  # as classes, where most rows have a number of their own


def class_names(rows: Rows) -> tuple[str, ...]:
    """Returns the labels that occur, sorted as numbers if all are integers, otherwise as text.

    Raises UserError for two spellings of one label, and for numbers that are no classes.
    """
    first: dict[str, int] = {}
    for row, label in enumerate(rows.labels):
        first.setdefault(label, row)
    spelled: dict[Hashable, str] = {}
    for label, row in first.items():
        if (other := spelled.setdefault(canonical(label), label)) != label:
            raise UserError(
                f'{rows.place(row)}: label {label[:40]!a}, but {rows.place(first[other])} has '
                f'{other[:40]!a}: expected one spelling of a label'
            )
    numeric = all(isinstance(key, decimal.Decimal) for key in spelled)
    if numeric and len(first) > max(MOST_NUMBERS, len(rows.labels) / 2):
        raise UserError(
            f'{rows.place(0)}: {len(first)} different numbers as the labels of {len(rows.labels)} '
            'rows, expected classes; is this another column, or a number to predict?'
        )
    try:
        return tuple(sorted(first, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(first))


def canonical(label: str) -> Hashable:
    """Returns what spellings of one label share: no case, space, quotes, format of a number."""
    folded = unicodedata.normalize('NFKC', label).casefold()
    shown = [c for c in folded if unicodedata.category(c) not in ('Cc', 'Cf', 'Zs', 'Zl', 'Zp')]
    text = ''.join(shown).strip('"\'\ufe0e\ufe0f')
    try:
        number = decimal.Decimal(text.replace('_', '?'))  # Decimal would read 1_0 as 10
    except decimal.InvalidOperation:
        return text
    return number if number.is_finite() else text


def class_counts(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Counts the examples of every class. labels: int32[N]."""
    return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))


def label_warnings(texts: Iterable[str], labels: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    """Yields what is odd about the labels of the training split. labels: int32[N]."""
    least = max(FEWEST_ROWS, SMALLEST_SHARE * labels.size)
    counts = class_counts(labels, names)
    if rare := {name: count for name, count in counts.items() if count < least}:
        yield (
            f'{len(rare)} of {len(names)} classes have fewer than {FEWEST_ROWS} rows or under '
            f'{SMALLEST_SHARE:.0%} of the training split: {brief.repr(rare)}'
        )
    given = collections.defaultdict(set)
    for text, label in zip(texts, labels.tolist(), strict=True):
        given[text].add(label)
    if conflicts := [text for text, found in given.items() if len(found) > 1]:
        yield (
            f'{len(conflicts)} training texts have more than one label, such as '
            f'{brief.repr(conflicts[0])}'
        )


def shared_warnings(train: Iterable[Hashable], evaluation: Sequence[Hashable]) -> Iterator[str]:
    """Yields how many evaluation examples are in the training split too."""
    known = set(train)
    if shared := [example for example in evaluation if example in known]:
        yield (
            f'{len(shared)} of {len(evaluation)} evaluation examples are in the training split '
            f'too, such as {brief.repr(shared[0])}: the evaluation may be too good'
        )


def unknown_warnings(**shares: float) -> Iterator[str]:
    """Yields which splits have many unknown tokens. `shares`: the share of each, by name."""
    for split, share in shares.items():
        if share > MOST_UNKNOWN:
            yield (
                f'{share:.0%} of the {split} tokens are unknown to the vocabulary: do both splits '
                'have the same language, case and spaces? (config.data.min_frequency)'
            )


def require_known(known: int, texts: int, unit: str, min_frequency: int) -> None:
    """Raises UserError if no token of the training split is frequent enough to be known."""
    if not known:
        raise UserError(
            f'config.data.min_frequency = {min_frequency}: no {unit} occurs that often in the '
            f'{texts} training texts, so there is nothing to learn from; set it to 1, or add texts '
            '(words are what white space separates)'
        )
