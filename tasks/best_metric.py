"""Chooses the metric by which a checkpoint is the best."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arrays import Totals
from configs.schema import Config
from errors import UserError
from input_pipeline.examples import not_among
from tasks.task import Task


def with_best_metric(task: Task, config: Config) -> Task:
    """Returns the task with the best metric of a config. Raises UserError for an unknown one."""
    if not (best := config.best_metric):
        return task

    def sums(key: jax.Array) -> Totals:
        rows = task.evaluation.batch(np.arange(1), config.data.bucket_lengths[-1])
        return task.eval_sums(task.init(key), jax.tree.map(jnp.asarray, rows))

    shapes = jax.eval_shape(sums, jax.eval_shape(jax.random.key, 0))
    known = task.metrics({name: np.ones(sum.shape) for name, sum in shapes.items()})
    if best not in known:
        raise UserError(f'config.best_metric: {not_among(best, known)}')
    if best != 'loss':
        return dataclasses.replace(task, best_metric=best)

    def metrics(totals: Totals) -> dict[str, float]:
        found = task.metrics(totals)
        return found | {'negative_loss': -found['loss']}

    return dataclasses.replace(task, best_metric='negative_loss', metrics=metrics)
