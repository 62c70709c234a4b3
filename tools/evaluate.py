"""Evaluates a checkpoint as training does, and counts which labels a classifier confuses.

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

from errors import UserError
from input_pipeline.batches import eval_batches
from runtime import backend
from tasks.task import Predictor, Task
from tools import saved_run
from tools.arguments import Arguments, one_line_errors, run_tool
from tools.saved_run import SavedRun
from training.evaluation import Metrics, make_evaluate


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints the metrics; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    parser.add_argument('--data', default='', metavar='FILE|SPLIT', help='what to evaluate on')
    saved_run.add_step_argument(parser)
    given = parser.parse_args(argv)
    run = saved_run.open_run(given.run, given.step)
    backend.check()
    if given.data and run.config.data.source not in ('files', 'tfds'):
        raise UserError(
            f'--data={given.data}: {given.run} reads config.data.source = '
            f'{run.config.data.source!r}, which has no other data; expected files or tfds'
        )
    task = run.task(given.data)
    print(f'step {run.step}, {len(task.evaluation):,} examples of {given.data or "the run"}')
    for name, value in evaluate(run, task).items():
        print(f'{name:14} {value:.6g}')
    if labels := task.resume_facts.get('label_names'):
        predictor = run.predictor()
        params = run.params(predictor.init)
        counts = confusion_matrix(each_example(run, task, predictor, params), labels)
        print('\n'.join(['', *confusion_lines(counts, labels)]))
    return 0


def evaluate(run: SavedRun, task: Task) -> Metrics:
    """Returns the metrics of the evaluation split, on all devices that the shards fill."""
    layout = run.layout()
    rows = layout.process_rows(run.config.eval_batch_size)
    batches = functools.partial(eval_batches, task.evaluation, run.config, rows)
    params = run.state(task.init, layout).params
    return make_evaluate(task.eval_sums, task.metrics, layout, batches)(params)


class Example(NamedTuple):
    """What the model does with one evaluation example."""

    number: int  # from 0
    metrics: Metrics  # of this example alone
    shown: dict[str, Any]  # the prediction, as JSON
    label: int  # of a classifier; otherwise -1


def each_example(run: SavedRun, task: Task, predictor: Predictor, params: Any) -> Iterator[Example]:
    """Yields the evaluation examples in order, one device computing."""

    def sums_of_one(params: Any, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return task.eval_sums(params, {name: x[None] for name, x in row.items()})

    sums_of_each = jax.jit(jax.vmap(sums_of_one, in_axes=(None, 0)))
    apply = jax.jit(predictor.apply)
    number = 0
    for batch in eval_batches(task.evaluation, run.config, slice(None)):
        sums, arrays = jax.device_get((sums_of_each(params, batch), apply(params, batch)))
        for row in range(np.count_nonzero(batch['weights'])):
            metrics = task.metrics({name: float(values[row]) for name, values in sums.items()})
            label = int(batch['labels'][row]) if 'labels' in batch else -1
            shown = predictor.show(arrays, row, task.evaluation.text(number))
            yield Example(number, metrics, shown, label)
            number += 1


def confusion_matrix(examples: Iterator[Example], labels: Sequence[str]) -> np.ndarray:
    """Counts int64[true label, predicted label]."""
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for example in examples:
        counts[example.label, labels.index(example.shown['label'])] += 1
    return counts


def confusion_lines(counts: np.ndarray, labels: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a table, true labels down and predicted ones across."""
    width = max(len('true'), *map(len, labels))
    cells = max(*map(len, labels), len(f'{counts.max():,}'))
    yield 'true'.ljust(width) + '  predicted'
    yield ' ' * width + ''.join(f'  {label:>{cells}}' for label in labels)
    for label, row in zip(labels, counts, strict=True):
        yield label.ljust(width) + ''.join(f'  {count:>{cells},}' for count in row)


if __name__ == '__main__':
    run_tool(main)
