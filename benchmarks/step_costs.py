"""What the exact sum and the ledger cost: times of one training step, variants in turn.

    JAX_NUM_CPU_DEVICES=8 python -m benchmarks.step_costs [--repeat=15]

The full-size SST-2 model on random batches, 8 shards. Every round times each variant once, so that
a noisy machine is noisy for all. Printed are medians over the rounds: of the time, and of its ratio
to that of the variant before in the same round.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs import sst2
from model.classifier import TextClassifier
from tasks.classification import classifier_init, classifier_sums
from training import backend, keys, step
from training.layout import Layout, make_layout, make_mesh
from training.optimizer import make_optimizer, make_schedule
from training.state import TrainState, make_create_state

WIDTH, WORDS = 24, 13_523


def main() -> None:
    """Prints a line for every variant."""
    parser = argparse.ArgumentParser(prog='step_costs')
    parser.add_argument('--repeat', type=int, default=15)
    repeat = parser.parse_args().repeat
    config = dataclasses.replace(sst2.get_config(), num_shards=8)
    backend.prepare(config.num_shards)
    layout = make_layout(config, config.num_shards, make_mesh())
    without = functools.partial(mock.patch.object, step, new=no_fingerprint)
    with without('fingerprint'), without('shared_fingerprint'):
        variants = {
            'psum, no ledger': prepared(config, dataclasses.replace(layout, reduction='psum')),
            'tree, no ledger': prepared(config, layout),
        }
    variants['tree, ledger'] = prepared(config, layout)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeat):
        for name, one_step in variants.items():
            began = time.perf_counter()
            one_step()
            times[name].append(time.perf_counter() - began)
    print(
        f'{layout.mesh.size} devices, {layout.num_shards} shards, {WIDTH} tokens, {repeat} rounds'
    )
    before = times['psum, no ledger']
    for name, seconds in times.items():
        ratio = np.median(np.divide(seconds, before))
        print(f'{name:16} {1000 * np.median(seconds):8.1f} ms   {ratio:.3f}')
        before = seconds


def no_fingerprint(*_: Any) -> jax.Array:
    """Stands in for a fingerprint and costs nothing."""
    return jnp.uint32(0)


def prepared(config: Any, layout: Layout) -> Callable[[], None]:
    """A compiled training step with a state and a batch of its own, ready to be timed."""
    settings = dataclasses.asdict(config.model) | {'dtype': jnp.float32}
    settings.pop('compute_dtype')
    model = TextClassifier(vocab_size=WORDS, num_classes=2, unk_id=1, first_word_id=4, **settings)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1000))
    create = make_create_state(classifier_init(model), optimizer, layout)
    state = [create(keys.root_key(0, config.prng_impl))]
    train_step = step.make_train_step(
        classifier_sums(model), optimizer, config.optimizer.clip_norm, layout
    )
    random = np.random.default_rng(0)
    batch = layout.put(
        {
            'token_ids': random.integers(4, WORDS, (config.batch_size, WIDTH)).astype(np.int32),
            'lengths': random.integers(3, WIDTH + 1, config.batch_size).astype(np.int32),
            'labels': random.integers(0, 2, config.batch_size).astype(np.int32),
            'weights': np.ones(config.batch_size, np.float32),
        }
    )

    def one_step() -> None:
        following: tuple[TrainState, jax.Array] = train_step(state.pop(), batch)
        state.append(jax.block_until_ready(following[0]))

    one_step()  # compiles
    return one_step


if __name__ == '__main__':
    main()
