"""Sums over shards whose bits do not depend on the number of devices.

Floating-point addition is not associative, so the shards' partial sums are added in one fixed
binary tree over the shard index: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A device adds its own
consecutive shards, which are a subtree, and the devices add their subtrees' sums. S shards and n
devices are powers of two, n divides S.

Cost for a vector of P float32 on n devices, per device: one all-to-all of 4P (n-1)/n bytes and one
all-gather of 4P (n-1)/n bytes, together those of a ring all-reduce, in two messages to each other
device. Each device adds P values. No more than 2 log2(S/n) + 1 partial sums are in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # a TPU vector register's width: a slice in whole registers moves as a true all-gather
ROWS = 8


def tree_sum_local(partial: Callable[[jax.Array], Any], first: jax.Array, count: int) -> Any:
    """The tree sum of `partial(shard)` over shards first .. first + count - 1, one at a time.

    Scans of two, nested: the pairwise tree in O(log count) memory, and `partial` compiled once.
    """
    if count == 1:
        return partial(first)
    half = count // 2

    def sum_half(_: None, start: jax.Array) -> tuple[None, Any]:
        return None, tree_sum_local(partial, start, half)

    starts = first + half * jnp.arange(2, dtype=jnp.int32)
    _, halves = lax.scan(sum_half, None, starts)
    return jax.tree.map(lambda pair: pair[0] + pair[1], halves)


def select_shard(parts: Any, index: jax.Array) -> Any:
    """Of a tree of what a device's own shards have, [S/n, ...], the part [...] of one of them."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), parts)


def padding(size: int, devices: int) -> int:
    """How many values make a vector of this size one that `sum_devices` takes."""
    return -size % (devices * ROWS * LANES)


def sum_devices(vector: jax.Array, axis: str, devices: int) -> jax.Array:
    """The tree sum of float32[P] over a mesh axis, on every device. Call it inside shard_map."""
    if devices == 1:
        return vector
    return gathered(sum_scattered(vector, axis, devices), axis).reshape(-1)


def sum_scattered(vector: jax.Array, axis: str, devices: int) -> jax.Array:
    """The first half of `sum_devices`: slice i of the sum, float32[P / n / LANES, LANES], on
    device i.
    """
    slices = vector.reshape(devices, -1, LANES)
    if devices == 1:
        return slices[0]
    return sum_pairs(lax.all_to_all(slices, axis, split_axis=0, concat_axis=0))


def gathered(part: jax.Array, axis: str) -> jax.Array:
    """The float32[N, ...] of all devices, one after the other, on every device.

    As whole numbers: XLA on TPU makes a small all-gather an all-reduce with zeros, and -0.0 + 0.0
    is 0.0.
    """
    words = lax.all_gather(lax.bitcast_convert_type(part, jnp.uint32), axis, tiled=True)
    return lax.bitcast_convert_type(words, jnp.float32)


def sum_gathered(vector: jax.Array, axis: str) -> jax.Array:
    """The tree sum of a few numbers over a mesh axis, on every device: all get all of them."""
    return sum_pairs(gathered(vector[None], axis))


def sum_pairs(parts: jax.Array) -> jax.Array:
    """The tree sum over the leading axis, whose size is a power of two."""
    terms = list(parts)
    while len(terms) > 1:
        terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]
