"""One training step and one evaluation step, on any number of devices.

Shapes: S shards, n devices, B global batch. A device works through its S/n consecutive shards one
after the other (which on one device is gradient accumulation), each with its own keys.

Gradient and update are two programs: joined, XLA would fuse the update into the gradient's tail
in a way that depends on the number of devices, and so would the last bit of the parameters.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from training import keys, reduction
from training.backend import COMPILER_OPTIONS
from training.fingerprint import fingerprint, shared_fingerprint
from training.layout import DATA, Layout
from training.state import TrainState

Batch = dict[str, jax.Array]  # every array [B, ...]
Sums = dict[str, jax.Array]  # float32[] sums over examples; 'loss' / 'weight' is what is minimised
LossSums = Callable[[Any, Batch, dict[str, jax.Array], jax.Array], Sums]  # (..., rngs, step)
EvalSums = Callable[[Any, Batch], Sums]


def row_columns(sum_names: tuple[str, ...]) -> dict[str, str]:
    """The words of a step's row, name -> NumPy type: finished step; fingerprints of the batch, of
    its dropout keys and of the parameters after it; gradient norm before clipping; the loss sums.
    """
    words = dict.fromkeys(('step', 'batch', 'keys', 'parameters'), '<u4')
    return words | dict.fromkeys(('grad_norm', *sorted(sum_names)), '<f4')


def make_train_step(
    loss_sums: LossSums,
    optimizer: optax.GradientTransformation,
    layout: Layout,
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """(state, global batch) -> (next state, row uint32[columns] as `row_columns` names them).

    The state's buffers are donated.
    """
    gradient, update = make_gradient(loss_sums, layout), make_update(optimizer, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        return update(state, *gradient(state.params, state.root_key, state.step, batch))

    return train_step


def make_gradient(
    loss_sums: LossSums, layout: Layout
) -> Callable[..., tuple[Any, Sums, jax.Array]]:
    """(params, root key, step, global batch) -> (summed gradient, sums, uint32[2] fingerprints)."""

    def loss(params: Any, *rest: Any) -> tuple[jax.Array, Sums]:
        sums = loss_sums(params, *rest)
        return sums['loss'], sums

    def device_gradient(
        params: Any, root: jax.Array, step: jax.Array, batch: Batch
    ) -> tuple[Any, Sums, jax.Array]:
        shards, first = own_shards(batch, layout.shards_per_device)

        def partial(shard: jax.Array) -> tuple[Any, Sums, jax.Array]:
            rows = shard_rows(shards, shard - first)
            rngs = keys.shard_rngs(root, step, shard)
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, rows, rngs, step)
            words = jax.random.key_data(rngs['dropout'])
            prints = [
                fingerprint(rows, shard * max(leaf.size for leaf in rows.values())),
                fingerprint(words, shard * words.size),
            ]
            return grads, sums, jnp.stack(prints)

        grads, sums, prints = reduction.sum_own_shards(partial, first, layout.shards_per_device)
        grads, sums = reduce_over_devices((grads, sums), layout)
        return grads, sums, lax.psum(prints, DATA)  # whole numbers add exactly in any order

    return on_mesh(device_gradient, layout, in_specs=(P(), P(), P(), P(DATA)), out_specs=P())


def make_update(
    optimizer: optax.GradientTransformation, layout: Layout
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """(state, summed gradient, sums, fingerprints) -> (next state, row). Donates the state.

    A step whose loss or gradient norm is not finite counts, and changes nothing else.
    """

    def update(
        state: TrainState, grads: Any, sums: Sums, prints: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        grads = jax.tree.map(lambda g: g / sums['weight'], grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums['loss'])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        step = state.step + 1
        floats = jnp.stack([norm, *(sums[name] for name in sorted(sums))])
        print_of_params = shared_fingerprint(params, DATA, layout.mesh.size)
        facts = jnp.stack([step.astype(jnp.uint32), *prints, print_of_params])
        row = jnp.concatenate([facts, lax.bitcast_convert_type(floats, jnp.uint32)])
        return state.replace(step=step, params=params, opt_state=opt_state), row

    return on_mesh(update, layout, in_specs=P(), out_specs=P(), donate=(0,))


def make_eval_step(eval_sums: EvalSums, layout: Layout) -> Callable[[Any, Batch], Sums]:
    """(params, global batch) -> sums over the batch. Draws no random number."""

    def device_sums(params: Any, batch: Batch) -> Sums:
        shards, first = own_shards(batch, layout.shards_per_device)

        def partial(shard: jax.Array) -> Sums:
            return eval_sums(params, shard_rows(shards, shard - first))

        sums = reduction.sum_own_shards(partial, first, layout.shards_per_device)
        return reduce_over_devices(sums, layout)

    return on_mesh(device_sums, layout, in_specs=(P(), P(DATA)), out_specs=P())


def own_shards(batch: Batch, count: int) -> tuple[Batch, jax.Array]:
    """A device's rows as `count` shards [count, B/S, ...], and the global index of the first."""
    shards = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return shards, lax.axis_index(DATA) * count


def shard_rows(shards: Batch, index: jax.Array) -> Batch:
    """The rows [B/S, ...] of one of a device's shards."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), shards)


def reduce_over_devices(tree: Any, layout: Layout) -> Any:
    """The sum over devices of a tree of float32 arrays, in one message per device and direction."""
    leaves, structure = jax.tree.flatten(tree)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    padding = jnp.zeros(reduction.padding(ends[-1], layout.mesh.size))
    vector, _ = ravel_pytree((leaves, padding))
    if layout.reduction == 'psum':
        vector = lax.psum(vector, DATA)
    else:
        vector = reduction.sum_devices(vector, DATA, layout.mesh.size)
    # Cut first, shaped after: else XLA on TPU gives the whole vector the shape of a leaf. As
    # [P/2, 2], in tiles of 128 columns, it takes 64 times its memory.
    parts = lax.optimization_barrier(jnp.split(vector, ends)[:-1])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def on_mesh(
    program: Callable[..., Any],
    layout: Layout,
    in_specs: Any,
    out_specs: Any,
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`program` on every device of the mesh, compiled alike for any number of them.

    check_vma=False: the program owns every collective. With the check on, shard_map itself would
    sum the gradients of replicated parameters, in an order of its own.
    """
    mapped = jax.shard_map(
        program, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate, compiler_options=COMPILER_OPTIONS)
