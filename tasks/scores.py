"""Scores every label: precision, recall and F1 from whole counts, and their averages.

All take right, predicted and true: float64[C], the examples of each of C labels. As in
scikit-learn, 0 / 0 is 0, and macro averages are over the labels that are true or predicted at least
once.
"""

from collections.abc import Sequence

import numpy as np


def scores(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns precision, recall and F1 of each label: float64[3, C]."""
    wholes = np.stack([predicted, true, (predicted + true) / 2])
    return right / np.where(wholes > 0, wholes, 1)


def averages(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Returns averages of precision, recall and F1: plain, by true examples, and of the counts."""
    of_labels, found = scores(right, predicted, true), predicted + true > 0
    return {
        'macro': of_labels[:, found].sum(axis=1) / max(1, found.sum()),
        'weighted': of_labels @ true / max(1, true.sum()),
        'micro': scores(right.sum(), predicted.sum(), true.sum()),
    }


def score_lines(
    names: Sequence[str], right: np.ndarray, predicted: np.ndarray, true: np.ndarray
) -> list[str]:
    """Returns the lines of a table: a row for each label, and for each kind of average."""
    of_labels, means = scores(right, predicted, true), averages(right, predicted, true)
    rows = [
        *zip(names, of_labels.T, true, strict=True),
        *((f'{kind} average', mean, true.sum()) for kind, mean in means.items()),
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [f'{"":{width}}  precision    recall        f1  examples']
    for name, values, count in rows:
        cells = ''.join(f'{value:9.4f} ' for value in values)
        lines.append(f'{name:{width}}  {cells}{count:9,.0f}')
    return lines


def label_counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns how many examples of each label were right, predicted and true: float64[C] each."""
    return np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)


def confusion_lines(counts: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Returns the scores of labels, and counts[true, predicted] as a table."""
    width = max(len('true'), *map(len, labels))
    cells = max(*map(len, labels), len(f'{counts.max():,.0f}'))
    rows = [labels, *([f'{count:,.0f}' for count in row] for row in counts)]
    return [
        *score_lines(labels, *label_counts(counts)),
        '',
        'true'.ljust(width) + '  predicted',
        *(
            label.ljust(width) + ''.join(f'  {cell:>{cells}}' for cell in row)
            for label, row in zip(['', *labels], rows, strict=True)
        ),
    ]
