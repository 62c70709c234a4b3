"""Draws the examples of an epoch in proportion to weights."""

import numpy as np


def weighted_epoch(order: np.ndarray, weights: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Returns N examples, drawn from all N in a shuffled `order`: int64[N].

    Each comes the whole number of times below or above its share of the weights (float64[N],
    positive). raw: uint64[N + 1] random bits.
    """
    # Systematic sampling: evenly spaced points on the weights, laid end to end in `order`. The
    # offset has 16 bits, so that the last point stays below the end after rounding.
    ends = np.cumsum(weights[order])
    points = (np.arange(order.size) + (int(raw[0]) >> 48) / 2**16) / order.size * ends[-1]
    drawn = order[np.searchsorted(ends, points, side='right')]
    return drawn[np.argsort(raw[1:], kind='stable')]
