"""Fingerprints of large values: on the device inside a step, on the host for files."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from arrays import Tree


def fingerprint(tree: Tree, start: jax.Array | int = 0) -> jax.Array:
    """Returns uint32 over all bits of a tree of 32-bit or 16-bit arrays, cheap enough per step.

    It adds each element, mixed, times an odd weight that depends on its position (`start` + index).
    Integer sums do not round, so any order of adding gives the same result. A single changed
    element changes the sum, and so do two exchanged ones.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + sum_of_terms(lax_bits(leaf), start)
    return total


def shared_fingerprint(tree: Tree, axis: str, devices: int) -> jax.Array:
    """Returns the `fingerprint` of a replicated tree; each device of a mesh axis reads a part.

    Call it inside shard_map.
    """
    total, part = jnp.uint32(0), jax.lax.axis_index(axis) if devices > 1 else 0
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + sum_of_terms(lax_bits(leaf), 0, part, devices)
    return jax.lax.psum(total, axis)


def fingerprint_of_slices(slices: Tree, axis: str) -> jax.Array:
    """Returns the `fingerprint` of a tree that is spread in slices [S/n, k] over a mesh axis.

    Zeros that pad the last slices do not count. Call it inside shard_map.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(slices):
        own = fingerprint(leaf, jax.lax.axis_index(axis) * leaf.size)
        total = total * jnp.uint32(31) + own
    return jax.lax.psum(total, axis)


@functools.partial(jax.jit, static_argnames='parts')  # traced once for all leaves of a shape
def sum_of_terms(
    bits: jax.Array, start: jax.Array | int, part: jax.Array | int = 0, parts: int = 1
) -> jax.Array:
    """Returns the sum uint32 of the terms in one of `parts` equal parts of bits uint32[N].

    Eight pieces of the part are added element by element before the rest is reduced. XLA's CPU
    backend writes all that it reduces to memory first: this way an eighth of it, in one pass.
    """
    pieces, size = 8, -(-bits.size // (8 * parts))

    @jax.jit  # traced and lowered once, not for each piece
    def terms(piece: jax.Array | int) -> jax.Array:
        first = (part * pieces + piece) * size
        begin = jnp.minimum(first, bits.size - size)  # the last pieces may be shorter, or empty
        position = begin + jnp.arange(size)
        values = weighted(jax.lax.dynamic_slice(bits, (begin,), (size,)), start + position)
        return jnp.where(position >= first, values, 0)

    return jnp.sum(sum(map(terms, range(1, pieces)), terms(0)), dtype=jnp.uint32)


def weighted(bits: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the term uint32[N] of each element, which also depends on its position."""
    mixed = (bits ^ (bits >> 16)) * jnp.uint32(0x9E3779B1)
    mixed = mixed ^ (mixed >> 15)
    return mixed * (2 * position.astype(jnp.uint32) + 1)


def lax_bits(leaf: jax.Array) -> jax.Array:
    """Returns the bits of an array as uint32[N]."""
    if leaf.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16).reshape(-1).astype(jnp.uint32)


def on_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array, wherever its parts are. All processes must call it."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))


def sha256_of(tree: Tree) -> str:
    """Returns the hex SHA-256 of a tree of arrays, computed on the host.

    It covers the leaves in tree order: path, dtype, shape and little-endian bytes of each.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(on_host(leaf))
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\n'.encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
