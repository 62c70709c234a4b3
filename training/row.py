"""Packs a step's row of the ledger, as exact bits."""

import jax
import jax.numpy as jnp
from jax import lax

from arrays import Sums


def row_columns(sum_names: tuple[str, ...]) -> dict[str, str]:
    """Returns the columns of a row, name -> NumPy type.

    They are the number of finished steps, the fingerprints of the batch, of its dropout keys and of
    the parameters after the step, the gradient norm before clipping, and the loss sums.
    """
    words = dict.fromkeys(('step', 'batch', 'keys', 'parameters'), '<u4')
    return words | dict.fromkeys(('grad_norm', *sorted(sum_names)), '<f4')


def make_row(
    step: jax.Array, fingerprints: list[jax.Array], norm: jax.Array, sums: Sums
) -> jax.Array:
    """Packs a row uint32[columns], in the order of `row_columns`."""
    floats = jnp.stack([norm, *(sums[name] for name in sorted(sums))])
    words = jnp.stack([step.astype(jnp.uint32), *fingerprints])
    return jnp.concatenate([words, lax.bitcast_convert_type(floats, jnp.uint32)])
