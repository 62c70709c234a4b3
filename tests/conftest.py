"""Tests run on eight simulated CPU devices, with JAX's key-reuse checker on."""

import collections
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, Mesh

from input_pipeline.encoded import LabelledTexts
from input_pipeline.vocabulary import BOS, EOS, FIRST_WORD, PAD, UNK, Vocabulary
from model.classifier import TextClassifier
from runtime import backend
from tests import runs
from training.mesh import AXIS, Layout

VOCAB_SIZE = 30

os.environ['JAX_PLATFORMS'] = 'cpu'  # for the programs that tests start
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_debug_key_reuse', True)
jax.config.update('jax_compilation_cache_dir', runs.COMPILED)
backend.prepare(cpu_threads=8)
jax.devices()
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, lambda *_: None)  # unlike SIG_IGN, not inherited by programs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with many slow tests first, or one process would work on them at the end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker('slow'))
    items.sort(key=lambda item: -slow[item.path])  # a file's tests keep their order


@pytest.fixture(scope='session')
def layout() -> Callable[..., Layout]:
    """(devices, shards=8, reduction='tree') -> a layout on the first so many devices."""

    def make(devices: int, shards: int = 8, reduction: str = 'tree') -> Layout:
        chosen = np.array(jax.devices()[:devices])
        return Layout(Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,)), shards, reduction)

    return make


@pytest.fixture(scope='session')
def classifier() -> Callable[..., TextClassifier]:
    """(field=value, ...) -> a tiny classifier, without dropout unless a rate is given."""

    def make(**fields: object) -> TextClassifier:
        sizes = {'embedding_size': 8, 'hidden_size': 8}
        small = {'vocab_size': VOCAB_SIZE, 'affix_sizes': (), 'num_classes': 3} | sizes
        rates = {'word_dropout': 0.0, 'embedding_dropout': 0.0, 'dropout': 0.0}
        return TextClassifier(
            **(small | rates | {'unk_id': UNK, 'first_word_id': FIRST_WORD} | fields)
        )

    return make


@pytest.fixture(scope='session')
def token_batch() -> Callable[..., dict[str, np.ndarray]]:
    """(rows, width, seed=0) -> a batch of random texts of all lengths, with unequal weights."""

    def make(rows: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(2, width + 1, rows, np.int32)
        position, end = np.arange(width), lengths[:, None] - 1
        ids = rng.integers(FIRST_WORD, VOCAB_SIZE, (rows, width), np.int32)
        ids = np.where(position == 0, BOS, np.where(position == end, EOS, ids))
        return {
            'token_ids': np.where(position <= end, ids, PAD).astype(np.int32),
            'lengths': lengths,
            'labels': rng.integers(0, 3, rows, np.int32),
            'weights': rng.uniform(0.1, 2.0, rows).astype(np.float32),
        }

    return make


@pytest.fixture(scope='session')
def random_texts() -> Callable[..., LabelledTexts]:
    """(count, max_length, seed=0) -> examples of random words, of all lengths."""
    words = [f'w{index}' for index in range(VOCAB_SIZE - FIRST_WORD)]

    def make(count: int, max_length: int, seed: int = 0) -> LabelledTexts:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, max_length - 1, count)
        texts = [' '.join(rng.choice(words, size)) for size in sizes]
        return LabelledTexts(texts, rng.integers(0, 3, count), Vocabulary(words), max_length)

    return make


@pytest.fixture(scope='session')
def classifier_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The workdir and the summary of a small classifier, for tests that only read it."""
    import train
    from tests.test_resume import small_config

    run = tmp_path_factory.mktemp('reviews')
    return run, train.train(small_config(), epath.Path(run))
