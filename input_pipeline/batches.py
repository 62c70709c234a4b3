"""Decides which examples make up a batch: a pure function of (root key, step).

Each epoch is a new permutation (or weighted draw) of the examples; epochs follow each other without
a gap, so a batch may span two. The examples of each W batches are sorted by length and cut into W
batches, which are shuffled.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import numpy as np

from arrays import HostBatch
from configs.schema import Config
from input_pipeline.sampling import weighted_epoch

EpochSeed = Callable[[int], np.ndarray]
PREFETCHED = 8  # batches kept ready


class Examples(Protocol):
    """Describes a split that can return any of its examples as rows of a padded batch."""

    lengths: np.ndarray  # int32[N], without padding

    def __len__(self) -> int:
        """Returns the number of examples."""

    def text(self, row: int) -> str:
        """Returns one example as it is written."""

    def batch(self, rows: np.ndarray, width: int) -> HostBatch:
        """Pads the examples `rows` (int64[B]) to `width`; includes 'weights' float32[B]."""


def batch_order(
    lengths: np.ndarray,
    batch_size: int,
    window_batches: int,
    epoch_seed: EpochSeed,
    weights: np.ndarray | None = None,
) -> Callable[[int], np.ndarray]:
    """Returns step -> int64[batch_size], the examples of the global batch of a step (from 0).

    `epoch_seed(epoch)` seeds NumPy's Philox, whose raw output is the same in every version. Its
    argsort is the permutation; with `weights` (float64[N]) the epoch is a weighted draw.
    """

    def bits(epoch: int, block: int, count: int) -> np.ndarray:
        key = int.from_bytes(epoch_seed(epoch).astype('<u4').tobytes(), 'little')
        # Block 0: the epoch; 1 + w: window w.
        return np.random.Philox(key=key, counter=block << 192).random_raw(count)

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        order = np.argsort(bits(epoch, 0, lengths.size), kind='stable')
        if weights is None:
            return order
        return weighted_epoch(order, weights, bits(epoch, 0, 2 * order.size + 1)[order.size :])

    @functools.lru_cache(maxsize=2)
    def window(index: int) -> np.ndarray:
        size = batch_size * window_batches
        first = index * size
        epochs = range(first // lengths.size, (first + size - 1) // lengths.size + 1)
        begins = [first - epoch * lengths.size for epoch in epochs]
        parts = [epoch_order(e)[max(0, b) : b + size] for e, b in zip(epochs, begins, strict=True)]
        rows = np.concatenate(parts)
        rows = rows[np.argsort(lengths[rows], kind='stable')].reshape(window_batches, batch_size)
        return rows[np.argsort(bits(epochs[0], 1 + index, window_batches), kind='stable')]

    return lambda step: window(step // window_batches)[step % window_batches]


def train_batches(
    examples: Examples,
    config: Config,
    epoch_seed: EpochSeed,
    process_rows: slice,
    start: int,
    weights: np.ndarray | None = None,
) -> Iterator[HostBatch]:
    """Yields this process's rows of the batches of steps start .. num_steps - 1, prefetched.

    Every process pads to the bucket of the global batch's longest example. `weights` are those of
    `batch_order`.
    """
    data = config.data
    order = batch_order(
        examples.lengths, config.batch_size, data.window_batches, epoch_seed, weights
    )

    def make(step: int) -> HostBatch:
        rows = order(step)
        width = bucket(int(examples.lengths[rows].max()), data.bucket_lengths)
        return examples.batch(rows[process_rows], width)

    options = grain.ReadOptions(num_threads=data.loader_threads, prefetch_buffer_size=PREFETCHED)
    steps = grain.MapDataset.range(start, max(start, config.num_steps))
    return iter(steps.map(make).to_iter_dataset(options))


def eval_batches(examples: Examples, config: Config, process_rows: slice) -> Iterator[HostBatch]:
    """Yields every example once, in order, at one width; rows of weight 0 fill the last batch."""
    width = config.data.bucket_lengths[-1]
    for first in range(0, len(examples), config.eval_batch_size):
        rows = np.arange(first, first + config.eval_batch_size)
        batch = examples.batch(np.minimum(rows, len(examples) - 1)[process_rows], width)
        batch['weights'] = batch['weights'] * (rows < len(examples))[process_rows]
        yield batch


def bucket(length: int, bucket_lengths: tuple[int, ...]) -> int:
    """Returns the shortest bucket that holds `length`."""
    return next(width for width in bucket_lengths if length <= width)


def padding_share(lengths: np.ndarray, config: Config) -> float:
    """Returns the share of padding among the ids of training batches, estimated from one window.

    The window's examples are spaced evenly over `lengths` (int32[N]), so the cost does not grow
    with N.
    """
    data, size = config.data, config.batch_size * config.data.window_batches
    window = np.sort(lengths[np.linspace(0, len(lengths) - 1, size).round().astype(int)])
    longest = window.reshape(data.window_batches, config.batch_size)[:, -1]
    widths = [bucket(int(length), data.bucket_lengths) for length in longest]
    return 1 - float(window.sum()) / (config.batch_size * sum(widths))
