"""Trains a grid of settings with several seeds, and compares the results.

    python -m tools.sweep --config=FILE --workdir=DIR --seeds=0:5
        [--set optimizer.learning_rate=1e-3,3e-3] [--set ...]
        [--vary dropout] [--vary data] [--vary params] [--vary all]
        [--command='sbatch launch/slurm.sbatch']

Each run lives in DIR/NAME. Called again, it skips finished runs and resumes the others. With
--command, that program is called for each unfinished run, with train.py's flags added; when a
scheduler has finished them, call the sweep again for the table.

By default the seeds are those of whole runs. --vary STREAM gives them to one stream of random
numbers (params, dropout, sample or data) and leaves the others as the config has them; `all` is the
whole run. With several --vary the table shows how much of the spread of each metric comes from
initialization, dropout and order (Dodge et al., 2020, arXiv:2002.06305; Bouthillier et al., 2021,
arXiv:2103.03098).

It ends with a table of the final metrics, the mean ± the sample standard deviation over seeds, and
writes DIR/sweep.json. Exit code 0: all runs finished or, with --command, were handed over, 1: some
failed, 2: bad input, 75: it was asked to stop, for example by Ctrl-C; the same command resumes.
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
from errors import REQUEUE, SIGNALS, UserError
from input_pipeline.examples import not_among
from reporting.summary import read_summary
from runtime import resume
from runtime.command_line import check_workdir
from tools.arguments import Arguments, one_line_errors, run_tool
from training import early_stopping

TRAIN = Path(__file__).resolve().parent.parent / 'train.py'
LONGEST_NAME = 200  # of a folder, named after its settings
VARIED = ('params', 'dropout', 'sample', 'data', 'all')


class Run(NamedTuple):
    """One run of the grid."""

    settings: dict[str, str]  # option -> value, as given
    vary: str  # the stream that the seed is for, or 'all'
    seed: int
    workdir: epath.Path

    @property
    def options(self) -> dict[str, str]:
        """Returns option -> value of everything that differs from the config."""
        seeded = 'seed' if self.vary == 'all' else f'seeds.{self.vary}'
        return self.settings | {seeded: str(self.seed)}


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Brings the runs to their end and prints the table; returns the exit code."""
    parser = Arguments(__doc__)
    add = parser.add_argument
    add('--config', required=True, metavar='FILE', help='config of all runs')
    add('--workdir', required=True, metavar='DIR', help='gets a folder for each run')
    add('--seeds', default='0:1', metavar='A:B', help='A, A + 1, .. B - 1 (default: 0:1)')
    add('--set', action='append', default=[], metavar='OPTION=VALUE,...', help='values to try')
    add('--vary', action='append', choices=VARIED, help='what the seeds are for (default: all)')
    add('--command', default='', help='call this for each run instead of training here')
    given = parser.parse_args(argv)
    try:
        command = shlex.split(given.command) or [sys.executable, str(TRAIN)]
    except ValueError as error:
        raise UserError(f'--command={given.command}: {error}') from error
    config, workdir = read_config(given.config), check_workdir(given.workdir)
    runs = grid(config, workdir, given.set, given.seeds, given.vary or ['all'])
    code = carry_out(runs, config, [*command, f'--config={given.config}'])
    conclude(runs, config, workdir)
    return code


def read_config(file: str) -> Config:
    """Returns what the file's get_config() returns. Raises UserError."""
    try:
        config = runpy.run_path(file)['get_config']()
    except Exception as error:  # the file is code, so anything can be raised
        raise UserError(f'--config={file}: {type(error).__name__}: {error}') from error
    if not isinstance(config, Config):
        raise UserError(f'--config={file}: expected a file whose get_config() returns a Config')
    return config


def grid(
    config: Config, workdir: epath.Path, given: Sequence[str], seeds: str, varied: Sequence[str]
) -> list[Run]:
    """Returns all combinations of settings and varied streams, with all seeds. Raises UserError."""
    values: dict[str, list[str]] = {}
    seeded = {'seed', *(f'seeds.{stream}' for stream in VARIED)}
    known = schema.to_dict(config).keys() - seeded
    for setting in given:
        name, _, text = setting.partition('=')
        if name not in known:
            raise UserError(f'--set {setting}: {not_among(name, sorted(known))}')
        values[name] = re.split(r',(?![^()]*\))', text)  # a comma in (16,28) belongs to the value
    ends = re.fullmatch(r'(\d+):(\d+)', seeds)
    if not ends or int(ends[1]) >= int(ends[2]):
        raise UserError(f'--seeds={seeds}: expected A:B, such as 0:5 for 0, 1, 2, 3 and 4')
    runs = []
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        for vary in dict.fromkeys(varied):
            for seed in range(int(ends[1]), int(ends[2])):
                run = Run(settings, vary, seed, workdir)
                name = '_'.join(f'{k}={v}' for k, v in run.options.items())
                folder = workdir / re.sub(r'[^\w.=+-]+', '-', name)
                runs.append(run._replace(workdir=folder))
    if max(len(run.workdir.name) for run in runs) > LONGEST_NAME:
        raise UserError('--set: too many; put what all runs share into the config file')
    if len({run.workdir for run in runs}) < len(runs):
        raise UserError('--set: expected values that differ')
    return runs


def carry_out(runs: Sequence[Run], config: Config, command: Sequence[str]) -> int:
    """Calls the command for each unfinished run; returns the exit code."""
    finished = [final_metrics(run, config) is not None for run in runs]
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    worst = 0
    for run, done in zip(runs, finished, strict=True):
        print(f'{run.workdir.name}{": finished" if done else ""}', flush=True)
        if not done:
            flags = [f'--config.{name}={value}' for name, value in run.options.items()]
            code = call([*command, f'--workdir={run.workdir}', *flags], asked)
            if asked or code == REQUEUE:
                print('stopped; the same command resumes', flush=True)
                return REQUEUE
            if code:
                print(f'{run.workdir.name}: exit code {code}', file=sys.stderr, flush=True)
                worst = 1
    return worst


def call(words: Sequence[str], asked: list[int]) -> int:
    """Runs a program, passing signals on to it. Returns its exit code."""
    try:  # in a new session, because a Ctrl-C that reaches it twice would stop it at once
        child = subprocess.Popen(words, start_new_session=True)
    except OSError as error:
        raise UserError(f'--command: {words[0]}: {error.strerror}') from error

    def pass_on(number: int, _: object) -> None:
        if not asked or number != signal.SIGHUP:  # which may come twice, for one request
            child.terminate()
        asked.append(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    if asked:
        child.terminate()
    return child.wait()


def final_metrics(run: Run, config: Config) -> dict[str, float] | None:
    """Returns the metrics of a run, or None if it is unfinished.

    Raises UserError if the run was trained with another config.
    """
    given = (run.settings.get(name, getattr(config, name)) for name in ('num_steps', 'patience'))
    try:
        last, patience = (int(float(value)) for value in given)  # 2e3 is a number of steps too
    except (ValueError, OverflowError):  # train.py will refuse it
        return None
    record = resume.readable_record(run.workdir) or {}
    for recent in record.get('evaluations', {}).values():  # the best one, and all after it
        if early_stopping.stopped(recent, patience):
            last, _ = recent[-1]
    if not (summary := read_summary(run.workdir, last)):
        return None
    try:
        saved = json.loads((run.workdir / 'config.json').read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{run.workdir}/config.json: cannot be read ({error})') from error
    changes = schema.trajectory_changes(config, saved)
    if others := [x for x in changes if x.partition(':')[0] not in run.options]:
        raise UserError(
            f'{run.workdir} is finished with another config: {"; ".join(others)}; '
            'use the old values, or another --workdir'
        )
    return dict(summary['eval'])


def conclude(runs: Sequence[Run], config: Config, workdir: epath.Path) -> None:
    """Prints the table and writes it, with each run's metrics, to sweep.json. Raises UserError."""
    groups, of_runs, rows = [], [], []
    for _, group in itertools.groupby(runs, key=lambda run: (run.settings, run.vary)):
        found = [(run, final_metrics(run, config)) for run in group]
        of_runs += [
            {'name': r.workdir.name, 'vary': r.vary, 'seed': r.seed, 'eval': e} for r, e in found
        ]
        done = [metrics for _, metrics in found if metrics is not None]
        spread = {name: statistics([e[name] for e in done]) for name in (done or [{}])[0]}
        settings, vary, *_ = found[0][0]
        seeds = f'{len(done)}/{len(found)}'
        groups.append({'settings': settings, 'vary': vary, 'seeds': seeds, 'metrics': spread})
        shown = {name: text_of(values, len(done)) for name, values in spread.items()}
        varied = {'vary': vary} if len({run.vary for run in runs}) > 1 else {}
        rows.append(settings | varied | {'seeds': seeds} | shown)
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
        raise UserError(f'{workdir}/sweep.json: not written ({error.strerror})') from error


def text_of(spread: dict[str, float], seeds: int) -> str:
    """Formats 'mean ± deviation'; a single seed has no deviation."""
    return f'{spread["mean"]:.4f}' + (f' ± {spread["std"]:.4f}' if seeds > 1 else '')


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Returns mean, sample standard deviation (0 for a single value) and range over seeds."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    ends = {'min': min(values), 'max': max(values)}
    return {'mean': float(np.mean(values)), 'std': deviation, **ends}


if __name__ == '__main__':
    run_tool(main)
