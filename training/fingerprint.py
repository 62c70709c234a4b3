"""Short names for large values: on the device inside a step, on the host for files."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprint(tree: Any, start: jax.Array | int = 0) -> jax.Array:
    """uint32 over all bits of a tree of 32-bit or 16-bit arrays, cheap enough for every step.

    The sum over elements of a mixed element times an odd weight that follows its position
    (`start` + index): integer sums have no rounding, so the order of adding is free, any single
    changed element changes the sum, and two exchanged ones do too.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = lax_bits(leaf).reshape(-1)
        mixed = (bits ^ (bits >> 16)) * jnp.uint32(0x9E3779B1)
        mixed = mixed ^ (mixed >> 15)
        position = jnp.arange(bits.size, dtype=jnp.uint32) + jnp.uint32(start)
        total = total * jnp.uint32(31) + jnp.sum(mixed * (2 * position + 1), dtype=jnp.uint32)
    return total


def lax_bits(leaf: jax.Array) -> jax.Array:
    """The bits of an array as uint32."""
    if leaf.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)


def sha256_of(tree: Any) -> str:
    """Hex SHA-256 of a tree of arrays on the host: leaves in tree order, each its path, dtype,
    shape and little-endian bytes.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\n'.encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
