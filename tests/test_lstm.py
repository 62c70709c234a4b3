"""The promises of model/lstm.py: what flax's own LSTM computes, from the same parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.recurrence import Plain
from model.lstm import BidirectionalLSTM

ROWS, WIDTH, INPUT, HIDDEN = 5, 9, 7, 8
LENGTHS = jnp.array([1, 2, 5, 8, WIDTH])


def outputs_and_gradients(model: nn.Module, params: Any, words: jax.Array) -> Any:
    """Of a weighted sum over what stands before the padding."""
    weights = jax.random.normal(jax.random.key(2), (ROWS, WIDTH, 2 * HIDDEN))
    real = (jnp.arange(WIDTH) < LENGTHS[:, None])[..., None]

    def total(params: Any, words: jax.Array) -> Any:
        outputs = jnp.asarray(model.apply({'params': params}, words, LENGTHS))
        outputs = jnp.where(real, outputs.astype(jnp.float32), 0)
        return jnp.sum(outputs * weights), outputs

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, outputs), gradients = gradient(params, words)
    return outputs, *gradients


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize(('dtype', 'rounding'), [('float32', 2e-6), ('bfloat16', 0.04)])
def test_outputs_and_gradients_are_those_of_flax_to_rounding(
    remat: bool, dtype: str, rounding: float
) -> None:
    words = jax.random.normal(jax.random.key(0), (ROWS, WIDTH, INPUT))
    plain = Plain(HIDDEN)
    params = plain.init(jax.random.key(1), words, LENGTHS)['params']
    bias = params['forward']['hf']['bias']
    params['forward']['hf']['bias'] = bias + jnp.linspace(-1, 1, HIDDEN)  # they start at zero
    expected = outputs_and_gradients(plain, params, words)
    model = BidirectionalLSTM(HIDDEN, jnp.dtype(dtype), remat)
    found = outputs_and_gradients(model, params, words)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=rounding * np.abs(y).max())


def test_parameters_start_as_those_of_flax_do() -> None:
    words = jnp.zeros((ROWS, WIDTH, INPUT))
    found = BidirectionalLSTM(HIDDEN).init(jax.random.key(1), words, LENGTHS)
    expected = Plain(HIDDEN).init(jax.random.key(1), words, LENGTHS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
