"""All that changes during a run, and the one key that does not."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from training import fingerprint, keys, zero
from training.mesh import COMPILER_OPTIONS, Layout


class TrainState(flax.struct.PyTreeNode):
    """Passed into a step and out of it; a checkpoint holds exactly this."""

    step: jax.Array  # int32[], finished steps
    params: Any
    opt_state: optax.OptState  # of the whole leaves, or of their slices (training/zero.py)
    root_key: jax.Array  # typed key[]; never advances, step and shard are folded into it


def make_create_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, layout: Layout
) -> Callable[[jax.Array], TrainState]:
    """root key -> the state before the first step, on the mesh."""

    def create_state(root_key: jax.Array) -> TrainState:
        params = init(keys.params_key(root_key))
        if layout.shard_state:
            opt_state = jax.vmap(optimizer.init)(zero.to_slices(params, layout.num_shards))
        else:
            opt_state = optimizer.init(params)
        return TrainState(jnp.int32(0), params, opt_state, root_key)

    return jax.jit(
        create_state,
        out_shardings=placed(layout, layout.replicated, layout.sharded),
        compiler_options=COMPILER_OPTIONS,
    )


def placed(layout: Layout, everywhere: Any, by_shard: Any) -> Any:
    """For each part of a state one of two ways to be on the mesh."""
    opt_state = by_shard if layout.shard_state else everywhere
    return TrainState(everywhere, everywhere, opt_state, everywhere)


def abstract_state(
    create_state: Callable[[jax.Array], TrainState], prng_impl: str, layout: Layout
) -> TrainState:
    """Shapes, dtypes and shardings of a state: what a checkpoint is read into."""
    state = jax.eval_shape(create_state, keys.root_key(0, prng_impl))
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        ),
        placed(layout, layout.replicated, layout.sharded),
        state,
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
