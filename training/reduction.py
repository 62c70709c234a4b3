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


def sum_own_shards(partial: Callable[[jax.Array], Any], first: jax.Array, count: int) -> Any:
    """The tree sum of `partial(shard)` over shards first .. first + count - 1, one at a time.

    Scans of two, nested: the pairwise tree in O(log count) memory, and `partial` compiled once.
    """
    if count == 1:
        return partial(first)
    half = count // 2

    def sum_half(_: None, start: jax.Array) -> tuple[None, Any]:
        return None, sum_own_shards(partial, start, half)

    starts = first + half * jnp.arange(2, dtype=jnp.int32)
    _, halves = lax.scan(sum_half, None, starts)
    return jax.tree.map(lambda pair: pair[0] + pair[1], halves)


def padding(size: int, devices: int) -> int:
    """How many values make a vector of this size one that `sum_devices` takes."""
    return -size % (devices * ROWS * LANES)


def sum_devices(vector: jax.Array, axis: str, devices: int) -> jax.Array:
    """The tree sum of float32[P] over a mesh axis, on every device. Call it inside shard_map."""
    if devices == 1:
        return vector
    # Each device gives slice i to device i, adds the n versions of its own, and shares the sum.
    slices = vector.reshape(devices, -1, LANES)
    parts = list(lax.all_to_all(slices, axis, split_axis=0, concat_axis=0))
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    # As whole numbers: XLA on TPU makes a small all-gather an all-reduce with zeros, and -0.0 + 0.0
    # is 0.0.
    words = lax.bitcast_convert_type(parts[0], jnp.uint32)
    gathered = lax.all_gather(words, axis, tiled=True).reshape(-1)
    return lax.bitcast_convert_type(gathered, jnp.float32)
