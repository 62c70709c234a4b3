"""One HTML page about a run, or about several that belong together, such as other seeds.

    python -m tools.report RUN [RUN...] --out=report.html

The page holds facts and settings, final metrics, learning curves, and for the first run a closer
look at the evaluation examples: confusion matrix, and the worst mistakes with the attention on each
word. It needs no other file and runs no script. Facts and settings come from the checkpoint; where
the data can not be read any more, the page says so and has the rest.
"""

import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

import tasks
from configs import schema
from errors import KeyfoldError, UserError
from input_pipeline.batches import eval_batches
from reporting import log as logs
from reporting.summary import read_summary
from runtime import resume
from runtime.checkpoints import RunRecord
from runtime.command_line import existing_run, refuse
from tasks.task import Predictor
from tools import curves, predict
from tools.arguments import Arguments
from tools.report_page import document, shaded, swatch, table

SHOWN = 20  # mistakes


class Run(NamedTuple):
    """What a workdir tells of its run."""

    run_record: RunRecord  # of the newest checkpoint: config, task, manifest
    step: int  # of that checkpoint
    summary: dict[str, Any]  # empty until it is finished
    curves: curves.Curves


def main(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='workdir of a run')
    parser.add_argument('--out', required=True, metavar='FILE.html', help='the file to write')
    given = parser.parse_args(argv)
    logs.quiet_libraries()
    try:
        runs = {name: read(existing_run(name)) for name in given.runs}
        page = document(', '.join(runs), sections(runs))
        curves.write(given.out, page.encode('utf-8', 'replace'))
    except KeyfoldError as error:
        refuse(error)
    return 0


def read(run: epath.Path) -> Run:
    """Raises UserError where there is no checkpoint, or a file is damaged."""
    _, step, run_record = predict.newest(run)
    return Run(run_record, step, read_summary(run, step), curves.read(run))


def sections(runs: dict[str, Run]) -> Iterator[tuple[str, str]]:
    """(title, HTML) of each part of the page."""
    first, run = next(iter(runs.items()))
    yield 'Final metrics', metrics_table(runs)
    if drawn := {name: run.curves for name, run in runs.items() if run.curves}:
        yield 'Learning curves', curves_svg(drawn)
    predictor, params, _ = predict.load(existing_run(first))
    of_first = f' of {first}' if len(runs) > 1 else ''
    try:
        closer = [
            (title + of_first, content) for title, content in look_closer(run, predictor, params)
        ]
    except UserError as problem:
        closer = [('Evaluation examples', table([[f'They can not be shown: {problem}']]))]
    yield from closer
    yield 'Facts', facts_table(runs)
    yield 'Settings that are not the defaults', settings_table(runs)
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    sizes['all'] = sum(sizes.values())
    counts = [[name, f'{size:,}'] for name, size in sizes.items()]
    yield 'Parameters' + of_first, table(counts, ['module', 'parameters'])


def final_metrics(run: Run) -> dict[str, float]:
    """Of the summary, or else the newest evaluation."""
    newest = {
        name.removeprefix('evaluation/'): float(curve[-1, 1])
        for name, curve in run.curves.items()
        if name.startswith('evaluation/')
    }
    return run.summary.get('eval', newest)


def metrics_table(runs: dict[str, Run]) -> str:
    """A row for each metric: its value in each run and, of several, mean and spread."""
    of_each = [final_metrics(run) for run in runs.values()]
    rows = []
    for name in dict.fromkeys(name for metrics in of_each for name in metrics):
        row = [f'{metrics[name]:.4f}' if name in metrics else 'none yet' for metrics in of_each]
        if len(runs) > 1:
            values = [metrics[name] for metrics in of_each if name in metrics]
            spread = f'{np.min(values):.4f} .. {np.max(values):.4f}'
            row = [f'{np.mean(values):.4f}', spread, *row]
        rows.append([name, *row])
    return table(rows, ['metric', *(['mean', 'min .. max'] if len(runs) > 1 else []), *runs])


def curves_svg(drawn: dict[str, curves.Curves]) -> str:
    """All curves of all runs as one inline SVG, in which text stays text."""
    metrics = curves.names(drawn, 'evaluation') or ['loss']
    figure = curves.draw(drawn, [*metrics, 'gradient_norm'])
    file = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'report'}):
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None})
    svg = file.getvalue()
    return re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg') :], flags=re.DOTALL)


def look_closer(run: Run, predictor: Predictor, params: Any) -> Iterator[tuple[str, str]]:
    """(title, HTML) of what each evaluation example shows by itself.

    Raises UserError where the data can not be read, or is not that of the run.
    """
    config = tasks.config_from_record(run.run_record)
    task = tasks.make_task(config)
    if changed := resume.task_changes(run.run_record['task'], task.resume_facts):
        raise UserError(f'the data is not what the run was trained on: {changed[0]}')

    def sums_of_one(params: Any, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return task.eval_sums(params, {name: x[None] for name, x in row.items()})

    of_each = jax.jit(jax.vmap(sums_of_one, in_axes=(None, 0)))
    apply = jax.jit(predictor.apply)
    labels = task.resume_facts.get('label_names', [])
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    mistakes, example = [], 0
    for batch in eval_batches(task.evaluation, config, slice(None)):
        sums, arrays = jax.device_get((of_each(params, batch), apply(params, batch)))
        for row in range(np.count_nonzero(batch['weights'])):
            metrics = task.metrics({name: float(values[row]) for name, values in sums.items()})
            shown = predictor.show(arrays, row)
            if labels:
                confusion[batch['labels'][row], labels.index(shown['label'])] += 1
            if metrics[task.best_metric] < 1:
                right = [labels[batch['labels'][row]]] if labels else []
                cells = mistake_cells(shown, task.evaluation.text(example))
                mistakes.append((metrics['loss'], right + cells))
            example += 1
    if labels:
        yield 'Confusion matrix', confusion_table(confusion, labels)
    mistakes.sort(key=lambda mistake: -mistake[0])
    head = ['loss', 'is', 'said', 'example'] if labels else ['loss', 'said', 'example']
    worst = [[f'{loss:.3f}', *cells] for loss, cells in mistakes[:SHOWN]]
    told = f'{len(mistakes)} of {example} examples are wrong; first those of the largest loss.'
    yield 'Worst mistakes', f'<p>{told}</p>' + table(worst, head if worst else [], wide=True)


def mistake_cells(shown: dict[str, Any], text: str) -> list[str]:
    """What the model says, and the example."""
    said = ', '.join(repr(value) for value in shown.values())
    if 'probabilities' in shown:
        said = f'{shown["label"]} ({shown["probabilities"][shown["label"]]:.1%})'
    return [said, shaded(shown['attention']) if 'attention' in shown else text]


def confusion_table(confusion: np.ndarray, labels: list[str]) -> str:
    """True labels down, predicted ones across; right ones in one color, wrong ones in another."""
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    rows = [
        [f'is {label}', *(swatch(str(n), shares[i, j], i == j) for j, n in enumerate(confusion[i]))]
        for i, label in enumerate(labels)
    ]
    return table(rows, ['', *(f'said {label}' for label in labels)])


def facts_table(runs: dict[str, Run]) -> str:
    """What decided the bits of each run, and how it went."""
    facts: dict[str, list[Any]] = {}
    for run in runs.values():
        manifest, num_steps = run.run_record['manifest'], run.run_record['config']['num_steps']
        speed = run.summary.get('examples_per_second')
        unfinished = '' if run.summary else ', not finished'
        for name, value in {
            'steps': f'{run.step} of {num_steps}{unfinished}',
            'examples/s in training': f'{speed:,.0f}' if speed else 'not known',
            'root key': manifest['root_key'],
            'state fingerprint': manifest['state_fingerprint'],
            'shards': manifest['num_shards'],
            'devices': f'{manifest["device_count"]} x {manifest["device_kind"]}, '
            f'{manifest["process_count"]} process(es)',
            'processor': manifest['processor'],
            'versions': ', '.join(f'{k} {v}' for k, v in manifest['versions'].items())
            + f', Python {manifest["python"]}',
            'changes allowed on the way': '; '.join(manifest['overrides']) or 'none',
        }.items():
            facts.setdefault(name, []).append(value)
    return table([[name, *values] for name, values in facts.items()], ['', *runs])


def settings_table(runs: dict[str, Run]) -> str:
    """A row for every option that is not at its default in one of the runs."""
    configs = [tasks.config_from_record(run.run_record) for run in runs.values()]
    own = [schema.to_dict(config) for config in configs]
    usual = {
        name: value
        for config in configs
        for name, value in schema.to_dict(
            schema.Config(data=type(config.data)(), model=type(config.model)())
        ).items()
    }
    rows = [
        [name, default, *(values.get(name, '') for values in own)]
        for name, default in usual.items()
        if any(values.get(name, default) != default for values in own)
    ]
    return table(rows, ['', 'default', *runs])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
