"""Weights of labels, in the loss or in sampling, as options give them."""

import re
from collections.abc import Sequence

import numpy as np

from configs.checks import Check
from errors import UserError
from input_pipeline.examples import not_among


def label_weights() -> Check:
    """Expects weights of labels, ('balanced',), or () for none."""

    def ok(value: tuple[str, ...]) -> bool:
        found = [re.fullmatch(r'.+=(\d+(?:\.\d+)?)', text, re.DOTALL) for text in value]
        once = len({text.rpartition('=')[0] for text in value}) == len(value)
        weights = once and all(match and float(match[1]) > 0 for match in found)
        return value == ('balanced',) or weights

    expected = "('balanced',), or LABEL=WEIGHT once each, > 0, such as ('rare=5','frequent=0.5')"
    return Check(ok, expected)


def weights_of_examples(
    option: str, given: tuple[str, ...], labels: np.ndarray, label_names: Sequence[str]
) -> np.ndarray | None:
    """Returns float64[N] for labels int32[N], or None. Raises UserError for an unknown label."""
    if not given:
        return None
    counts = np.bincount(labels, minlength=len(label_names))
    of_labels = labels.size / (len(label_names) * np.maximum(counts, 1))
    if given != ('balanced',):
        named = dict(text.rpartition('=')[::2] for text in given)
        for label in named:
            if label not in label_names:
                raise UserError(f'config.data.{option}: label {not_among(label, label_names)}')
        of_labels = np.array([float(named.get(label, 1)) for label in label_names])
    return of_labels[labels]
