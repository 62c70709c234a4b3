"""Trains a grid of settings with several seeds, one run after another, and compares them.

    python -m tools.sweep --config=FILE --workdir=DIR --seeds=0:5
        [--set optimizer.learning_rate=1e-3,3e-3] [--set ...]
        [--command='sbatch launch/slurm.sbatch']

Each run has its own folder in DIR. Called again, it skips finished runs and resumes the others.
--command is called for each unfinished run instead, followed by the flags of train.py; once a
scheduler has finished the runs, call it again for the table. Prints the final metrics, for several
seeds as mean ± standard deviation (of a sample), and writes DIR/sweep.json.
Exit code 0: all runs finished or were submitted. 1: some failed. 2: bad input. 75: a run was asked
to stop, such as by Ctrl-C; the same command resumes.
"""

import itertools
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from configs import schema
from configs.schema import Config
from errors import UserError
from input_pipeline.examples import not_among
from reporting.summary import read_summary
from runtime.command_line import usable_workdir
from runtime.preemption import EXIT_CODE, SIGNALS
from tools.arguments import Arguments, one_line_errors, run_tool

TRAIN = Path(__file__).resolve().parent.parent / 'train.py'
LONGEST_NAME = 200  # of a folder, named after its settings


class Run(NamedTuple):
    """One run of the grid."""

    settings: dict[str, str]  # option -> value, as given
    seed: int
    workdir: epath.Path


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Trains the runs and prints the table; returns the exit code."""
    parser = Arguments(__doc__)
    add = parser.add_argument
    add('--config', required=True, metavar='FILE', help='config of all runs')
    add('--workdir', required=True, metavar='DIR', help='gets a folder for each run')
    add('--seeds', default='0:1', metavar='A:B', help='A, A + 1, .. B - 1 (default: 0:1)')
    add('--set', action='append', default=[], metavar='OPTION=VALUE,...', help='values to try')
    add('--command', default='', help='call this for each run instead of training here')
    given = parser.parse_args(argv)
    config, workdir = read_config(given.config), usable_workdir(given.workdir)
    runs = grid(config, workdir, given.set, given.seeds)
    try:
        command = shlex.split(given.command) or [sys.executable, str(TRAIN)]
    except ValueError as error:
        raise UserError(f'--command={given.command}: {error}') from error
    code = run_all(runs, config, [*command, f'--config={given.config}'])
    conclude(runs, config, workdir)
    return code


def read_config(file: str) -> Config:
    """Returns the config of a file. Raises UserError for any mistake in it."""
    try:
        config = runpy.run_path(file)['get_config']()
    except Exception as error:  # the file is code, so anything can be raised
        raise UserError(f'--config={file}: {type(error).__name__}: {error}') from error
    if not isinstance(config, Config):
        raise UserError(f'--config={file}: expected get_config() to return a Config')
    return config


def grid(config: Config, workdir: epath.Path, given: Sequence[str], seeds: str) -> list[Run]:
    """Returns all combinations of the settings, each with all seeds. Raises UserError."""
    values: dict[str, list[str]] = {}
    known = schema.to_dict(config).keys() - {'seed'}
    for setting in given:
        name, _, text = setting.partition('=')
        if name not in known:
            raise UserError(f'--set {setting}: {not_among(name, sorted(known))}')
        values[name] = re.split(r',(?![^()]*\))', text)  # a comma in (16,28) is part of a value
    ends = re.fullmatch(r'(\d+):(\d+)', seeds)
    if not ends or int(ends[1]) >= int(ends[2]):
        raise UserError(f'--seeds={seeds}: expected A:B, as in 0:5 for 0, 1, 2, 3 and 4')
    runs = []
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        for seed in range(int(ends[1]), int(ends[2])):
            name = '_'.join(f'{k}={v}' for k, v in [*settings.items(), ('seed', seed)])
            runs.append(Run(settings, seed, workdir / re.sub(r'[^\w.=+-]+', '-', name)))
    if max(len(run.workdir.name) for run in runs) > LONGEST_NAME:
        raise UserError(
            '--set: too many settings for the name of a folder; put those that all runs share into '
            'the config file'
        )
    if len({run.workdir for run in runs}) < len(runs):
        raise UserError('--set: expected different values')
    return runs


def run_all(runs: Sequence[Run], config: Config, command: Sequence[str]) -> int:
    """Calls the command for each unfinished run; returns the exit code."""
    finished = [final_metrics(run, config) is not None for run in runs]
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    worst = 0
    for run, done in zip(runs, finished, strict=True):
        print(f'{run.workdir.name}{": finished" if done else ""}', flush=True)
        if not done:
            options = run.settings | {'seed': run.seed}
            flags = [f'--config.{name}={value}' for name, value in options.items()]
            code = call([*command, f'--workdir={run.workdir}', *flags], asked)
            if asked or code == EXIT_CODE:
                print('stopped; the same command resumes', flush=True)
                return EXIT_CODE
            if code:
                print(f'{run.workdir.name}: exit code {code}', file=sys.stderr, flush=True)
                worst = 1
    return worst


def call(words: Sequence[str], asked: list[int]) -> int:
    """Runs a program, passes signals on to it, and returns its exit code."""
    try:  # in a new session, since a Ctrl-C that reaches train.py twice ends it without saving
        child = subprocess.Popen(words, start_new_session=True)
    except OSError as error:
        raise UserError(f'--command: {words[0]}: {error.strerror}') from error

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        child.terminate()

    for number in SIGNALS:
        signal.signal(number, pass_on)
    if asked:
        child.terminate()
    return child.wait()


def final_metrics(run: Run, config: Config) -> dict[str, float] | None:
    """Returns the metrics of a finished run, or None. Raises UserError if its config differs."""
    steps = run.settings.get('num_steps', str(config.num_steps))
    summary = read_summary(run.workdir, int(steps)) if steps.isdecimal() else {}
    if not summary:
        return None
    saved = json.loads((run.workdir / 'config.json').read_text())
    changes = schema.trajectory_changes(config, saved)
    if others := [x for x in changes if x.partition(':')[0] not in run.settings]:
        raise UserError(
            f'{run.workdir} finished with another config: {"; ".join(others)}; '
            'use the old values or another --workdir'
        )
    return dict(summary['eval'])


def conclude(runs: Sequence[Run], config: Config, workdir: epath.Path) -> None:
    """Prints the table, and writes it with the metrics of each run to sweep.json."""
    groups, of_runs, rows = [], [], []
    for _, group in itertools.groupby(runs, key=lambda run: run.settings):
        found = [(run, final_metrics(run, config)) for run in group]
        of_runs += [{'name': r.workdir.name, 'seed': r.seed, 'eval': e} for r, e in found]
        done = [metrics for _, metrics in found if metrics is not None]
        spread = {name: statistics([e[name] for e in done]) for name in (done or [{}])[0]}
        settings, seeds = found[0][0].settings, f'{len(done)}/{len(found)}'
        groups.append({'settings': settings, 'seeds': seeds, 'metrics': spread})
        shown = {
            name: f'{s["mean"]:.4f}' + (f' ± {s["std"]:.4f}' if len(done) > 1 else '')
            for name, s in spread.items()
        }
        rows.append(settings | {'seeds': seeds} | shown)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([row.get(name, '') for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print('  '.join(f'{x:<{width}}' for x, width in zip(line, widths, strict=True)).rstrip())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps({'table': groups, 'runs': of_runs}, indent=2)
        (workdir / 'sweep.json').write_text(text + '\n')
    except OSError as error:
        raise UserError(f'{workdir}/sweep.json: cannot be written ({error.strerror})') from error


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Returns mean, standard deviation (0 for a single value) and range."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    ends = {'min': min(values), 'max': max(values)}
    return {'mean': float(np.mean(values)), 'std': deviation, **ends}


if __name__ == '__main__':
    run_tool(main)
