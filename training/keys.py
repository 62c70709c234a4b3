"""Every random number of a run, from one root key (key format v1).

    root   = jax.random.key(seed, dtype=impl) created once; a resume reads it from the checkpoint
                                              (one per stream; all the same unless `seeds` differ)
    stream = fold_in(root, STREAM)            PARAMS, DROPOUT, SAMPLE, DATA
    step   = fold_in(stream, step)            step = number of finished steps
    shard  = fold_in(step, shard)             shard = 0 .. num_shards - 1, on whatever device it is
    module = Linen's make_rng folds the module path and a call counter into the shard key

Initialization uses the PARAMS stream itself, and the DATA stream folds in the epoch instead of step
and shard. The format is part of every checkpoint: streams are append-only, and a golden test pins
the bits. The root keys never advance, so all randomness follows from (root keys, step). Only this
module and Linen derive keys; docs/keys.md explains the order of the folds.
"""

import enum
from collections.abc import Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

# Both settings decide every mask, and environment variables could change them: fix them here.
if hasattr(jax.config, 'jax_threefry_partitionable'):  # a JAX without the option always does this
    jax.config.update('jax_threefry_partitionable', True)
flax.config.update('flax_fix_rng_separator', True)

KEY_FORMAT = 1
MASK_FORMAT = 2  # how masks are drawn from a key: one to eight bits per element


class Stream(enum.IntEnum):
    """What a key is for. Append only: renumbering a stream changes every run."""

    PARAMS = 0
    DROPOUT = 1
    SAMPLE = 2
    DATA = 3


class RootKeys(NamedTuple):
    """Holds the root key of every stream, typed key[] each, in the order of `Stream`."""

    params: jax.Array
    dropout: jax.Array
    sample: jax.Array
    data: jax.Array


def root_keys(seed: int, impl: str, seeds: Mapping[str, int] | None = None) -> RootKeys:
    """Makes the root keys of a new run from 0 <= seed < 2**32.

    `seeds` maps a stream to its own seed; -1 means `seed`.
    """
    own = [(seeds or {}).get(stream, -1) for stream in RootKeys._fields]
    # `dtype`, since newer versions of JAX deprecate `impl`.
    return RootKeys(*(jax.random.key(seed if n == -1 else n, dtype=impl) for n in own))


def stream_key(roots: RootKeys, stream: Stream) -> jax.Array:
    """Derives the key of a stream; that of PARAMS initializes the parameters."""
    return jax.random.fold_in(roots[stream], stream)


def shard_rngs(
    roots: RootKeys, step: jax.Array | int, shard: jax.Array | int
) -> dict[str, jax.Array]:
    """Derives Linen's `rngs` for one shard of one step: the streams 'dropout' and 'sample'."""

    def fold(stream: Stream) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(stream_key(roots, stream), step), shard)

    return {'dropout': fold(Stream.DROPOUT), 'sample': fold(Stream.SAMPLE)}


def epoch_seed(roots: RootKeys, epoch: int) -> np.ndarray:
    """Derives the key of an epoch's order, as words: uint32[2] (threefry) or uint32[4] (rbg).

    They seed a NumPy bit generator, so the order depends on no device and no JAX version.
    """
    return key_words(jax.random.fold_in(stream_key(roots, Stream.DATA), epoch))


def key_words(key: jax.Array) -> np.ndarray:
    """Returns the bits of a key on the host, as uint32 words."""
    return np.asarray(jax.random.key_data(key))


def local_copy(roots: RootKeys) -> RootKeys:
    """Copies the root keys to process-local arrays, which loader threads can use on their own."""

    def copy(key: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(jnp.asarray(key_words(key)), impl=jax.random.key_impl(key))

    return RootKeys(*map(copy, roots))
