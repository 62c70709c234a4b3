"""Finds what is wrong with a data set although every row can be read."""

import collections
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from errors import UserError
from input_pipeline.examples import brief

FEWEST_ROWS, SMALLEST_SHARE = 5, 0.01  # of a class
MOST_UNKNOWN = 0.2  # share of the tokens


def class_counts(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Counts the examples of every class. labels: int32[N], or int32[N, C] of 0 and 1."""
    counts = np.bincount(labels, minlength=len(names)) if labels.ndim == 1 else labels.sum(axis=0)
    return dict(zip(names, counts.tolist(), strict=True))


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


def chance_warnings(accuracy: float, labels: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    """Yields a warning if an answer that needs no text reaches the accuracy.

    labels: int32[N], of the evaluation split.
    """
    counts = class_counts(labels, names)
    most = max(counts, key=counts.__getitem__)
    if accuracy <= (share := counts[most] / labels.size):
        yield (
            f'accuracy {accuracy:.1%} is no better than answering {brief.repr(most)} to every '
            f'text, which is right for {share:.1%} of the evaluation examples'
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
                'have one language, case and spacing? (config.data.min_frequency, .tokenizer)'
            )


def require_known(known: int, texts: int, unit: str, min_frequency: int) -> None:
    """Raises UserError if no token of the training split is frequent enough to be known."""
    if not known:
        raise UserError(
            f'config.data.min_frequency = {min_frequency}: no {unit} occurs that often in the '
            f'{texts} training texts, so there is nothing to learn from; set it to 1, add texts, '
            'or choose another config.data.tokenizer'
        )


def skipped_file(problems: Sequence[str]) -> dict[str, str]:
    """Returns the file of the workdir that lists the bad rows, if any were skipped."""
    return {'skipped_rows.txt': '\n'.join(problems)} if problems else {}
