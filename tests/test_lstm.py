"""The promises of model/lstm.py: what flax's own LSTM computes, from the same parameters."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.recurrence import Plain
from model.lstm import BidirectionalLSTM
from tests.parameters import random_params

ROWS, WIDTH, INPUT, HIDDEN = 5, 9, 7, 8
LENGTHS = np.array([1, 2, 5, 8, WIDTH])


def normal(seed: int, *shape: int) -> np.ndarray:
    """Random numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache  # flax's are the same in every case
def outputs_and_gradients(model: nn.Module) -> Any:
    """Of a weighted sum over what stands before the padding."""
    words, weights = normal(0, ROWS, WIDTH, INPUT), normal(2, ROWS, WIDTH, 2 * HIDDEN)
    params = random_params(lambda key: Plain(HIDDEN).init(key, words, LENGTHS)['params'])
    # Biases start at zero, where a wrong gradient could hide.
    params['forward']['hf']['bias'] = np.linspace(-1, 1, HIDDEN, dtype=np.float32)
    real = (np.arange(WIDTH) < LENGTHS[:, None])[..., None]

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
    expected = outputs_and_gradients(Plain(HIDDEN))
    found = outputs_and_gradients(BidirectionalLSTM(HIDDEN, jnp.dtype(dtype), remat))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=rounding * np.abs(y).max())


def test_parameters_start_as_those_of_flax_do() -> None:
    words = np.zeros((ROWS, WIDTH, INPUT), np.float32)

    @jax.jit  # in one program, which compiles equal draws of equal keys once
    def init(key: jax.Array) -> list[Any]:
        return [m.init(key, words, LENGTHS) for m in (BidirectionalLSTM(HIDDEN), Plain(HIDDEN))]

    jax.tree.map(np.testing.assert_array_equal, *init(jax.random.key(1)))
