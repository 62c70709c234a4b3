"""One training step and one evaluation step, on any number of devices.

Shapes: S shards, n devices, B global batch. A device works through its S/n consecutive shards one
after the other (which on one device is gradient accumulation), each with its own keys.

Gradient and update are two programs: joined, XLA would fuse the update into the gradient's tail
in a way that depends on the number of devices, and so would the last bit of the parameters.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from training import keys, reduction, zero
from training.fingerprint import fingerprint, fingerprint_of_slices, shared_fingerprint
from training.mesh import DATA, Layout, jit_on_mesh
from training.optimizer import gradient_scale, update_if
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
    clip_norm: float,
    layout: Layout,
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """(state, global batch) -> (next state, row uint32[columns] as `row_columns` names them).

    The state's buffers are donated.
    """
    gradient = make_gradient(loss_sums, layout)
    update = make_update(optimizer, clip_norm, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        return update(state, *gradient(state.params, state.root_keys, state.step, batch))

    return train_step


def make_gradient(
    loss_sums: LossSums, layout: Layout
) -> Callable[..., tuple[Any, Sums, jax.Array]]:
    """(params, root keys, step, global batch) -> (summed gradient, sums, uint32[2] fingerprints).

    With a sharded optimizer state the gradient is in slices, each on the device of its shard.
    """

    def loss(params: Any, *rest: Any) -> tuple[jax.Array, Sums]:
        sums = loss_sums(params, *rest)
        return sums['loss'], sums

    def device_gradient(
        params: Any, roots: keys.RootKeys, step: jax.Array, batch: Batch
    ) -> tuple[Any, Sums, jax.Array]:
        shards, first = own_shards(batch, layout.shards_per_device)

        def partial(shard: jax.Array) -> tuple[Any, Sums, jax.Array]:
            rows = reduction.select_shard(shards, shard - first)
            rngs = keys.shard_rngs(roots, step, shard)
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, rows, rngs, step)
            words = jax.random.key_data(rngs['dropout'])
            prints = [
                fingerprint(rows, shard * max(leaf.size for leaf in rows.values())),
                fingerprint(words, shard * words.size),
            ]
            return grads, sums, jnp.stack(prints)

        grads, sums, prints = reduction.tree_sum_local(partial, first, layout.shards_per_device)
        if layout.shard_state:
            grads = zero.scattered_sum(grads, layout)
            return grads, *reduce_scalars(sums, prints, layout)
        grads, sums = reduce_over_devices((grads, sums), layout)
        return grads, sums, lax.psum(prints, DATA)  # whole numbers add exactly in any order

    grads = P(DATA) if layout.shard_state else P()
    in_specs = (P(), P(), P(), P(DATA))
    return jit_on_mesh(device_gradient, layout, in_specs, out_specs=(grads, P(), P()))


def make_update(
    optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """(state, summed gradient, sums, fingerprints) -> (next state, row). Donates the state.

    A step whose loss or gradient norm is not finite counts, and changes nothing else.
    """

    def update(
        state: TrainState, grads: Any, sums: Sums, prints: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        norm = optax.tree.norm(grads) / sums['weight']
        finite = jnp.isfinite(norm) & jnp.isfinite(sums['loss'])
        scale = gradient_scale(sums['weight'], norm, clip_norm)
        params, opt_state = update_if(
            finite, optimizer, grads, scale, state.opt_state, state.params
        )
        step = state.step + 1
        print_of_params = shared_fingerprint(params, DATA, layout.mesh.size)
        row = row_of(step, [*prints, print_of_params], norm, sums)
        return state.replace(step=step, params=params, opt_state=opt_state), row

    if layout.shard_state:
        return make_update_of_slices(optimizer, clip_norm, layout)
    return jit_on_mesh(update, layout, in_specs=P(), out_specs=P(), donate=(0,))


@dataclasses.dataclass(frozen=True)
class UpdateOfSlices:
    """`make_update` for gradient and optimizer state in slices: three programs in a row.

    Joined, they would round otherwise on another number of devices (training/zero.py).
    """

    measure: Callable[..., tuple[Any, zero.Facts]]
    apply: Callable[..., tuple[Any, Any]]
    finish: Callable[..., tuple[Any, jax.Array, jax.Array]]

    def __call__(
        self, state: TrainState, grads: Any, sums: Sums, prints: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        """The next state, and the row of the step."""
        slices, facts = self.measure(state.params, grads, sums)
        slices, opt_state = self.apply(slices, state.opt_state, grads, facts)
        rest = (slices, state.step, facts.norm, sums, prints)
        params, step, row = self.finish(state.params, *rest)
        return TrainState(step, params, opt_state, state.root_keys), row


def make_update_of_slices(
    optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> UpdateOfSlices:
    """Binds the three programs."""

    def measure(params: Any, grads: Any, sums: Sums) -> tuple[Any, zero.Facts]:
        norm = jnp.sqrt(zero.squared_norm(grads, layout)) / sums['weight']
        finite = jnp.isfinite(norm) & jnp.isfinite(sums['loss'])
        return zero.own_slices(params, layout), zero.Facts(sums['weight'], norm, finite)

    def finish(
        old: Any, slices: Any, step: jax.Array, norm: jax.Array, sums: Sums, prints: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        print_of_params = fingerprint_of_slices(slices, DATA)
        row = row_of(step + 1, [*prints, print_of_params], norm, sums)
        return zero.gathered(slices, old), step + 1, row

    own, replicated = P(DATA), P()
    return UpdateOfSlices(
        jit_on_mesh(measure, layout, (replicated, own, replicated), (own, replicated)),
        zero.make_apply(optimizer, clip_norm, layout),
        jit_on_mesh(finish, layout, (replicated, own, *4 * [replicated]), replicated, donate=(0,)),
    )


def row_of(step: jax.Array, prints: list[jax.Array], norm: jax.Array, sums: Sums) -> jax.Array:
    """The row uint32[columns] of a step, as `row_columns` names them."""
    floats = jnp.stack([norm, *(sums[name] for name in sorted(sums))])
    words = jnp.stack([step.astype(jnp.uint32), *prints])
    return jnp.concatenate([words, lax.bitcast_convert_type(floats, jnp.uint32)])


def make_eval_step(eval_sums: EvalSums, layout: Layout) -> Callable[[Any, Batch], Sums]:
    """(params, global batch) -> sums over the batch. Draws no random number."""

    def device_sums(params: Any, batch: Batch) -> Sums:
        shards, first = own_shards(batch, layout.shards_per_device)

        def partial(shard: jax.Array) -> Sums:
            return eval_sums(params, reduction.select_shard(shards, shard - first))

        sums = reduction.tree_sum_local(partial, first, layout.shards_per_device)
        return reduce_scalars(sums, jnp.zeros(0, jnp.uint32), layout)[0]

    return jit_on_mesh(device_sums, layout, in_specs=(P(), P(DATA)), out_specs=P())


def own_shards(batch: Batch, count: int) -> tuple[Batch, jax.Array]:
    """A device's rows as `count` shards [count, B/S, ...], and the global index of the first."""
    shards = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return shards, lax.axis_index(DATA) * count


def reduce_over_devices(tree: Any, layout: Layout) -> Any:
    """The sum over devices of a tree of float32 arrays, in one message per device and direction."""
    if layout.mesh.size == 1:
        return tree  # the flat vector would cost two copies
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


def reduce_scalars(sums: Sums, prints: jax.Array, layout: Layout) -> tuple[Sums, jax.Array]:
    """The sums over devices of a few numbers and of fingerprints uint32[N], in one message."""
    vector, unravel = ravel_pytree(sums)
    if layout.reduction == 'psum':
        return unravel(lax.psum(vector, DATA)), lax.psum(prints, DATA)
    words = jnp.concatenate([lax.bitcast_convert_type(vector, jnp.uint32), prints])
    rows = lax.all_gather(words, DATA)
    floats = lax.bitcast_convert_type(rows[:, : vector.size], jnp.float32)
    prints = jnp.sum(rows[:, vector.size :], axis=0, dtype=jnp.uint32)
    return unravel(reduction.sum_pairs(floats)), prints
