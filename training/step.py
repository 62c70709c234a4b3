"""One training step and one evaluation step, on any number of devices.

Shapes: S shards, n devices, B global batch. A device processes its S/n consecutive shards in
sequence, each with its own keys. On one device this is gradient accumulation.

Gradient and update are separate programs. In one program XLA would fuse the update into the end of
the gradient, differently for each number of devices, and the last bits of the parameters would
differ. For the same reason a shard's gradient is compiled alone, looped or not.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from arrays import Batch, Rngs, Sums, Tree
from training import keys, reduction, zero
from training.fingerprint import fingerprint, shared_fingerprint
from training.mesh import AXIS, Layout, jit_on_mesh
from training.optimizer import gradient_scale, norm_and_finite, sum_of_squares, update_if
from training.row import make_row
from training.state import TrainState

LossSums = Callable[[Tree, Batch, Rngs, jax.Array], Sums]  # (..., step)
EvalSums = Callable[[Tree, Batch], Sums]


def make_train_step(
    loss_sums: LossSums, optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Returns the function (state, global batch) -> (next state, row uint32[columns]).

    It donates the buffers of the state. training/row.py names the columns.
    """
    gradient = make_gradient(loss_sums, layout)
    update = make_update(optimizer, clip_norm, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        return update(state, *gradient(state.params, state.root_keys, state.step, batch))

    return train_step


def make_gradient(
    loss_sums: LossSums, layout: Layout
) -> Callable[..., tuple[Tree, Sums, jax.Array]]:
    """Returns (params, root keys, step, global batch) -> (summed gradient, sums, fingerprints).

    `fingerprints` is uint32[2]: batch, dropout keys. With ZeRO-1 each device gets only its slices
    of the gradient.
    """

    def loss(
        trained: Tree, frozen: Tree, rows: Batch, rngs: Rngs, step: jax.Array
    ) -> tuple[jax.Array, Sums]:
        sums = loss_sums(trained | frozen, rows, rngs, step)
        return sums['loss'], sums

    def device_gradient(
        params: Tree, roots: keys.RootKeys, step: jax.Array, batch: Batch
    ) -> tuple[Tree, Sums, jax.Array]:
        shards, first = local_shards(batch, layout.shards_per_device)

        def shard_gradient(shard: jax.Array) -> tuple[Tree, Sums, jax.Array]:
            rows = reduction.select_shard(shards, shard - first)
            rngs = keys.shard_rngs(roots, step, shard)
            trained, frozen = layout.split(params)
            differentiate = jax.value_and_grad(loss, has_aux=True)
            (_, sums), grads = compiled_alone(
                differentiate, step >= 0, trained, frozen, rows, rngs, step
            )
            words = jax.random.key_data(rngs['dropout'])
            fingerprints = [  # by position in the global batch, so exchanged shards would show
                fingerprint(rows, shard * max(leaf.size for leaf in rows.values())),
                fingerprint(words, shard * words.size),
            ]
            return grads, sums, jnp.stack(fingerprints)

        grads, sums, fingerprints = reduction.tree_sum_local(
            shard_gradient, first, layout.shards_per_device
        )
        if layout.shard_state:
            grads = zero.scattered_sum(grads, layout)
            return grads, *reduce_scalars(sums, fingerprints, layout)
        grads, sums = reduce_over_devices((grads, sums), layout)
        return grads, sums, lax.psum(fingerprints, AXIS)  # integers: any order is exact

    grads_spec = P(AXIS) if layout.shard_state else P()
    in_specs = (P(), P(), P(), P(AXIS))
    return jit_on_mesh(device_gradient, layout, in_specs, out_specs=(grads_spec, P(), P()))


def make_update(
    optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Returns (state, summed gradient, sums, fingerprints) -> (next state, row).

    It donates the state. A step whose loss or gradient norm is not finite changes only `step`.
    """
    if layout.shard_state:
        return zero.make_sliced_update(optimizer, clip_norm, layout)

    def update(
        state: TrainState, grads: Tree, sums: Sums, fingerprints: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        norm, finite = norm_and_finite(sum_of_squares(grads), sums)
        scale = gradient_scale(sums['weight'], norm, clip_norm)
        trained, frozen = layout.split(state.params)
        trained, opt_state = update_if(finite, optimizer, grads, scale, state.opt_state, trained)
        params = trained | frozen
        step = state.step + 1
        after = shared_fingerprint(params, AXIS, layout.mesh.size)
        row = make_row(step, [*fingerprints, after], norm, sums)
        return state.replace(step=step, params=params, opt_state=opt_state), row

    return jit_on_mesh(update, layout, in_specs=P(), out_specs=P(), donate=(0,))


def make_eval_step(eval_sums: EvalSums, layout: Layout) -> Callable[[Tree, Batch], Sums]:
    """Returns (params, global batch) -> sums over the batch. It draws no random number."""

    def device_sums(params: Tree, batch: Batch) -> Sums:
        shards, first = local_shards(batch, layout.shards_per_device)

        def shard_sums(shard: jax.Array) -> Sums:
            rows = reduction.select_shard(shards, shard - first)
            return compiled_alone(eval_sums, ~(rows['weights'][0] < 0), params, rows)

        sums = reduction.tree_sum_local(shard_sums, first, layout.shards_per_device)
        return reduce_scalars(sums, jnp.zeros(0, jnp.uint32), layout)[0]

    return jit_on_mesh(device_sums, layout, in_specs=(P(), P(AXIS)), out_specs=P())


def compiled_alone(program: Callable[..., Tree], always: jax.Array, *args: Tree) -> Tree:
    """Returns program(*args), compiled so that nothing around it is fused in.

    Only a device with several shards loops over them. Without the branch, XLA fuses loop and no
    loop differently, and the last bits of a Transformer's gradient differ.
    `always`: bool[], always true, which XLA cannot prove.
    """
    program = jax.jit(program)  # so both branches share one trace

    def never(*args: Tree) -> Tree:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(program, *args))

    return lax.cond(always, program, never, *args)


def local_shards(batch: Batch, count: int) -> tuple[Batch, jax.Array]:
    """Splits a device's rows into `count` shards [count, B/S, ...]; also returns the first's index.

    Call it inside shard_map.
    """
    shards = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return shards, lax.axis_index(AXIS) * count


def reduce_over_devices(tree: Tree, layout: Layout) -> Tree:
    """Sums a tree of float32 arrays over devices, packed into one vector."""
    if layout.mesh.size == 1:
        return tree  # the flat vector would cost two copies
    leaves, structure = jax.tree.flatten(tree)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    padding = jnp.zeros(reduction.padding(ends[-1], layout.mesh.size))
    vector, _ = ravel_pytree((leaves, padding))
    if layout.reduction == 'psum':
        vector = lax.psum(vector, AXIS)
    else:
        vector = reduction.sum_devices(vector, AXIS, layout.mesh.size)
    # The barrier makes XLA cut the vector first and shape the parts afterwards. Otherwise XLA on
    # TPU reshapes the whole vector per leaf: with two columns, padded to 128, that takes 64 times
    # the memory.
    parts = lax.optimization_barrier(jnp.split(vector, ends)[:-1])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def reduce_scalars(sums: Sums, fingerprints: jax.Array, layout: Layout) -> tuple[Sums, jax.Array]:
    """Adds a few sums and fingerprints uint32[N] over devices, in one message."""
    vector, unravel = ravel_pytree(sums)
    if layout.reduction == 'psum':
        return unravel(lax.psum(vector, AXIS)), lax.psum(fingerprints, AXIS)
    words = jnp.concatenate([lax.bitcast_convert_type(vector, jnp.uint32), fingerprints])
    rows = lax.all_gather(words, AXIS)
    floats = lax.bitcast_convert_type(rows[:, : vector.size], jnp.float32)
    fingerprints = jnp.sum(rows[:, vector.size :], axis=0, dtype=jnp.uint32)
    return unravel(reduction.sum_pairs(floats)), fingerprints
