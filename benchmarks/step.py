"""One training step, with and without what makes it exact and what it draws."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Row, in_turn, ratio
from configs import sst2
from configs.schema import Config
from model import dropout
from runtime import backend
from tasks.classification import ModelConfig, classifier_init, classifier_sums, make_model
from training import keys, step
from training.mesh import Layout, make_layout, make_mesh
from training.optimizer import make_optimizer, make_schedule
from training.state import TrainState, make_create_state

WIDTH, WORDS, ROUNDS = 16, 13_523, 21


def measure() -> list[Row]:
    """The model of configs/sst2.py on random batches, 8 shards."""
    config = dataclasses.replace(sst2.get_config(), num_shards=8)
    backend.prepare(config.cpu_threads, config.matmul_precision)
    layout = make_layout(config, config.num_shards, make_mesh())
    psum = dataclasses.replace(layout, reduction='psum')
    undropped = copy.deepcopy(config)
    for rate in ('word_dropout', 'embedding_dropout', 'dropout'):
        setattr(undropped.model, rate, 0.0)
    masks = functools.partial(mock.patch.object, dropout, 'drop_mask')
    without = functools.partial(mock.patch.object, step, new=no_fingerprint)
    with without('fingerprint'), without('shared_fingerprint'):
        variants = {'psum': prepared(config, psum), 'tree': prepared(config, layout)}
    variants |= {'whole': prepared(config, layout), 'no dropout': prepared(undropped, layout)}
    with masks(mask_of_16_bits):
        variants['16 bits'] = prepared(config, layout)
    with masks(jax.random.bernoulli):
        variants['32 bits'] = prepared(config, layout)
    seconds = in_turn(variants, ROUNDS)
    return [
        ('step', 1000 * float(np.median(seconds['whole'])), 'ms'),
        ('exact sum over psum', ratio(seconds['tree'], seconds['psum']), ''),
        ('ledger over none', ratio(seconds['whole'], seconds['tree']), ''),
        ('dropout over none', ratio(seconds['whole'], seconds['no dropout']), ''),
        ('... with 16 random bits', ratio(seconds['16 bits'], seconds['no dropout']), ''),
        ('... with 32 random bits', ratio(seconds['32 bits'], seconds['no dropout']), ''),
    ]


def no_fingerprint(*_: Any) -> jax.Array:
    """Stands in for a fingerprint and costs nothing."""
    return jnp.uint32(0)


def mask_of_16_bits(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """model.dropout.drop_mask with two bytes for each element."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return (numbers < round(rate * 2**16)).reshape(shape)


def prepared(config: Config, layout: Layout) -> Callable[[], None]:
    """A compiled training step with a state and a batch of its own, ready to be timed."""
    sizes = [range(count) for count in (WORDS, 3000, 1500)]
    assert isinstance(config.model, ModelConfig)
    model = make_model(config.model, sizes, 2)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1000))
    create = make_create_state(classifier_init(model, 2), optimizer, layout)
    state = [create(keys.root_keys(0, config.prng_impl))]
    train_step = step.make_train_step(
        classifier_sums(model), optimizer, config.optimizer.clip_norm, layout
    )
    random, rows = np.random.default_rng(0), config.batch_size
    batch = layout.put(
        {
            'token_ids': random.integers(4, WORDS, (rows, WIDTH), np.int32),
            'affix_ids': random.integers(4, 1500, (rows, WIDTH, 2), np.int32),
            'lengths': random.integers(3, WIDTH + 1, rows, np.int32),
            'labels': random.integers(0, 2, rows, np.int32),
            'weights': np.ones(rows, np.float32),
        }
    )

    def one_step() -> None:
        following: tuple[TrainState, jax.Array] = train_step(state.pop(), batch)
        state.append(jax.block_until_ready(following[0]))

    one_step()  # compiles, while what is patched is patched
    return one_step
