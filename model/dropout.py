"""Dropout that draws only as many random bits as its rate needs.

Most of the cost of dropout is drawing its masks, and JAX's own takes 32 bits for each element. Here
a rate is rounded to a multiple of 1/256, which is then the exact probability: 0.5 takes one bit,
0.25 two, and 0.1, rounded to 26/256 = 0.1016, eight.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

LEVELS = 256


class Dropout(nn.Module):
    """Zeroes elements, each with probability `rate` (rounded), and scales the others to compensate.

    Srivastava et al., 2014. Draws from the 'dropout' stream, unless deterministic or at rate 0.
    """

    rate: float

    @nn.compact
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """Returns an array of the inputs' shape and (floating) dtype."""
        if deterministic or not levels(self.rate):
            return inputs
        dropped = drop_mask(self.make_rng('dropout'), self.rate, inputs.shape)
        return jnp.where(dropped, 0, inputs * (LEVELS / (LEVELS - levels(self.rate))))


class WordDropout(nn.Module):
    """Replaces words by the unknown word, each with probability `rate`; none if deterministic.

    Ids below `first_word_id` (padding, sentence marks, unknown) are never replaced.
    """

    rate: float
    unk_id: int
    first_word_id: int

    @nn.compact
    def __call__(self, token_ids: jax.Array, *, deterministic: bool) -> jax.Array:
        """Returns int32[B, T]. token_ids: int32[B, T]."""
        if deterministic or not levels(self.rate):
            return token_ids
        dropped = drop_mask(self.make_rng('dropout'), self.rate, token_ids.shape)
        return jnp.where(dropped & (token_ids >= self.first_word_id), self.unk_id, token_ids)


def levels(rate: float) -> int:
    """Rounds a rate below 1 to n / 256 and returns n, 0 only for rate 0."""
    return min(max(round(rate * LEVELS), rate > 0), LEVELS - 1)


def drop_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draws bool[shape], each element True with probability levels(rate) / 256.

    Splits each 32-bit word into numbers of one to eight bits, low bits first, one per element.
    """
    size, exact = math.prod(shape), levels(rate)
    width = next(bits for bits in (1, 2, 4, 8) if exact * 2**bits % LEVELS == 0)
    words = jax.random.bits(key, (-(-size * width // 32),), jnp.uint32)
    words = jax.lax.optimization_barrier(words)  # else XLA may recompute a word per element
    numbers = (words[:, None] >> jnp.arange(0, 32, width, dtype=jnp.uint32)) & (2**width - 1)
    return (numbers.reshape(-1)[:size] < exact * 2**width // LEVELS).reshape(shape)
