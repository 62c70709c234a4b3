"""One training step beside a plain one, and what makes it exact and what it draws, one by one."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrays import HostBatch
from benchmarks.common import Row, in_turn, ratio
from configs import sst2, sst2_flax
from configs.schema import Config
from input_pipeline.vocabulary import FIRST_WORD, Vocabulary
from model import dropout
from runtime import backend
from tasks.classification import ModelConfig, classifier_init, classifier_sums, make_model
from training import keys, step
from training.mesh import Layout, make_layout, make_mesh
from training.optimizer import make_optimizer
from training.state import TrainState, make_create_state

WIDTH, WORDS, AFFIXES, ROUNDS = 16, 13_523, (3000, 1500), 21


def measure() -> list[Row]:
    """Times steps on random batches: exact over plain at two sizes, then the parts of the cost."""
    backend.prepare()
    rows: list[Row] = []
    for name, module in {'sst2': sst2, 'sst2_flax': sst2_flax}.items():
        config = module.get_config()
        for devices in sorted({1, jax.device_count()}):
            layout = make_layout(config, devices, make_mesh(jax.devices()[:devices]))
            seconds = in_turn(
                {'exact': prepared(config, layout), 'plain': prepared_plain(config, layout)}, ROUNDS
            )
            what = f'{name} on {devices}'
            rows += [
                (f'{what}: exact step', 1000 * float(np.median(seconds['exact'])), 'ms'),
                (f'{what}: exact over plain', ratio(seconds['exact'], seconds['plain']), ''),
            ]
    return rows + parts()


def parts() -> list[Row]:
    """Times the step of configs/sst2.py, 8 shards, with and without each of its parts."""
    config = dataclasses.replace(sst2.get_config(), num_shards=8)
    backend.prepare()
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


def prepared(config: Config, layout: Layout, width: int = WIDTH) -> Callable[[], None]:
    """Returns a compiled training step with a state and a batch of its own, ready to be timed."""
    affixes, sums = affixes_of(config), classifier_sums(model_of(config))
    optimizer = make_optimizer(config.optimizer, 1000)
    create = make_create_state(classifier_init(model_of(config), affixes), optimizer, layout)
    train_step = step.make_train_step(sums, optimizer, config.optimizer.clip_norm, layout)
    state = create(keys.root_keys(0, config.prng_impl))
    return repeated(train_step, state, layout.put(random_batch(config, width)))


def prepared_plain(config: Config, layout: Layout) -> Callable[[], None]:
    """The same model, loss and optimizer in one jit: no ledger, no tree, the state donated."""
    affixes, sums = affixes_of(config), classifier_sums(model_of(config))
    optimizer = make_optimizer(config.optimizer, 1000)
    if config.optimizer.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.optimizer.clip_norm), optimizer)

    def create(root: keys.RootKeys) -> TrainState:
        params = classifier_init(model_of(config), affixes)(
            keys.stream_key(root, keys.Stream.PARAMS)
        )
        return TrainState(jnp.int32(0), params, optimizer.init(params), root)

    def plain_step(state: TrainState, batch: step.Batch) -> tuple[TrainState, step.Sums]:
        rngs = keys.shard_rngs(state.root_keys, state.step, jnp.int32(0))

        def loss(params: Any) -> tuple[jax.Array, step.Sums]:
            found = sums(params, batch, rngs, state.step)
            return found['loss'] / found['weight'], found

        grads, found = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.root_keys), found

    on_all = functools.partial(jax.jit, out_shardings=layout.replicated)
    state = on_all(create)(keys.root_keys(0, config.prng_impl))
    return repeated(on_all(plain_step, donate_argnums=0), state, layout.put(random_batch(config)))


def repeated(
    train_step: Callable[..., tuple[TrainState, Any]], first: TrainState, batch: step.Batch
) -> Callable[[], None]:
    """Returns a call that goes one step on, compiled now, while what is patched is patched."""
    state = [first]

    def one_step() -> None:
        state.append(jax.block_until_ready(train_step(state.pop(), batch)[0]))

    one_step()
    return one_step


def affixes_of(config: Config) -> int:
    """Returns how many affixes of a word the model knows."""
    return len(AFFIXES) if any(getattr(config.data, 'affixes', ())) else 0


def model_of(config: Config) -> nn.Module:
    """Returns the model of a config over vocabularies of SST-2's size."""
    assert isinstance(config.model, ModelConfig)
    sizes = (WORDS, *AFFIXES[: affixes_of(config)])
    return make_model(config.model, [Vocabulary([''] * (count - FIRST_WORD)) for count in sizes], 2)


def random_batch(config: Config, width: int = WIDTH) -> HostBatch:
    """Returns a batch of one width."""
    random, rows = np.random.default_rng(0), config.batch_size
    batch = {
        'token_ids': random.integers(4, WORDS, (rows, width), np.int32),
        'lengths': random.integers(3, width + 1, rows, np.int32),
        'labels': random.integers(0, 2, rows, np.int32),
        'weights': np.ones(rows, np.float32),
    }
    if count := affixes_of(config):
        batch['affix_ids'] = random.integers(4, min(AFFIXES), (rows, width, count), np.int32)
    return batch
