"""Freezes parts of a model: their gradient is zero."""

import dataclasses

import jax

from tasks.task import Batch, Params, Rngs, Sums, Task


def with_frozen(task: Task, parts: tuple[str, ...]) -> Task:
    """Returns the task, in whose loss the `parts` of the parameters are constants.

    So their backward pass costs nothing, and the gradient norm is that of the other parts.
    training/frozen.py leaves them out of the optimizer.
    """

    def loss_sums(params: Params, batch: Batch, rngs: Rngs, step: jax.Array) -> Sums:
        fixed = {
            name: jax.lax.stop_gradient(part) if name in parts else part
            for name, part in params.items()
        }
        return task.loss_sums(fixed, batch, rngs, step)

    return dataclasses.replace(task, loss_sums=loss_sums) if parts else task
