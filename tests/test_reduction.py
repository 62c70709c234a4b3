"""The promises of training/reduction.py: the order of adding is a law, and costs a ring's bytes."""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from model.classifier import TextClassifier
from tasks import classification
from tools.compiled import collectives
from training import keys, reduction
from training.mesh import AXIS, Layout
from training.state import make_create_state
from training.step import (
    jit_on_mesh,
    local_shards,
    make_gradient,
    make_update,
    reduce_over_devices,
)

MakeLayout = Callable[..., Layout]
DEVICES = (1, 2, 4, 8)
SHARDS = (1, 2, 4, 8, 16, 32, 64)
QUICK = {(1, 1), (2, 2), (8, 1), (8, 2), (8, 8), (64, 1), (64, 8)}  # the others are slow tests


def tree_sum(parts: np.ndarray) -> np.ndarray:
    """((0 + 1) + (2 + 3)) + ..., from the definition: a left half, a right half, their sum."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return tree_sum(parts[:half]) + tree_sum(parts[half:])


def trainers_sum(parts: dict[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """The sum over the leading axis, the shards, as the trainer's step takes it."""

    def device_sum(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        shards, first = local_shards(rows, layout.shards_per_device)

        def partial(shard: jax.Array) -> dict[str, jax.Array]:
            return jax.tree.map(lambda x: x[0], reduction.select_shard(shards, shard - first))

        sums = reduction.tree_sum_local(partial, first, layout.shards_per_device)
        return reduce_over_devices(sums, layout)

    program = jit_on_mesh(device_sum, layout, in_specs=(P(AXIS),), out_specs=P())
    return jax.device_get(program(layout.put(parts)))


def wild(shards: int, *shape: int) -> np.ndarray:
    """Random float32 of magnitudes so different that every order of adding has its own bits."""
    rng = np.random.default_rng(shards)
    size = (shards, *shape)
    return (rng.normal(size=size) * 10.0 ** rng.integers(-6, 7, size)).astype(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal, signs of zeros included."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize(
    ('shards', 'devices'),
    [
        pytest.param(s, n, marks=() if (s, n) in QUICK else pytest.mark.slow)
        for s in SHARDS
        for n in DEVICES
        if n <= s
    ],
)
def test_shards_are_added_in_the_documented_tree(
    layout: MakeLayout, shards: int, devices: int
) -> None:
    parts = {'a': wild(shards, 1013), 'b': wild(shards, 3, 5), 'c': wild(shards)}
    found = trainers_sum(parts, layout(devices, shards))
    for name, values in parts.items():
        assert found[name].shape == values.shape[1:]
        assert same_bits(found[name], tree_sum(values))


@pytest.mark.parametrize('size', [1, 1023, 1024, 8191, 8192, 8193])
def test_padding_changes_no_value_and_no_shape(layout: MakeLayout, size: int) -> None:
    parts = {'a': wild(8, size)}
    found = trainers_sum(parts, layout(8))['a']
    assert found.shape == (size,)
    assert same_bits(found, tree_sum(parts['a']))


@pytest.mark.parametrize('devices', DEVICES)
def test_zeros_keep_the_signs_that_ieee_754_gives_their_sum(
    layout: MakeLayout, devices: int
) -> None:
    """-0.0 remains where all shards have it: neither padding nor gathering adds a zero."""
    parts = np.where(np.random.default_rng(0).random((8, 100)) < 0.1, 0.0, -0.0).astype(np.float32)
    found = trainers_sum({'a': parts}, layout(devices))['a']
    assert same_bits(found, tree_sum(parts))
    assert 0 < np.signbit(found).sum() < 100


@pytest.mark.parametrize('devices', [4, 8])
def test_psum_does_not_keep_the_law(layout: MakeLayout, devices: int) -> None:
    """Or these tests could not tell an exact reduction from any other."""
    parts = wild(8, 1013)
    found = trainers_sum({'a': parts}, layout(devices, reduction='psum'))['a']
    assert not same_bits(found, tree_sum(parts))
    scale = np.abs(parts).sum(axis=0)
    np.testing.assert_allclose(found / scale, tree_sum(parts) / scale, atol=1e-6)


def moved(program: str) -> dict[str, list[int]]:
    """Operation -> bytes of each result that a compiled program gets from other devices."""
    found = collections.defaultdict(list)
    for collective in collectives(program):
        found[collective.name].append(collective.result)
    return dict(found)


def test_step_moves_the_bytes_of_a_ring_in_two_collectives_and_two_small_ones(
    layout: MakeLayout, classifier: Callable[..., TextClassifier]
) -> None:
    model = classifier(
        vocab_size=10_000, embedding_size=64, hidden_size=128,
        word_dropout=0.1, embedding_dropout=0.1, dropout=0.1,
    )  # fmt: skip
    optimizer = optax.sgd(1e-3)  # the exchange does not depend on the rule
    create = make_create_state(classification.classifier_init(model), optimizer, layout(8))
    state = jax.eval_shape(create, keys.root_keys(0, 'threefry2x32'))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert size > 900_000
    ids, row = jax.ShapeDtypeStruct((16, 8), jnp.int32), jax.ShapeDtypeStruct((16,), jnp.int32)
    weights = jax.ShapeDtypeStruct((16,), jnp.float32)
    batch = {'token_ids': ids, 'lengths': row, 'labels': row, 'weights': weights}
    gradient = make_gradient(classification.classifier_sums(model), layout(8))
    gradient_args = (state.params, state.root_keys, state.step, batch)
    results = jax.eval_shape(gradient, *gradient_args)
    found = moved(gradient.lower(*gradient_args).compile().as_text())
    update = make_update(optimizer, 1.0, layout(8))
    after = moved(update.lower(state, *results).compile().as_text())

    assert {name: len(sizes) for name, sizes in found.items()} == {
        'all-to-all': 1,
        'all-gather': 1,
        'all-reduce': 1,
    }
    assert found['all-reduce'] == [8]  # two fingerprints; for random numbers, nothing at all
    assert after == {'all-reduce': [4]}  # the fingerprint of the parameters
    received = 7 / 8 * (found['all-to-all'][0] + found['all-gather'][0])
    ring = 2 * 7 / 8 * 4 * size
    assert received == pytest.approx(ring, rel=0.05)
