"""Measures the input pipeline on ten million short texts, made as they are read."""

import functools
import itertools
import resource
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.common import Row, config
from input_pipeline.batches import train_batches
from input_pipeline.encoded import LabelledTexts
from input_pipeline.vocabulary import Vocabulary
from training import keys

EXAMPLES, LATE, BATCHES = 10_000_000, 1_000_000, 400
WORDS = [f'word{number}' for number in range(1000)]


class Texts(Sequence[str]):
    """Makes text `row` of 3 to 10 words when it is asked for, so that no text takes memory."""

    def __len__(self) -> int:
        """Returns the number of texts."""
        return EXAMPLES

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        """Returns one text."""
        if row >= EXAMPLES:
            raise IndexError(row)
        first = row * 7919 % 990
        return ' '.join(WORDS[first : first + 3 + row % 8])


def measure() -> list[Row]:
    """Measures encoding, memory, the first batch at two steps, and batches per second."""
    measured = config()
    words = functools.partial(keys.epoch_seed, keys.root_keys(0, measured.prng_impl))
    began, before = time.perf_counter(), peak()
    labels = np.zeros(EXAMPLES, np.int32)
    examples = LabelledTexts(Texts(), labels, Vocabulary(WORDS), max_length=12)
    encoded, ids = time.perf_counter() - began, peak() - before

    def seconds(step: int, count: int) -> float:
        began = time.perf_counter()
        batches = train_batches(examples, measured, words, slice(0, measured.batch_size), step)
        assert len(list(itertools.islice(batches, count))) == count
        return time.perf_counter() - began

    measured.num_steps = LATE + BATCHES
    early, late, many = seconds(0, 1), seconds(LATE, 1), seconds(0, BATCHES)
    return [
        ('examples', EXAMPLES, ''),
        ('encoding', encoded, 's'),
        ('peak memory of the ids', ids / EXAMPLES, 'bytes per example'),
        ('... with the orders of epochs', (peak() - before) / EXAMPLES, 'bytes per example'),
        ('first batch at step 0', early, 's'),
        (f'first batch at step {LATE:,}', late, 's'),
        ('batches after the first', (BATCHES - 1) / max(many - early, 1e-9), 'batches/s'),
    ]


def peak() -> int:
    """Returns the peak resident memory of this process, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
