"""Parameters of models, for tests of what a model computes and not of how it starts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_params(init: Callable[[jax.Array], Any]) -> Any:
    """Returns the parameters of `init`, with matrices drawn by NumPy in place of JAX.

    XLA takes longer to compile JAX's draws for a small model than the model itself.
    """
    rng = np.random.default_rng(0)

    def start(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim > 1:
            return jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), leaf.dtype)
        is_scale = path[-1].key == 'scale'  # of a LayerNorm; every other vector is a bias
        return jnp.asarray(np.full(leaf.shape, is_scale), leaf.dtype)

    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(start, shapes)
