"""The promises of training/fingerprint.py."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from training.fingerprint import fingerprint, sha256_of, shared_fingerprint
from training.mesh import AXIS, Layout, jit_on_mesh

SIZE = 64


@pytest.mark.parametrize('dtype', [np.uint32, jnp.bfloat16])
def test_any_flipped_bit_changes_the_fingerprint(dtype: type) -> None:
    values = jax.lax.bitcast_convert_type(
        jax.random.bits(jax.random.key(0), SIZE, f'uint{8 * np.dtype(dtype).itemsize}'), dtype
    )
    words = jax.lax.bitcast_convert_type(values, f'uint{8 * values.itemsize}')
    tree = {'before': jnp.ones(3), 'values': values, 'after': jnp.ones(2)}

    def flipped(position: jax.Array, bit: jax.Array) -> jax.Array:
        changed = words.at[position].set(words[position] ^ (1 << bit).astype(words.dtype))
        return fingerprint(tree | {'values': jax.lax.bitcast_convert_type(changed, dtype)})

    positions, bits = np.meshgrid(np.arange(SIZE), np.arange(8 * values.itemsize))
    prints = jax.jit(jax.vmap(flipped))(positions.ravel(), bits.ravel()).tolist()
    assert fingerprint(tree).item() not in prints
    assert len(set(prints)) == len(prints)


def test_any_two_exchanged_elements_change_the_fingerprint() -> None:
    values = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    first, second = np.triu_indices(SIZE, 1)

    def exchanged(i: jax.Array, j: jax.Array) -> jax.Array:
        return fingerprint(jnp.asarray(values).at[i].set(values[j]).at[j].set(values[i]))

    values = jnp.asarray(values)
    prints = jax.jit(jax.vmap(exchanged))(first, second).tolist()
    assert fingerprint(values).item() not in prints


def test_exchanged_leaves_change_the_fingerprint() -> None:
    a, b = jnp.arange(4.0), jnp.arange(4.0) + 1
    assert fingerprint([a, b]) != fingerprint([b, a])


@pytest.mark.parametrize('parts', [2, 4, 8])
def test_fingerprint_of_parts_adds_up_to_the_fingerprint_of_the_whole(parts: int) -> None:
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=SIZE).astype(np.float32) for name in 'ab'}
    size = SIZE // parts
    total = jnp.uint32(0)
    for start in range(0, SIZE, size):
        total += fingerprint(
            {k: jnp.asarray(v[start : start + size]) for k, v in tree.items()}, start
        )
    assert total == fingerprint(jax.tree.map(jnp.asarray, tree))


@pytest.mark.parametrize(
    'devices',
    [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8],
)
def test_fingerprint_that_devices_share_is_that_of_the_whole(
    layout: Callable[..., Layout], devices: int
) -> None:
    """Sizes that devices do not divide among them, too."""
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (3,), (8,), (9,), (5, 7), (4, 16)]
    tree = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    shared = functools.partial(shared_fingerprint, axis=AXIS, devices=devices)
    program = jit_on_mesh(shared, layout(devices), in_specs=P(), out_specs=P())
    assert program(jax.device_put(tree, layout(devices).replicated)) == fingerprint(tree)


def test_fingerprint_does_not_depend_on_compilation() -> None:
    values = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    assert fingerprint(values) == jax.jit(fingerprint)(values)


def test_sha256_of_is_pinned() -> None:
    tree = {'b': np.arange(3, dtype=np.int32), 'a': np.array([[1.5, -0.0]], np.float32)}
    assert sha256_of(tree) == '9a7ad24f7a76e2b7c53ca0ed02799911018a28429fc431ba01f59f0bd4ce899a'


def test_sha256_of_tells_paths_shapes_types_and_signed_zeros_apart() -> None:
    zeros = np.zeros(4, np.float32)
    trees = (
        {'a': zeros},
        {'b': zeros},
        {'a': zeros.reshape(2, 2)},
        {'a': zeros.view(np.int32)},
        {'a': -zeros},
        {'a': zeros[:3], 'b': zeros[3:]},
        {'a': zeros[:2], 'b': zeros[2:]},
    )
    assert len({sha256_of(tree) for tree in trees}) == len(trees)
