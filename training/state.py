"""All that changes during a run, and the one key that does not."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from training import backend, fingerprint, keys
from training.layout import Layout


class TrainState(flax.struct.PyTreeNode):
    """Passed into a step and out of it; a checkpoint holds exactly this."""

    step: jax.Array  # int32[], finished steps
    params: Any
    opt_state: optax.OptState
    root_key: jax.Array  # typed key[]; never advances, step and shard are folded into it


def make_create_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, layout: Layout
) -> Callable[[jax.Array], TrainState]:
    """root key -> the state before the first step, replicated on the mesh."""

    def create_state(root_key: jax.Array) -> TrainState:
        params = init(keys.params_key(root_key))
        return TrainState(jnp.int32(0), params, optimizer.init(params), root_key)

    return jax.jit(
        create_state,
        out_shardings=layout.replicated,
        compiler_options=backend.COMPILER_OPTIONS,
    )


def state_fingerprint(state: TrainState) -> str:
    """Hex SHA-256 over step, params, opt_state, in this order; the root key stands beside it."""
    return fingerprint.sha256_of((state.step, state.params, state.opt_state))


def root_key_hex(state: TrainState) -> str:
    """The root key's words, as one hexadecimal number."""
    return ''.join(f'{word:08x}' for word in keys.key_words(state.root_key).tolist())


def structure(state: TrainState) -> dict[str, str]:
    """Path -> dtype and shape of every array, to tell another model from a damaged file."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in leaves}
