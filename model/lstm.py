"""A bidirectional LSTM that adds up the gradient of its weights once, not again at every word.

Parameters, their start and results (to rounding) are those of `nn.RNN(nn.OptimizedLSTMCell)`.
Differentiating its scan reads and writes a gradient of all weights at every step. Here the scan of
the backward pass hands out the gradients of the gates alone, and one product over all words turns
them into that of the weights. What it saves: docs/performance.md.

Shapes: B batch, T time (words, padded), E input size, H hidden size.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

GATES = 'ifgo'  # input, forget, candidate, output: their order in the fused weights
Weights = tuple[jax.Array, jax.Array, jax.Array]  # of inputs [E, 4H], of h [H, 4H], bias [4H]


class BidirectionalLSTM(nn.Module):
    """Each row is read from its start, and from its true end; both readings side by side."""

    hidden_size: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False  # keep c and h alone for the backward pass, no gates

    @nn.compact
    def __call__(self, words: jax.Array, lengths: jax.Array) -> jax.Array:
        """words: [B, T, E], lengths: int32[B] -> dtype[B, T, 2H]; anything where padding is."""
        words = words.astype(self.dtype)
        read = functools.partial(lstm, self.remat)
        forward = read(words.swapaxes(0, 1), self.weights('forward', words)).swapaxes(0, 1)
        reversed_words = reverse_sequences(words, lengths).swapaxes(0, 1)
        backward = read(reversed_words, self.weights('backward', words)).swapaxes(0, 1)
        return jnp.concatenate([forward, reverse_sequences(backward, lengths)], axis=-1)

    def weights(self, name: str, words: jax.Array) -> Weights:
        """Those of a plain cell, which makes them, fused over the gates."""
        cell = nn.OptimizedLSTMCell(self.hidden_size, name=name)
        if self.is_initializing():
            zero = jnp.zeros((words.shape[0], self.hidden_size))
            cell((zero, zero), words[:, 0])
        of = cell.variables['params']

        def fused(side: str, kind: str) -> jax.Array:
            return jnp.concatenate([of[side + gate][kind] for gate in GATES], -1).astype(self.dtype)

        return fused('i', 'kernel'), fused('h', 'kernel'), fused('h', 'bias')


@jax.custom_vjp
def reverse_sequences(rows: jax.Array, lengths: jax.Array) -> jax.Array:
    """rows: [B, T, D] -> the same, the first lengths[b] entries of row b in reverse.

    Done twice it is nothing, so its derivative is itself: a gather, and no scatter that adds.
    """
    width = rows.shape[1]
    backwards = (lengths[:, None] - 1 - jnp.arange(width)) % width
    return jnp.take_along_axis(rows, backwards[..., None], axis=1)


reverse_sequences.defvjp(
    lambda rows, lengths: (reverse_sequences(rows, lengths), lengths),
    lambda lengths, d_rows: (reverse_sequences(d_rows, lengths), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lstm(remat: bool, inputs: jax.Array, weights: Weights) -> jax.Array:
    """inputs: dtype[T, B, E] -> dtype[T, B, H], h after each input. c is float32 throughout.

    Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000.
    """
    return lstm_forward(remat, inputs, weights)[0]


def lstm_forward(remat: bool, inputs: jax.Array, weights: Weights) -> tuple[jax.Array, Any]:
    """The outputs, and what the backward pass needs."""
    input_kernel, recurrent_kernel, bias = weights

    def step(carry: tuple[jax.Array, jax.Array], projected: jax.Array) -> Any:
        c, h = carry
        i, f, g, o = gates = activated(projected + h @ recurrent_kernel)
        c = f * c + i * g
        h = (o * jnp.tanh(c)).astype(h.dtype)
        return (c, h), (c, h, None if remat else gates)

    h = jnp.zeros((inputs.shape[1], recurrent_kernel.shape[0]), inputs.dtype)
    _, (c, h, gates) = jax.lax.scan(step, (h.astype(jnp.float32), h), inputs @ input_kernel + bias)
    return h, (inputs, weights, c, h, gates)


def lstm_backward(remat: bool, saved: Any, d_outputs: jax.Array) -> tuple[jax.Array, Weights]:
    """d_outputs: dtype[T, B, H] -> gradients of inputs and weights."""
    inputs, weights, c, h, gates = saved
    input_kernel, recurrent_kernel, bias = weights
    h_before = before(h)

    def step(carry: tuple[jax.Array, jax.Array], at: Any) -> Any:
        dh, dc = carry
        d_output, c, c_before, gates_or_inputs = at
        if remat:
            word, h = gates_or_inputs
            gates_or_inputs = activated(word @ input_kernel + bias + h @ recurrent_kernel)
        i, f, g, o = gates_or_inputs
        dh = dh + d_output
        tanh_c = jnp.tanh(c)
        dc = dc + dh * o * (1 - tanh_c**2)
        d_gates = (
            dc * g * i * (1 - i),
            dc * c_before * f * (1 - f),
            dc * i * (1 - g**2),
            dh * tanh_c * o * (1 - o),
        )
        d_fused = jnp.concatenate(d_gates, axis=-1).astype(recurrent_kernel.dtype)
        return (d_fused @ recurrent_kernel.T, dc * f), d_fused

    zero = jnp.zeros_like(h[0])
    start = (zero, zero.astype(jnp.float32))
    along = (d_outputs, c, before(c), (inputs, h_before) if remat else gates)
    _, d_fused = jax.lax.scan(step, start, along, reverse=True)
    over_words = functools.partial(jnp.einsum, 'tbi,tbj->ij')
    return d_fused @ input_kernel.T, (
        over_words(inputs, d_fused),
        over_words(h_before, d_fused),
        d_fused.sum(axis=(0, 1)),
    )


lstm.defvjp(lstm_forward, lstm_backward)


def activated(fused: jax.Array) -> tuple[jax.Array, ...]:
    """[B, 4H] -> the four gates, each [B, H]."""
    i, f, g, o = jnp.split(fused, len(GATES), axis=-1)
    return nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)


def before(states: jax.Array) -> jax.Array:
    """[T, B, H], states after each input -> those before it; at first they are zero."""
    return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])
