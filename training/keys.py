"""Every random number of a run, from one root key (key format v1).

    root   = jax.random.key(seed, impl=...)   made once; then the checkpoint's root key is the truth
    stream = fold_in(root, STREAM)            PARAMS, DROPOUT, SAMPLE, DATA
    step   = fold_in(stream, step)
    shard  = fold_in(step, shard)             shard = device index on the data axis
    module = Linen's make_rng folds the module path and a call counter into the shard key

The format is part of every checkpoint: streams are append-only and a golden test pins the bits.
The root key never advances, so (root key, step) is all that a resume needs. This is the only
module that derives keys; docs/keys.md tells why streams come before steps and why folds nest.
"""

import enum

import flax
import jax
import jax.numpy as jnp
import numpy as np

# Both decide every mask of a run, and the environment could change both: pin them here.
jax.config.update('jax_threefry_partitionable', True)
flax.config.update('flax_fix_rng_separator', True)

KEY_FORMAT = 1
MASK_FORMAT = 2  # what dropout draws: one to eight bits for each element


class Stream(enum.IntEnum):
    """What a key is for. Append only: a renumbered stream is another run."""

    PARAMS = 0
    DROPOUT = 1
    SAMPLE = 2
    DATA = 3


def root_key(seed: int, impl: str) -> jax.Array:
    """The key that decides the run, from 0 <= seed < 2**32 (beyond, two seeds give one key)."""
    return jax.random.key(seed, impl=impl)


def params_key(root: jax.Array) -> jax.Array:
    """The key that parameters are initialised from."""
    return jax.random.fold_in(root, Stream.PARAMS)


def shard_rngs(
    root: jax.Array, step: jax.Array | int, shard: jax.Array | int
) -> dict[str, jax.Array]:
    """Linen's `rngs` for one shard of one step: the streams 'dropout' and 'sample'."""

    def fold(stream: Stream) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, stream), step), shard)

    return {'dropout': fold(Stream.DROPOUT), 'sample': fold(Stream.SAMPLE)}


def epoch_words(root: jax.Array, epoch: int) -> np.ndarray:
    """The words of the key that orders an epoch's examples: uint32[2] (threefry), uint32[4] (rbg).

    They seed a NumPy bit generator, so the order needs no device and no JAX version.
    """
    data = jax.random.fold_in(root, Stream.DATA)
    return key_words(jax.random.fold_in(data, epoch))


def key_words(key: jax.Array) -> np.ndarray:
    """The bits of a key on the host, as uint32 words."""
    return np.asarray(jax.random.key_data(key))


def local_copy(key: jax.Array) -> jax.Array:
    """The same key on this process alone, where threads may use it without the other processes."""
    return jax.random.wrap_key_data(jnp.asarray(key_words(key)), impl=jax.random.key_impl(key))
