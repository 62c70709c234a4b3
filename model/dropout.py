"""Dropout that asks the generator for eight random bits an element, not thirty-two.

Drawing the masks is what dropout costs. A rate is rounded to a multiple of 1/256, which is then the
exact probability: 0.5 and 0.25 stay what they are, 0.1 becomes 26/256 = 0.1016.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

LEVELS = 256


class Dropout(nn.Module):
    """Zeroes elements, each with probability `rate`, and scales the others up to make up for it.

    Srivastava et al., 2014. Draws from the 'dropout' stream, unless deterministic or at rate 0.
    """

    rate: float

    @nn.compact
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """inputs: any shape and dtype -> the same."""
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
        """token_ids: int32[B, T] -> int32[B, T]."""
        if deterministic or not levels(self.rate):
            return token_ids
        dropped = drop_mask(self.make_rng('dropout'), self.rate, token_ids.shape)
        return jnp.where(dropped & (token_ids >= self.first_word_id), self.unk_id, token_ids)


def levels(rate: float) -> int:
    """A rate 0 <= rate < 1 in 1/256, rounded; only a rate of 0 becomes none of them."""
    return min(max(round(rate * LEVELS), rate > 0), LEVELS - 1)


def drop_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool[shape], each element True with probability levels(rate) / 256, from a key's raw bits."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 4),), jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:size]
    return (numbers < levels(rate)).reshape(shape)
