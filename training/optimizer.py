"""The update rule of a config, as an optax chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.schema import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from zero, then constant or cosine to zero."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == 'constant':
        after = optax.constant_schedule(peak)
    else:
        decay_steps = (config.decay_steps or num_steps) - warmup
        after = optax.cosine_decay_schedule(peak, max(1, decay_steps))
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Adam or momentum, then decoupled weight decay, then the learning rate.

    Decay stands before the learning rate, so a step with no gradient shrinks a matrix by
    learning_rate * weight_decay of itself (Loshchilov and Hutter, 2019); biases do not decay.
    Clipping comes before, in the step, which knows the norm of the gradient.
    """
    rule = optax.scale_by_adam() if config.name == 'adamw' else optax.trace(config.momentum)
    return optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(schedule),
    )


def is_matrix(params: Any) -> Any:
    """True for kernels and embeddings, False for biases: by name, since a slice has no shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ('kernel', 'embedding'), params
    )


def clipped(grads: Any, norm: jax.Array, most: float) -> Any:
    """The gradient, of norm float32[], scaled to the norm `most` if it is longer; 0: no limit.

    Pascanu et al., 2013 (https://arxiv.org/abs/1211.5063).
    """
    if not most:
        return grads
    return jax.tree.map(lambda g: jnp.where(norm < most, g, g / norm * most), grads)
