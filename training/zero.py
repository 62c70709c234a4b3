"""ZeRO-1: each shard keeps one slice of the optimizer state (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, stage 1). Only runs with `optimizer.shard_state` use this module.

A leaf of P values becomes slices [S, k], padded with zeros: slice s belongs to shard s, and a
device has the slices of its S/n shards. The gradient's reduction stops half-way, when each device
has the sum of its own slices. The optimizer updates them, and the devices exchange the results.

The optimizer's part is a one-device program, dispatched to every local device. In programs of a
mesh XLA simplifies and fuses differently on one device and on several (it turns a division by a
scalar into a multiplication, for example), which changed the last bit of a parameter. Update rules
that look at whole leaves (LAMB, Adafactor) would see slices: use rules that work per element.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from arrays import Sums, Tree
from training import reduction
from training.fingerprint import fingerprint_of_slices
from training.mesh import AXIS, Layout, jit_on_mesh
from training.optimizer import gradient_scale, norm_and_finite, sum_of_squares, update_if
from training.row import make_row


class GradientFacts(NamedTuple):
    """What updating a slice needs to know of the whole gradient."""

    weight: jax.Array  # float32[], of all examples
    norm: jax.Array  # float32[], of the mean gradient
    finite: jax.Array  # bool[], loss and norm


def make_sliced_update(
    optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> Callable[..., tuple[Tree, jax.Array]]:
    """Returns (state, summed gradient in slices, sums, fingerprints) -> (next state, row).

    Three programs in a row: one would round differently on another number of devices. It donates
    the state.
    """
    measure, finish = make_measure(layout), make_finish(layout)
    apply = make_apply(optimizer, clip_norm, layout)

    def update(
        state: Tree, grads: Tree, sums: Sums, fingerprints: jax.Array
    ) -> tuple[Tree, jax.Array]:
        slices, facts = measure(state.params, grads, sums)
        trained, frozen = layout.split(slices)
        trained, opt_state = apply(trained, state.opt_state, grads, facts)
        rest = (trained | frozen, state.step, facts.norm, sums, fingerprints)
        params, step, row = finish(state.params, *rest)
        return state.replace(step=step, params=params, opt_state=opt_state), row

    return update


def make_measure(layout: Layout) -> Callable[..., tuple[Tree, GradientFacts]]:
    """Returns (parameters, summed gradient, sums) -> (parameter slices, facts)."""

    def measure(params: Tree, grads: Tree, sums: Sums) -> tuple[Tree, GradientFacts]:
        facts = GradientFacts(sums['weight'], *norm_and_finite(squared_norm(grads, layout), sums))
        return local_slices(params, layout), facts

    return jit_on_mesh(measure, layout, (P(), P(AXIS), P()), (P(AXIS), P()))


def make_apply(
    optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> Callable[[Tree, Tree, Tree, GradientFacts], tuple[Tree, Tree]]:
    """Returns (parameter slices, optimizer state, summed gradient, facts) -> the next two.

    It donates slices and state, and returns them unchanged where the facts are not finite.
    """

    def apply(
        slices: Tree, opt_state: Tree, grads: Tree, facts: GradientFacts
    ) -> tuple[Tree, Tree]:
        scale = gradient_scale(facts.weight, facts.norm, clip_norm)
        # Optax counts steps in every slice, all alike; the update of all slices needs one count.
        one = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 1 else leaf, opt_state)
        slices, new = update_if(facts.finite, optimizer, grads, scale, one, slices)
        counted = jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, old.shape), new, opt_state)
        return slices, counted

    on_device = jax.jit(apply, donate_argnums=(0, 1))

    def on_mesh(old: jax.Array, *parts: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(old.shape, layout.sharded, list(parts))

    def on_local_devices(*given: Tree) -> tuple[Tree, Tree]:
        parts = jax.tree.map(on_each_device, given)
        by_device = jax.tree.transpose(jax.tree.structure(given), None, parts)
        return jax.tree.map(on_mesh, given[:2], *(on_device(*args) for args in by_device))

    return on_local_devices


def make_finish(layout: Layout) -> Callable[..., tuple[Tree, jax.Array, jax.Array]]:
    """Returns (old parameters, new slices, step, norm, sums, fingerprints) -> (new, step, row)."""

    def finish(
        old: Tree,
        slices: Tree,
        step: jax.Array,
        norm: jax.Array,
        sums: Sums,
        fingerprints: jax.Array,
    ) -> tuple[Tree, jax.Array, jax.Array]:
        after = fingerprint_of_slices(slices, AXIS)
        row = make_row(step + 1, [*fingerprints, after], norm, sums)
        return whole_leaves(slices, old), step + 1, row

    return jit_on_mesh(finish, layout, (P(), P(AXIS), *4 * [P()]), P(), donate=(0,))


def on_each_device(array: jax.Array) -> list[jax.Array]:
    """Returns each local device's part of an array, ordered by device."""
    parts = sorted(array.addressable_shards, key=lambda part: part.device.id)
    return [part.data for part in parts]


def to_slices(tree: Tree, count: int) -> Tree:
    """Cuts every leaf [...] into `count` slices [count, k]."""

    def cut(leaf: jax.Array) -> jax.Array:
        filler = reduction.padding(leaf.size, count)
        return jnp.pad(leaf.reshape(-1), (0, filler)).reshape(count, -1)

    return jax.tree.map(cut, tree)


def local_slices(tree: Tree, layout: Layout) -> Tree:
    """Returns the slices [S/n, k] of this device's shards. Call it inside shard_map."""
    count = layout.shards_per_device
    first = lax.axis_index(AXIS) * count
    slices = to_slices(tree, layout.num_shards)
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count), slices)


def scattered_sum(tree: Tree, layout: Layout) -> Tree:
    """Sums a tree over devices in tree order; each device gets its own slices [S/n, k]."""
    slices = to_slices(tree, layout.num_shards)
    if layout.mesh.size == 1:
        return slices  # packing would cost two copies
    own = reduction.sum_scattered(packed(slices).reshape(-1), AXIS, layout.mesh.size)
    return unpacked(own.reshape(layout.shards_per_device, -1), slices)


def whole_leaves(own: Tree, like: Tree) -> Tree:
    """Exchanges each device's slices [S/n, k] and returns whole leaves, shaped as in `like`."""
    rows = packed(own)
    whole = reduction.gathered(rows.reshape(-1, reduction.LANES), AXIS)
    slices = unpacked(whole.reshape(-1, rows.shape[1]), own)
    return jax.tree.map(
        lambda leaf, shape: leaf.reshape(-1)[: shape.size].reshape(shape.shape), slices, like
    )


def squared_norm(own: Tree, layout: Layout) -> jax.Array:
    """Returns float32[]: the squares of all values, added in one tree over the shards' slices."""

    def of_slice(index: jax.Array) -> jax.Array:
        return sum_of_squares(reduction.select_shard(own, index))

    total = reduction.tree_sum_local(of_slice, jnp.int32(0), layout.shards_per_device)
    # A few numbers: every device gathers all and adds them.
    return reduction.sum_pairs(reduction.gathered(total[None], AXIS))


def packed(slices: Tree) -> jax.Array:
    """Joins the slices of all leaves side by side, [N, K]."""
    return jnp.concatenate(jax.tree.leaves(slices), axis=1)


def unpacked(rows: jax.Array, like: Tree) -> Tree:
    """Undoes `packed`, for any number of rows."""
    leaves, structure = jax.tree.flatten(like)
    ends = list(itertools.accumulate(leaf.shape[1] for leaf in leaves))
    return jax.tree.unflatten(structure, jnp.split(rows, ends[:-1], axis=1))
