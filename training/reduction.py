"""Adds over shards, to the same bits on any number of devices.

Floating-point addition is not associative, so the shards' partial sums are added in one fixed
binary tree over the shard index: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A device adds its own
consecutive shards, which form a subtree, and the devices add the sums of their subtrees. S shards
and n devices are powers of two, and n divides S.

Cost per device, for a vector of P float32 on n devices: one all-to-all and one all-gather of
4P (n-1)/n bytes each, the volume of a ring all-reduce, in two messages to every other device.
Each device adds P values. At most 2 log2(S/n) + 1 partial sums are in memory.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from arrays import Tree

LANES, ROWS = 128, 8  # a TPU vector register; slices are padded to whole ones


def tree_sum_local(partial: Callable[[jax.Array], Tree], first: jax.Array, count: int) -> Tree:
    """Adds `partial(shard)` in tree order over shards first .. first + count - 1, one at a time.

    Nested scans over two halves: O(log count) memory, and `partial` is compiled once.
    """
    if count == 1:
        return partial(first)
    half = count // 2

    def sum_half(_: None, start: jax.Array) -> tuple[None, Tree]:
        return None, tree_sum_local(partial, start, half)

    starts = first + half * jnp.arange(2, dtype=jnp.int32)
    _, halves = lax.scan(sum_half, None, starts)
    return jax.tree.map(lambda pair: pair[0] + pair[1], halves)


def select_shard(parts: Tree, index: jax.Array) -> Tree:
    """Selects the part [...] of one shard from a tree of arrays [S/n, ...], one row per shard."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), parts)


def padding(size: int, devices: int) -> int:
    """Returns how many values to append so that `sum_devices` accepts a vector of this size."""
    return -size % (devices * ROWS * LANES)


def sum_devices(vector: jax.Array, axis: str, devices: int) -> jax.Array:
    """Adds float32[P] over a mesh axis in tree order. Call it inside shard_map."""
    return gathered(sum_scattered(vector, axis, devices), axis).reshape(-1)


def sum_scattered(vector: jax.Array, axis: str, devices: int) -> jax.Array:
    """Leaves slice i of the sum, float32[P / n / LANES, LANES], on device i.

    This is the first half of `sum_devices`.
    """
    slices = vector.reshape(devices, -1, LANES)
    return sum_pairs(lax.all_to_all(slices, axis, split_axis=0, concat_axis=0))


def gathered(part: jax.Array, axis: str) -> jax.Array:
    """Concatenates all devices' `part` (float32[N, ...]) on every device.

    Gathers them as integers: XLA on TPU may turn a small all-gather into an all-reduce with zeros,
    and -0.0 + 0.0 is 0.0.
    """
    words = lax.all_gather(lax.bitcast_convert_type(part, jnp.uint32), axis, tiled=True)
    return lax.bitcast_convert_type(words, jnp.float32)


def sum_pairs(parts: jax.Array) -> jax.Array:
    """Adds over the leading axis, whose size is a power of two, in tree order."""
    terms = list(parts)
    while len(terms) > 1:
        terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]
