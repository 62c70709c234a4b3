"""Every random number of a run, from one root key (key format v1).

    root   = jax.random.key(seed, impl=...)   created once; a resume reads it from the checkpoint
    stream = fold_in(root, STREAM)            PARAMS, DROPOUT, SAMPLE, DATA
    step   = fold_in(stream, step)
    shard  = fold_in(step, shard)             shard = device index on the data axis
    module = Linen's make_rng folds the module path and a call counter into the shard key

Initialisation uses the PARAMS stream itself, and the DATA stream folds in the epoch instead of step
and shard. The format is part of every checkpoint: streams are append-only, and a golden test pins
the bits. The root key never advances, so all randomness follows from (root key, step). This is the
only module that derives keys; docs/keys.md explains the order of the folds.
"""

import enum

import flax
import jax
import jax.numpy as jnp
import numpy as np

# Both settings decide every mask, and environment variables could change them: fix them here.
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


def root_key(seed: int, impl: str) -> jax.Array:
    """Makes the root key of a new run; 0 <= seed < 2**32, beyond which seeds share keys."""
    return jax.random.key(seed, impl=impl)


def params_key(root: jax.Array) -> jax.Array:
    """Derives the key that parameters are initialised from."""
    return jax.random.fold_in(root, Stream.PARAMS)


def shard_rngs(
    root: jax.Array, step: jax.Array | int, shard: jax.Array | int
) -> dict[str, jax.Array]:
    """Derives Linen's `rngs` for one shard of one step: the streams 'dropout' and 'sample'."""

    def fold(stream: Stream) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, stream), step), shard)

    return {'dropout': fold(Stream.DROPOUT), 'sample': fold(Stream.SAMPLE)}


def epoch_words(root: jax.Array, epoch: int) -> np.ndarray:
    """Derives the key of an epoch's order, as words: uint32[2] (threefry) or uint32[4] (rbg).

    They seed a NumPy bit generator, so the order depends on no device and no JAX version.
    """
    data = jax.random.fold_in(root, Stream.DATA)
    return key_words(jax.random.fold_in(data, epoch))


def key_words(key: jax.Array) -> np.ndarray:
    """Returns the bits of a key on the host, as uint32 words."""
    return np.asarray(jax.random.key_data(key))


def local_copy(key: jax.Array) -> jax.Array:
    """Copies a key to this process alone, so that loader threads can use it by themselves."""
    return jax.random.wrap_key_data(jnp.asarray(key_words(key)), impl=jax.random.key_impl(key))
