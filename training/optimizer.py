"""The update rule of a config, as an optax chain."""

from typing import Any

import jax
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
    """Clipping, then Adam or momentum, then decoupled weight decay, then the learning rate.

    Decay stands before the learning rate, so a step with no gradient shrinks a matrix by
    learning_rate * weight_decay of itself (Loshchilov and Hutter, 2019); biases do not decay.
    """
    rule = optax.scale_by_adam() if config.name == 'adamw' else optax.trace(config.momentum)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(schedule),
    )


def is_matrix(params: Any) -> Any:
    """True for kernels and embeddings, False for biases."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
