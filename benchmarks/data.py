"""Measures the input pipeline alone: padding by buckets, batches/s, time to the first batch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np

import tasks
from benchmarks.common import Row, config, in_turn
from input_pipeline.batches import Examples, batch_order, bucket, train_batches
from runtime import backend
from training import keys

BATCHES, ROUNDS, LATE = 400, 5, 100_000


def measure() -> list[Row]:
    """Measures the config, and its padding with other buckets, too."""
    measured = config()
    backend.prepare()
    examples = tasks.make_task(measured).train
    words = functools.partial(keys.epoch_seed, keys.root_keys(0, measured.prng_impl))
    longest, own = int(examples.lengths.max()), measured.data.bucket_lengths
    eights = tuple(range(8, longest + 8, 8))
    layouts = {
        'one width': ((longest,), 1),
        'every eight, window 1': (eights, 1),
        f'every eight, window {measured.data.window_batches}': (
            eights,
            measured.data.window_batches,
        ),
        f'{own}, window {measured.data.window_batches}': (own, measured.data.window_batches),
    }
    rows = [
        (f'padding, {name}', 100 * padding(examples, measured.batch_size, *layout, words), '%')
        for name, layout in layouts.items()
    ]

    def first(step: int, threads: int, count: int) -> None:
        data = dataclasses.replace(measured.data, loader_threads=threads)
        late = dataclasses.replace(measured, data=data, num_steps=step + count)
        every = slice(0, measured.batch_size)
        for _ in itertools.islice(train_batches(examples, late, words, every, step), count):
            pass

    calls: dict[str, Callable[[], None]] = {
        'first batch at step 0': functools.partial(first, 0, 2, 1),
        'first batch at step 100,000': functools.partial(first, LATE, 2, 1),
        '1 thread': functools.partial(first, 0, 1, BATCHES),
        '2 threads': functools.partial(first, 0, 2, BATCHES),
    }
    seconds = {name: float(np.median(found)) for name, found in in_turn(calls, ROUNDS).items()}
    for name in list(calls)[:2]:
        rows.append((name, 1000 * seconds[name], 'ms'))
    for name in list(calls)[2:]:
        rows.append((f'batches from {name}', BATCHES / seconds[name], 'batches/s'))
    return rows


def padding(
    examples: Examples,
    batch_size: int,
    bucket_lengths: tuple[int, ...],
    window_batches: int,
    words: Callable[[int], np.ndarray],
) -> float:
    """Returns the share of positions without a token, over an epoch."""
    order = batch_order(examples.lengths, batch_size, window_batches, words)
    widths = tokens = 0
    for step in range(len(examples) // batch_size):
        lengths = examples.lengths[order(step)]
        widths += bucket(int(lengths.max()), bucket_lengths) * batch_size
        tokens += int(lengths.sum())
    return 1 - tokens / widths
