"""The update rule of a config, as an optax chain, and how a step applies it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrays import Sums, Tree
from configs.schema import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then constant or cosine to zero."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == 'constant':
        after = optax.constant_schedule(peak)
    else:
        decay_steps = (config.decay_steps or num_steps) - warmup
        after = optax.cosine_decay_schedule(peak, max(1, decay_steps))
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns Adam or momentum, then decoupled weight decay, then the learning rate.

    With zero gradient a step multiplies a matrix by 1 - learning_rate * weight_decay (Loshchilov
    and Hutter, 2019). Nothing else decays. The step clips, since a ZeRO slice lacks the whole norm.
    """
    rule = optax.scale_by_adam() if config.name == 'adamw' else optax.trace(config.momentum)
    return optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(make_schedule(config, num_steps)),
    )


def updates_made(opt_state: optax.OptState) -> int:
    """Returns the number of applied updates, which the schedule counts."""
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, 'count')
    return int(count.addressable_data(0).max())  # each ZeRO slice has one; all are equal


def is_matrix(params: Tree) -> Tree:
    """Returns True for kernels and embeddings, by name, because a ZeRO slice has lost its shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ('kernel', 'embedding'), params
    )


def sum_of_squares(tree: Tree) -> jax.Array:
    """Returns float32[]: the squares of all values of float32 leaves, added up.

    A leaf is split into eight equal pieces and a rest. The pieces are added elementwise before one
    reduction, because XLA's CPU backend reduces serially. The barrier leaves YNNPACK only that
    reduction, since it would copy every piece.
    """

    def of_leaf(leaf: jax.Array) -> jax.Array:
        *pieces, rest = jnp.split(leaf.reshape(-1), leaf.size // 8 * np.arange(1, 9))
        eighth = jax.lax.optimization_barrier(sum(map(jnp.square, pieces)))
        return jnp.sum(eighth) + jnp.sum(jnp.square(rest))

    return sum(map(of_leaf, jax.tree.leaves(tree)), jnp.float32(0))


def norm_and_finite(squares: jax.Array, sums: Sums) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of the mean gradient, float32[], and whether it and the loss are finite.

    squares: float32[], `sum_of_squares` of the summed gradient.
    """
    norm = jnp.sqrt(squares) / sums['weight']
    return norm, jnp.isfinite(norm) & jnp.isfinite(sums['loss'])


def gradient_scale(weight: jax.Array, norm: jax.Array, clip_norm: float) -> jax.Array:
    """Returns the float32[] factor from the summed gradient to the clipped mean.

    weight: float32[], of all examples; norm: float32[], of the mean gradient. If it is larger than
    `clip_norm`, the mean gradient is rescaled to that norm; 0 disables clipping (Pascanu et al.,
    2013, https://arxiv.org/abs/1211.5063). One number, because dividing by the weight and then
    clipping would be two passes over the gradient.
    """
    scale = 1 / weight
    return jnp.where(norm < clip_norm, scale, scale * (clip_norm / norm)) if clip_norm else scale


def update_if(
    finite: jax.Array,
    optimizer: optax.GradientTransformation,
    grads: Tree,
    scale: jax.Array,
    opt_state: optax.OptState,
    params: Tree,
) -> tuple[Tree, optax.OptState]:
    """Returns the next parameters and optimizer state if `finite`, otherwise the same ones.

    A branch, not a `where` on every array: with `where` XLA computes the new moments twice, once
    for the state and once for the parameters, from a copy of the old ones. A branch updates donated
    arrays in place. It also keeps XLA from fusing anything around it into the update.
    """

    def update(params: Tree, opt_state: optax.OptState) -> tuple[Tree, optax.OptState]:
        mean = jax.tree.map(lambda g: g * scale, grads)
        updates, new_state = optimizer.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), new_state

    return jax.lax.cond(finite, update, lambda *same: same, params, opt_state)
