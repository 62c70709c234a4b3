"""Compares our bidirectional LSTM and its gradient with flax's, and with hoisted projections."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.common import Row, config, in_turn, ratio
from model import lstm
from runtime import backend
from tasks.classification import ModelConfig
from training import keys

ROWS, ROUNDS = 64, 15
LENGTHS = (8, 16, 32, 64)


class Plain(nn.Module):
    """Runs flax's cell in nn.RNN, with the parameters of model/lstm.py."""

    hidden_size: int

    @nn.compact
    def __call__(self, words: jax.Array, lengths: jax.Array) -> jax.Array:
        """words: float32[B, T, E], lengths: int32[B] -> float32[B, T, 2H]."""
        forward, backward = (
            nn.RNN(nn.OptimizedLSTMCell(self.hidden_size, name=name))
            for name in ('forward', 'backward')
        )
        return jnp.asarray(nn.Bidirectional(forward, backward)(words, seq_lengths=lengths))


def hoisted(unroll: int) -> Callable[..., jax.Array]:
    """Returns an `lstm.lstm` that JAX differentiates, with input projections outside the scan."""

    def read(_: bool, inputs: jax.Array, weights: lstm.Weights) -> jax.Array:
        input_kernel, recurrent_kernel, bias = weights

        def step(carry: tuple[jax.Array, jax.Array], projected: jax.Array) -> Any:
            c, h = carry
            i, f, g, o = lstm.activated(projected + h @ recurrent_kernel)
            c = f * c + i * g
            h = o * jnp.tanh(c)
            return (c, h), h

        zero = jnp.zeros((inputs.shape[1], recurrent_kernel.shape[0]))
        return jax.lax.scan(step, (zero, zero), inputs @ input_kernel + bias, unroll=unroll)[1]

    return read


def measure() -> list[Row]:
    """Measures times relative to flax's LSTM, at each length."""
    options = config().model
    assert isinstance(options, ModelConfig)
    backend.prepare()
    rows: list[Row] = []
    for length in LENGTHS:
        words = jax.random.normal(
            keys.root_keys(0, 'threefry2x32').params, (ROWS, length, options.embedding_size)
        )
        lengths = jnp.arange(ROWS) % (length // 2) + length // 2 + 1
        plain = Plain(options.hidden_size)
        variables = plain.init(keys.root_keys(1, 'threefry2x32').params, words, lengths)
        ours = lstm.BidirectionalLSTM(options.hidden_size)
        variants = {"flax's": timed(plain, variables, words, lengths)}
        variants['ours'] = timed(ours, variables, words, lengths)
        for unroll in (1, 4):
            variants[f'hoisted, unroll {unroll}'] = timed(
                ours, variables, words, lengths, hoisted(unroll)
            )
        seconds = in_turn(variants, ROUNDS)
        rows += [
            (f'{length} words: {name} over flax', ratio(seconds[name], seconds["flax's"]), '')
            for name in list(variants)[1:]
        ]
    return rows


def timed(
    model: nn.Module,
    variables: Any,
    words: jax.Array,
    lengths: jax.Array,
    read: Callable[..., jax.Array] = lstm.lstm,
) -> Callable[[], Any]:
    """Returns a function that computes the gradients of parameters and words with a recurrence."""

    def total(variables: Any, words: jax.Array) -> jax.Array:
        return jnp.sum(jnp.asarray(model.apply(variables, words, lengths)) ** 2)

    kept, lstm.lstm = lstm.lstm, read  # type: ignore[assignment]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1))).lower(variables, words).compile()
    lstm.lstm = kept
    return lambda: jax.block_until_ready(gradient(variables, words))
