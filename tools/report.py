"""Writes one HTML page about a run, or about several that belong together, such as a sweep.

    python -m tools.report RUN [RUN...] --out=report.html [--step N|best]

The page has the final metrics, learning curves, facts and settings, and for the first run a closer
look at its evaluation examples: the confusion matrix, and the worst mistakes with the attention on
each word. It loads no other file and runs no script. If the data cannot be read any more, the page
says so and has the rest.
"""

import datetime
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import schema
from errors import UserError
from reporting.summary import read_summary
from tasks.task import Predictor, Task
from tools import curves, evaluate, saved_run
from tools.arguments import Arguments, one_line_errors, run_tool
from tools.report_page import document, escaped, marked, paragraph, shaded, swatch, table
from tools.saved_run import SavedRun

SHOWN = 20  # mistakes
NAMED = 3  # runs in the title
RIGHT = ('accuracy', 'exact_match')  # metrics that are 1 for an example that is right
UNKNOWN = 'unknown'
NO_BREAK_SPACE = '\N{NO-BREAK SPACE}'


class Run(NamedTuple):
    """What the files of a workdir say of its run."""

    saved: SavedRun
    summary: dict[str, Any]  # of its last step; empty until it is finished
    curves: curves.Curves

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the value of every option."""
        return schema.to_dict(self.saved.config)

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the checkpoint's step: an evaluation after it, or the summary."""
        step = self.saved.step
        at_step = {
            name.removeprefix('evaluation/'): float(value)
            for name, curve in self.curves.items()
            for at, value in curve
            if name.startswith('evaluation/') and at == step
        }
        return dict(self.summary['eval']) if self.summary.get('step') == step else at_step


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='workdir of a run')
    parser.add_argument('--out', required=True, metavar='FILE.html', help='the file to write')
    saved_run.add_step_argument(parser)
    given = parser.parse_args(argv)
    runs = {name: read(path, given.step) for name, path in short_names(given.runs).items()}
    title = ', '.join(runs) if len(runs) <= NAMED else f'{len(runs)} runs'
    page = document(title, sections(runs))
    curves.write(given.out, page.encode('utf-8', 'replace'))
    return 0


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Returns name -> path of each run; of several, without the folders that all are in."""
    whole = {path: os.path.abspath(path) if '://' not in path else path for path in paths}
    if len(whole) == 1 or len({'://' in path for path in whole}) > 1:
        return {path: path for path in whole}
    parent = os.path.commonpath([os.path.dirname(path) for path in whole.values()])
    return {os.path.relpath(path, parent): given for given, path in whole.items()}


def read(path: str, step: int | str | None) -> Run:
    """Reads a run. Raises UserError if it has no such checkpoint, or a file is damaged."""
    saved = saved_run.open_run(path, step)
    newest = saved.checkpoints.steps()[-1]
    return Run(saved, read_summary(saved.folder, newest), curves.read(saved.folder))


def sections(runs: dict[str, Run]) -> Iterator[tuple[str, str]]:
    """Yields (title, HTML) of each part of the page."""
    first, run = next(iter(runs.items()))
    of_first = f' of {first}' if len(runs) > 1 else ''
    task, problem = None, ''
    try:
        task = run.saved.task()
    except UserError as error:
        problem = str(error)
    yield 'Final metrics', metrics_table(runs)
    if over_seeds := seeds_table(runs):
        yield 'Mean over seeds', over_seeds
    if drawn := {name: run.curves for name, run in runs.items() if run.curves}:
        yield 'Learning curves', ''.join(drawn_curves(drawn))
    predictor = run.saved.predictor()
    params = run.saved.params(predictor.init)
    if task:
        for title, content in closer_look(run, task, predictor, params):
            yield title + of_first, content
    else:
        yield 'Evaluation examples' + of_first, paragraph(f'They cannot be shown: {problem}')
    yield 'Facts', facts_table(runs)
    yield 'Settings other than the defaults', settings_table(runs)
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    sizes['all'] = sum(sizes.values())
    counts = [[name, f'{size:,}'] for name, size in sizes.items()]
    yield 'Parameters' + of_first, table(counts, ['module', 'parameters'], 'facts')


def differing_settings(runs: dict[str, Run]) -> list[str]:
    """Returns the options whose values differ between the runs."""
    settings = [run.settings for run in runs.values()]
    names = dict.fromkeys(name for values in settings for name in values)
    return [n for n in names if any(values.get(n) != settings[0].get(n) for values in settings)]


def metrics_table(runs: dict[str, Run]) -> str:
    """Returns a row for each run: the settings in which it differs, and its metrics."""
    names = dict.fromkeys(name for run in runs.values() for name in run.metrics)
    differing = differing_settings(runs)
    rows = [
        [
            name,
            *(run.settings.get(option, '') for option in differing),
            run.saved.step,
            *(f'{run.metrics[m]:.4f}' if m in run.metrics else 'none yet' for m in names),
        ]
        for name, run in runs.items()
    ]
    return table(rows, ['run', *differing, 'step', *names])


def seeds_table(runs: dict[str, Run]) -> str:
    """Returns mean and standard deviation for runs that differ in one seed alone, or ''."""
    differing = differing_settings(runs)
    seeds = [name for name in differing if name == 'seed' or name.startswith('seeds.')]
    if len(seeds) != 1:
        return ''
    differing.remove(seeds[0])
    groups: dict[str, list[Run]] = {}
    for run in runs.values():
        data = [
            run.saved.record['task'].get(f'{split}_data') for split in ('training', 'evaluation')
        ]
        key = json.dumps([[run.settings.get(name) for name in differing], data])
        if run.summary:
            groups.setdefault(key, []).append(run)
    rows, names = [], dict.fromkeys(name for run in runs.values() for name in run.metrics)
    for group in groups.values():
        if len({run.settings[seeds[0]] for run in group}) < len(group) or len(group) < 2:
            continue
        values = [[run.metrics.get(name, np.nan) for run in group] for name in names]
        spread = [f'{np.mean(each):.4f} ± {np.std(each, ddof=1):.4f}' for each in values]
        settings = [group[0].settings.get(name, '') for name in differing]
        rows.append([*settings, len(group), *spread])
    note = paragraph('Mean ± standard deviation (of a sample) over finished runs.')
    return note + table(rows, [*differing, 'seeds', *names]) if rows else ''


def drawn_curves(drawn: dict[str, curves.Curves]) -> Iterator[str]:
    """Yields an inline SVG for each metric with all runs in it, and before them the legend."""
    yield paragraph('Thin: each step. Dashed: mean of log interval. Dots: evaluation.')
    if len(drawn) > 1:
        colors = zip(curves.cycle(len(drawn)), drawn, strict=True)
        yield ''.join(
            f'<div>{marked(3 * NO_BREAK_SPACE, color)} {escaped(name)}</div>'
            for color, name in colors
        )
    for metric in [*(curves.names(drawn, 'evaluation') or ['loss']), 'gradient_norm']:
        with curves.drawing(drawn, metric, size=(3.5, 2.6), legend=False) as figure:
            svg = curves.image(figure, 'svg', transparent=True).decode()
        yield re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg') :], flags=re.DOTALL)


def closer_look(
    run: Run, task: Task, predictor: Predictor, params: Any
) -> Iterator[tuple[str, str]]:
    """Yields (title, HTML) of what single evaluation examples show."""
    labels = task.resume_facts.get('label_names', [])
    examples = list(evaluate.each_example(run.saved, task, predictor, params))
    if labels:
        counts = evaluate.evaluation_totals(run.saved, task)['confusion'].astype(int)
        yield 'Confusion matrix', confusion_table(counts, labels)
    shares = [name for name in RIGHT if name in examples[0].metrics]
    mistakes = [x for x in examples if x.metrics[shares[0] if shares else task.best_metric] < 1]
    mistakes.sort(key=lambda example: -example.metrics['loss'])
    head = ['loss', *(['true'] if examples[0].true else []), 'predicted', 'example']
    rows = []
    for example in mistakes[:SHOWN]:
        true = [example.true] if example.true else []
        cells = mistake_cells(example.shown, task.evaluation.text(example.number))
        rows.append([f'{example.metrics["loss"]:.3f}', *true, *cells])
    note = f'{len(mistakes):,} of {len(examples):,} examples are wrong'
    if rows:
        shading = any('attention' in example.shown for example in mistakes[:SHOWN])
        note += '; those with the largest loss' + (
            '. The darker a word, the more attention it got.' if shading else ':'
        )
    yield 'Worst mistakes', paragraph(note) + (table(rows, head) if rows else '')


def mistake_cells(shown: dict[str, Any], text: str) -> list[str]:
    """Returns the prediction and the example."""
    if 'probabilities' in shown:
        labels = shown['labels'] if 'labels' in shown else [shown['label']]
        predicted = ', '.join(f'{name} ({shown["probabilities"][name]:.1%})' for name in labels)
        predicted = predicted or 'none'
    else:
        predicted = ', '.join(repr(value) for value in shown.values())
    return [predicted, shaded(shown['attention']) if 'attention' in shown else text]


def confusion_table(counts: np.ndarray, labels: list[str]) -> str:
    """Returns true labels down, predicted ones across, and the recall of each true label."""
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    rows = [
        [
            label,
            *(swatch(f'{n:,}', shares[i, j], i == j) for j, n in enumerate(counts[i])),
            f'{shares[i, i]:.1%}' if counts[i].any() else 'no examples',
        ]
        for i, label in enumerate(labels)
    ]
    note = paragraph(
        'Green: right. Red: wrong. The darker, the larger the share of the true label.'
    )
    return note + table(rows, ['true / predicted', *labels, 'recall'], 'matrix')


def facts_table(runs: dict[str, Run]) -> str:
    """Returns what decided the bits of each run, and how it went."""
    facts: dict[str, list[Any]] = {}
    for run in runs.values():
        manifest, task = run.saved.record['manifest'], run.saved.record['task']
        speed = run.summary.get('examples_per_second')
        unfinished = '' if run.summary else ', not finished'
        for name, value in {
            'date of the checkpoint': date(run.saved),
            'steps': f'{run.saved.step} of {run.saved.config.num_steps}{unfinished}',
            'best evaluation': best_evaluation(run),
            'data': data(run.settings),
            'training data (SHA-256)': task.get('training_data', UNKNOWN)[:16],
            'evaluation data (SHA-256)': task.get('evaluation_data', UNKNOWN)[:16],
            'code': code(manifest.get('code')),
            'examples/s in training': f'{speed:,.0f}' if speed else UNKNOWN,
            'root key': manifest['root_key'],
            'state fingerprint': manifest['state_fingerprint'][:16],
            'shards': manifest['num_shards'],
            'devices': f'{manifest["device_count"]} x {manifest["device_kind"]}, '
            f'{manifest["process_count"]} process(es)',
            'processor': manifest['processor'],
            'versions': ', '.join(f'{k} {v}' for k, v in manifest['versions'].items())
            + f', Python {manifest["python"]}',
            'changes allowed on resume': '; '.join(manifest['overrides']) or 'none',
        }.items():
            facts.setdefault(name, []).append(value)
    return side_by_side(facts, runs)


def side_by_side(values: dict[str, list[Any]], runs: dict[str, Run]) -> str:
    """Returns a table of what all runs share, and one of the rest with a row for each run."""
    shared = [[name, of_each[0]] for name, of_each in values.items() if len(set(of_each)) == 1]
    rest = {name: of_each for name, of_each in values.items() if len(set(of_each)) > 1}
    first = table(shared, ['', 'all runs' if len(runs) > 1 else next(iter(runs))], 'facts')
    rows = zip(runs, *rest.values(), strict=True)
    return first + (paragraph('') + table(rows, ['run', *rest]) if rest else '')


def date(saved: SavedRun) -> str:
    """Returns when Orbax committed the checkpoint."""
    try:
        file = saved.folder / 'checkpoints' / str(saved.step) / '_CHECKPOINT_METADATA'
        seconds = json.loads(file.read_text())['commit_timestamp_nsecs'] / 1e9
    except (OSError, ValueError, LookupError, TypeError):
        return UNKNOWN
    return f'{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC'


def best_evaluation(run: Run) -> str:
    """Returns the best metric and its step, which may have no checkpoint any more."""
    try:
        metric = run.saved.best_metric()
        curve = run.curves[f'evaluation/{metric}']
        step, value = curve[int(np.nanargmax(curve[:, 1]))]
    # Without an evaluation that is a number; or an old record lacks the metric, and data is lost.
    except (KeyError, ValueError, UserError):
        return UNKNOWN
    return f'step {step:.0f}, {metric} {value:.4f}'


def data(settings: dict[str, Any]) -> str:
    """Returns where the examples came from."""
    found = {
        name: settings.get(f'data.{name}')
        for name in ('source', 'name', 'train', 'evaluation', 'num_train', 'num_eval')
    }
    if found['source'] not in ('files', 'tfds'):
        return ', '.join(f'{name} {found[name]}' for name in ('source', 'num_train', 'num_eval'))
    name = f'{found["name"]}, ' if found['source'] == 'tfds' else ''
    return f'{name}{found["train"]} and {found["evaluation"]}'


def code(recorded: dict[str, Any] | None) -> str:
    """Returns the commit of the code, if the run record has it."""
    if not recorded or not recorded['commit']:
        return UNKNOWN
    return recorded['commit'][:12] + (' with changes' if recorded['dirty'] else '')


def settings_table(runs: dict[str, Run]) -> str:
    """Returns a row for every option that is not at its default in one of the runs."""
    defaults: dict[str, Any] = {}
    for run in runs.values():
        config = run.saved.config
        defaults |= schema.to_dict(
            schema.Config(data=type(config.data)(), model=type(config.model)())
        )
    changed = {
        f'{name} (default {default})': [str(run.settings.get(name, '')) for run in runs.values()]
        for name, default in defaults.items()
        if any(run.settings.get(name, default) != default for run in runs.values())
    }
    return side_by_side(changed, runs)


if __name__ == '__main__':
    run_tool(main)
