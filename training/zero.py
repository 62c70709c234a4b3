"""ZeRO-1: each shard keeps one slice of the optimizer state (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, stage 1).

A leaf of P values becomes slices [S, k], filled with zeros at the end: slice s belongs to shard s,
and a device has those of its S/n shards. The reduction of the gradient stops half-way, when each
device has the sum of its own slices; the optimizer updates them; the devices share the result.

The optimizer's part is a program of one device, dispatched to every local one. In programs of a
mesh XLA simplifies and fuses differently on one device and on several (a division by a scalar into
a multiplication, say), which changed the last bit of a parameter. Rules that look at whole leaves
(LAMB, Adafactor) would see slices: use those that work element by element.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from training import reduction
from training.mesh import DATA, Layout
from training.optimizer import gradient_scale, update_if


class Facts(NamedTuple):
    """What the optimizer's part has to know of the whole gradient."""

    weight: jax.Array  # float32[], of all examples
    norm: jax.Array  # float32[], of the mean gradient
    finite: jax.Array  # bool[], loss and norm


def make_apply(
    optimizer: optax.GradientTransformation, clip_norm: float, layout: Layout
) -> Callable[[Any, Any, Any, Facts], tuple[Any, Any]]:
    """(slices of the parameters, optimizer state, summed gradient, facts) -> the next two.

    Slices and state are donated, and stay as they are where the facts are not finite.
    """

    def apply(slices: Any, opt_state: Any, grads: Any, facts: Facts) -> tuple[Any, Any]:
        scale = gradient_scale(facts.weight, facts.norm, clip_norm)
        # Every slice counts its steps, and all alike: one count will do.
        one = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 1 else leaf, opt_state)
        slices, new = update_if(facts.finite, optimizer, grads, scale, one, slices)
        counted = jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, old.shape), new, opt_state)
        return slices, counted

    on_device = jax.jit(apply, donate_argnums=(0, 1))

    def on_local_devices(slices: Any, opt_state: Any, *rest: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten((slices, opt_state, *rest))
        parts = list(zip(*map(on_each_device, leaves), strict=True))
        news = [jax.tree.leaves(on_device(*jax.tree.unflatten(structure, p))) for p in parts]
        leaves, structure = jax.tree.flatten((slices, opt_state))
        joined = [
            jax.make_array_from_single_device_arrays(old.shape, layout.sharded, list(arrays))
            for old, *arrays in zip(leaves, *news, strict=True)
        ]
        return jax.tree.unflatten(structure, joined)

    return on_local_devices


def on_each_device(array: jax.Array) -> list[jax.Array]:
    """What each local device has of an array, in the order of the devices."""
    parts = sorted(array.addressable_shards, key=lambda part: part.device.id)
    return [part.data for part in parts]


def to_slices(tree: Any, count: int) -> Any:
    """Every leaf [...] as `count` slices [count, k]."""

    def cut(leaf: jax.Array) -> jax.Array:
        filler = reduction.padding(leaf.size, count)
        return jnp.pad(leaf.reshape(-1), (0, filler)).reshape(count, -1)

    return jax.tree.map(cut, tree)


def own_slices(tree: Any, layout: Layout) -> Any:
    """Of every leaf the slices [S/n, k] of this device's shards. Call it inside shard_map."""
    count = layout.shards_per_device
    first = lax.axis_index(DATA) * count
    slices = to_slices(tree, layout.num_shards)
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count), slices)


def scattered_sum(tree: Any, layout: Layout) -> Any:
    """The tree sum over devices of a tree, of which each gets its own slices [S/n, k]."""
    slices = to_slices(tree, layout.num_shards)
    if layout.mesh.size == 1:
        return slices  # packing would cost two copies
    own = reduction.sum_scattered(packed(slices).reshape(-1), DATA, layout.mesh.size)
    return unpacked(own.reshape(layout.shards_per_device, -1), slices)


def gathered(own: Any, like: Any) -> Any:
    """Each device's own slices [S/n, k] -> the whole leaves, in the shapes of `like`."""
    rows = packed(own)
    whole = reduction.gathered(rows.reshape(-1, reduction.LANES), DATA)
    slices = unpacked(whole.reshape(-1, rows.shape[1]), own)
    return jax.tree.map(
        lambda leaf, shape: leaf.reshape(-1)[: shape.size].reshape(shape.shape), slices, like
    )


def squared_norm(own: Any, layout: Layout) -> jax.Array:
    """float32[]: the squares of all values, added in one tree over the shards' slices."""

    def of_slice(index: jax.Array) -> jax.Array:
        return optax.tree.norm(reduction.select_shard(own, index), squared=True)

    total = reduction.tree_sum_local(of_slice, jnp.int32(0), layout.shards_per_device)
    return reduction.sum_gathered(total, DATA)


def packed(slices: Any) -> jax.Array:
    """The slices of all leaves side by side, [N, K]."""
    return jnp.concatenate(jax.tree.leaves(slices), axis=1)


def unpacked(rows: jax.Array, like: Any) -> Any:
    """The leaves that `packed` joined, of as many rows as there are now."""
    leaves, structure = jax.tree.flatten(like)
    ends = list(itertools.accumulate(leaf.shape[1] for leaf in leaves))
    return jax.tree.unflatten(structure, jnp.split(rows, ends[:-1], axis=1))
