"""Evaluates a checkpoint as training does; of a classifier also each label, and the confusion.

    python -m tools.evaluate RUN [--data FILE|SPLIT] [--step N|best]

Every example counts once, and the metrics are the same bits on any number of devices. Without
--data the examples are the evaluation split of the run; FILE or SPLIT replaces its
config.data.evaluation.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from arrays import HostBatch, Metrics, Totals
from errors import UserError
from input_pipeline.batches import eval_batches
from tasks.task import Predictor, Task
from tools import saved_run
from tools.arguments import Arguments, one_line_errors, run_tool
from tools.saved_run import SavedRun
from training.evaluation import make_totals


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints the metrics; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    parser.add_argument('--data', default='', metavar='FILE|SPLIT', help='what to evaluate on')
    saved_run.add_step_argument(parser)
    given = parser.parse_args(argv)
    run = saved_run.open_run(given.run, given.step)
    if given.data and run.config.data.source not in ('files', 'tfds'):
        raise UserError(
            f'--data={given.data}: {given.run} reads config.data.source = '
            f'{run.config.data.source!r}, which has no other data; expected files or tfds'
        )
    task = run.task(given.data)
    print(f'step {run.step}, {len(task.evaluation):,} examples of {given.data or "the run"}')
    totals = evaluation_totals(run, task)
    for name, value in task.metrics(totals).items():
        print(f'{name:14} {value:.6g}')
    if lines := task.details(totals):
        print('\n'.join(['', *lines]))
    return 0


def evaluation_totals(run: SavedRun, task: Task) -> Totals:
    """Returns the sums over the evaluation split, on all devices that the shards fill."""
    layout = run.layout()
    rows = layout.process_rows(run.config.eval_batch_size)
    batches = functools.partial(eval_batches, task.evaluation, run.config, rows)
    params = run.state(task.init, layout).params
    return make_totals(task.eval_sums, layout, batches)(params)


class Example(NamedTuple):
    """What the model does with one evaluation example."""

    number: int  # from 0
    metrics: Metrics  # of this example alone
    shown: dict[str, Any]  # the prediction, as JSON
    true: str  # its labels, if the task has some


def each_example(run: SavedRun, task: Task, predictor: Predictor, params: Any) -> Iterator[Example]:
    """Yields the evaluation examples in order, one device computing."""

    def sums_of_one(params: Any, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        sums = task.eval_sums(params, {name: x[None] for name, x in row.items()})
        return {name: x for name, x in sums.items() if x.ndim <= 1}  # no matrix for each

    sums_of_each = jax.jit(jax.vmap(sums_of_one, in_axes=(None, 0)))
    apply = jax.jit(predictor.apply)
    number = 0
    for batch in eval_batches(task.evaluation, run.config, slice(None)):
        sums, arrays = jax.device_get((sums_of_each(params, batch), apply(params, batch)))
        for row in range(np.count_nonzero(batch['weights'])):
            metrics = task.metrics({name: values[row] for name, values in sums.items()})
            shown = predictor.show(arrays, row, task.evaluation.text(number))
            yield Example(number, metrics, shown, true_labels(task, batch, row))
            number += 1


def true_labels(task: Task, batch: HostBatch, row: int) -> str:
    """Returns the label of an example, or its labels; '' if the task has none."""
    if names := task.resume_facts.get('label_names'):
        return str(names[batch['labels'][row]])
    if names := task.resume_facts.get('labels'):
        return ', '.join(names[index] for index in np.flatnonzero(batch['labels'][row])) or 'none'
    return ''


if __name__ == '__main__':
    run_tool(main)
