"""The promises of model/dropout.py: what is dropped how often, and what that leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.dropout import Dropout, drop_mask, levels

DROPOUT = {'dropout': jax.random.key(0)}


@pytest.mark.parametrize(
    ('rate', 'exact'), [(0.0, 0), (1e-9, 1), (0.1, 26), (0.25, 64), (0.5, 128), (0.9999, 255)]
)
def test_a_rate_is_a_number_of_256ths_and_none_of_them_only_at_zero(
    rate: float, exact: int
) -> None:
    assert levels(rate) == exact


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_elements_are_dropped_as_often_as_the_exact_rate_says(rate: float) -> None:
    count = 2**20
    dropped = float(drop_mask(jax.random.key(1), rate, (count,)).sum())
    expected = levels(rate) / 256
    assert abs(dropped / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize(('rate', 'width'), [(0.5, 1), (0.25, 2), (0.1875, 4), (0.1, 8)])
def test_masks_are_the_bits_of_the_key_in_order_whatever_the_shape(rate: float, width: int) -> None:
    count = 37
    words = np.asarray(jax.random.bits(jax.random.key(2), (-(-count * width // 32),), jnp.uint32))
    bits = ''.join(f'{word:032b}'[::-1] for word in words.tolist())  # low bits first
    numbers = [int(bits[at : at + width][::-1], 2) for at in range(0, count * width, width)]
    expected = np.array(numbers) < levels(rate) / 256 * 2**width
    for shape in ((count,), (count, 1), (1, count)):
        found = np.asarray(drop_mask(jax.random.key(2), rate, shape))
        np.testing.assert_array_equal(found, expected.reshape(shape))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_stays_is_scaled_so_that_the_mean_stays(dtype: str) -> None:
    ones = jnp.ones((64, 1024), dtype)
    found = Dropout(0.25).apply({}, ones, deterministic=False, rngs=DROPOUT)
    assert isinstance(found, jax.Array)
    assert found.dtype == ones.dtype
    assert set(np.unique(np.asarray(found, np.float32))) == {0, np.float32(ones.dtype.type(4 / 3))}


def test_nothing_is_drawn_in_evaluation_or_at_rate_zero() -> None:
    ones = jnp.ones(7)
    assert Dropout(0.5).apply({}, ones, deterministic=True) is ones
    assert Dropout(0.0).apply({}, ones, deterministic=False) is ones
