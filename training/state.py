"""The state of a run: everything that changes from step to step, and the root keys."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from arrays import Tree
from training import fingerprint, keys, zero
from training.mesh import COMPILER_OPTIONS, Layout


class TrainState(flax.struct.PyTreeNode):
    """Holds what a step takes and returns: the `state` item of a checkpoint."""

    step: jax.Array  # int32[], finished steps
    params: Tree
    opt_state: optax.OptState  # for whole parameters, or for slices of them (training/zero.py)
    root_keys: keys.RootKeys  # never advance: step and shard are folded into them


def make_create_state(
    init: Callable[[jax.Array], Tree], optimizer: optax.GradientTransformation, layout: Layout
) -> Callable[[keys.RootKeys], TrainState]:
    """Returns the function root keys -> state before the first step, on the mesh."""

    def create_state(root_keys: keys.RootKeys) -> TrainState:
        params = init(keys.stream_key(root_keys, keys.Stream.PARAMS))
        trained, _ = layout.split(params)
        if layout.shard_state:
            opt_state = jax.vmap(optimizer.init)(zero.to_slices(trained, layout.num_shards))
        else:
            opt_state = optimizer.init(trained)
        return TrainState(jnp.int32(0), params, opt_state, root_keys)

    whole: Tree = layout.replicated
    shardings = TrainState(whole, whole, layout.sharded if layout.shard_state else whole, whole)
    return jax.jit(create_state, out_shardings=shardings, compiler_options=COMPILER_OPTIONS)


def abstract_state(
    create_state: Callable[[keys.RootKeys], TrainState], prng_impl: str
) -> TrainState:
    """Returns shapes, dtypes and shardings of a state: the target of a restore."""
    state: TrainState = jax.eval_shape(create_state, keys.root_keys(0, prng_impl))
    return state


def state_fingerprint(state: TrainState) -> str:
    """Returns the hex SHA-256 of step, params and opt_state; `root_key_hex` covers the rest."""
    return fingerprint.sha256_of((state.step, state.params, state.opt_state))


def root_key_hex(state: TrainState) -> str:
    """Returns the root key in hex, or all four, joined by '-', if they differ."""
    words = map(keys.key_words, state.root_keys)
    roots = [''.join(f'{word:08x}' for word in key) for key in words]
    return '-'.join(roots if len(set(roots)) > 1 else roots[:1])


def structure(state: TrainState) -> dict[str, str]:
    """Returns path -> dtype and shape of every array, which tells models apart."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in leaves}
