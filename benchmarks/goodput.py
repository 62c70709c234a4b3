"""Measures the goodput of a run that is interrupted: the share of time in steps that count.

    python -m benchmarks.goodput [--mean=20] [--seconds=60] [--steps=1000] [--only ROW ...]

Trains configs/reviews.py in one process and as a pod of two. For the first --seconds of each run it
is interrupted at random moments, on average every --mean seconds (a Poisson process, at the same
moments in all runs of a --seed), and started again at once: by SIGTERM with 30 seconds of grace, by
SIGKILL, or in a pod by the loss of a process. Then features are switched off, one in each run.

Prints where the seconds went. Exit code 1 unless every run ends with the bits (parameters,
optimizer state, metrics, each row of the ledger) of the first one, which nothing interrupts.
"""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from benchmarks import accounting
from benchmarks.accounting import PARTS, Account, Life, Span
from launch import local_pod
from reporting.start_report import best_interval
from runtime import ledger
from tools.arguments import Arguments, one_line_errors, run_tool

PROBE = ('-m', 'benchmarks.probe')
CONFIG = 'configs/reviews.py'
ON = ('--config.num_shards=2', '--config.cpu_threads=2', '--config.optimizer.schedule=constant')
GRACE_SECONDS = 30.0
CLOCK = 'saves by the clock'
CACHE = 'compilation cache'
ASYNCHRONOUS = 'asynchronous saves'
TERM, KILL = signal.SIGTERM, signal.SIGKILL


class Row(NamedTuple):
    """A run of the table."""

    name: str
    processes: int
    numbers: tuple[signal.Signals, ...] = ()  # of the signals that interrupt it
    off: str = ''  # a feature


def rows() -> Iterator[Row]:
    """Yields the runs, those without interruptions first."""
    for processes, lost in ((1, 'SIGKILL'), (2, 'lost process')):
        name = f'{processes} process{"es"[: 2 * (processes > 1)]}'
        yield Row(name, processes)
        yield Row(f'{name}, SIGTERM', processes, (TERM,))
        yield Row(f'{name}, {lost}', processes, (KILL,))
        for off in ('', CACHE, CLOCK, ASYNCHRONOUS):
            yield Row(f'{name}, both{off and f", no {off}"}', processes, (TERM, KILL), off)


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints the table and advice; returns the exit code."""
    if argv[:1] == ['--pod']:
        return pod(*argv[1:])
    parser, known = Arguments(__doc__), {row.name: row for row in rows()}
    add = parser.add_argument
    add('--mean', type=float, default=20, help='seconds between interruptions (default: 20)')
    add('--seconds', type=float, default=60, help='no interruption after these (default: 60)')
    add('--steps', type=int, default=1000, help='of the training (default: 1000)')
    add('--seed', type=int, default=0, help='of the moments (default: 0)')
    add(
        '--only',
        nargs='+',
        choices=known,
        default=list(known),
        metavar='ROW',
        help='(default: all)',
    )
    given = parser.parse_args(argv)
    if not given.mean > 0 or given.steps < 1:
        parser.error(f'--mean={given.mean:g} --steps={given.steps}: expected both above 0')
    print(header(), flush=True)
    failed = []
    with tempfile.TemporaryDirectory(prefix='goodput-') as folder:
        first = Row('1 process, nothing compiled yet', 1)
        flags = (f'--config={CONFIG}', *ON, f'--config.num_steps={given.steps}')
        lives = trained(first, Path(folder), flags, given)
        expected = outcome(Path(folder) / first.name)
        print(line(first.name, accounting.account(lives)), flush=True)
        save = cost_of_save(lives)
        minutes = f'--config.checkpoint_minutes={best_interval(save, given.mean) / 60}'
        for row in (known[name] for name in given.only):
            clock = (minutes,) if row.numbers and row.off != CLOCK else ()
            found = accounting.account(trained(row, Path(folder), (*flags, *clock), given))
            same = outcome(Path(folder) / row.name) == expected
            failed += [] if same else [row.name]
            print(line(row.name, found), flush=True)
    print(advice(save, given.mean))
    print(f'\nother bits than the first run: {"; ".join(failed) or "none"}')
    return 1 if failed else 0


def pod(processes: str, *arguments: str) -> int:
    """Runs a pod of probes with one device each and no restarts. Returns its exit code."""
    envs = local_pod.environments(int(processes), 1)
    return local_pod.run_pod(arguments, envs, [], PROBE)


def trained(row: Row, folder: Path, flags: Sequence[str], given: Any) -> list[Life]:
    """Trains to the end, through interruptions. Returns the lives of the run."""
    arrivals, chance = (random.Random(f'{given.seed} {use}') for use in ('moments', 'signals'))
    began, lives = time.time(), list[Life]()
    waits = (arrivals.expovariate(1 / given.mean) for _ in itertools.count())
    moments = itertools.accumulate(waits, initial=began)
    while True:
        moment = next(moment for moment in moments if moment > time.time())
        moment = moment if moment < began + given.seconds and row.numbers else math.inf
        life, code = lived(row, folder, flags, moment, chance)
        lives.append(life)
        if life.hit == math.inf:
            if code:
                raise SystemExit(f'{row.name}: exit code {code}\n{(folder / "log").read_text()}')
            return lives


def lived(
    row: Row, folder: Path, flags: Sequence[str], moment: float, chance: random.Random
) -> tuple[Life, int]:
    """Trains until `moment`, or to the end. Returns what was seen of it, and the exit code."""
    events, saves = folder / 'events', 'synchronous' if row.off == ASYNCHRONOUS else 'asynchronous'
    shutil.rmtree(events, ignore_errors=True)
    events.mkdir()
    probe = [str(events), saves, f'--workdir={folder / row.name}', *flags]
    as_pod = ('-m', 'benchmarks.goodput', '--pod', str(row.processes))
    command = [*(PROBE if row.processes == 1 else as_pod), *probe]
    env = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '1',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
        'JAX_ENABLE_COMPILATION_CACHE': str(row.off != CACHE).lower(),
    }
    began, hit = time.time(), math.inf
    with (
        (folder / 'log').open('w') as log,
        subprocess.Popen(
            [sys.executable, *command], cwd=local_pod.PROJECT, env=env, stdout=log, stderr=log
        ) as process,
    ):
        try:
            if moment < math.inf:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, moment - began))
                if process.poll() is None:
                    hit = time.time()
                    interrupt(process.pid, chance.choice(row.numbers), row.processes, chance)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_SECONDS)
            else:
                process.wait()
        finally:
            process.kill()
    return Life(began, time.time(), read_spans(events), hit), process.returncode


def interrupt(launcher: int, number: signal.Signals, processes: int, chance: random.Random) -> None:
    """Sends SIGTERM to the launcher as a scheduler would, SIGKILL to one process of a pod."""
    if processes > 1 and number == KILL:
        children = Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split()
        launcher = int(chance.choice(children)) if children else launcher
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(launcher, number)


def read_spans(folder: Path) -> list[Span]:
    """Reads what the probes wrote: all of process 0, and of others what kept it waiting in a step.

    A kill may have cut the last line of a file.
    """
    spans = list[Span]()
    for file in folder.iterdir():
        lines = file.read_text().splitlines(keepends=True)
        found = [Span(*json.loads(line)) for line in lines if line[-1] == '\n']
        spans += [span for span in found if file.name == '0' or span.kind in accounting.INNER]
    return spans


def outcome(workdir: Path) -> tuple[Any, ...]:
    """Returns all that must be the same: final state and metrics, and the bits of every step."""
    summary = json.loads((workdir / 'summary.json').read_text())
    kept = [summary[name] for name in ('step', 'eval', 'state_fingerprint', 'root_key')]
    return *kept, ledger.read(epath.Path(workdir) / 'ledger').tobytes()


def cost_of_save(lives: Sequence[Life]) -> float:
    """Returns the median seconds that a save held training, without that of step 0."""
    saves = [span.end - span.begin for span in lives[0].spans if span.kind == 'save']
    return accounting.median(saves[1:-1], saves[0])  # the last one waits for its end


def header() -> str:
    """Returns the head of the table."""
    columns = ['run', 'hits', 'goodput', 'total s', *(f'{part} s' for part in PARTS)]
    columns += ['most steps lost', 'to the first new step s']
    return f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}'


def line(name: str, found: Account) -> str:
    """Returns the row of a run."""
    parts = [f'{found.seconds[part]:.1f}' for part in PARTS]
    cells = [name, found.hits, f'{found.goodput:.0%}', f'{found.total:.0f}', *parts]
    return f'| {" | ".join(map(str, [*cells, found.most_lost, f"{found.first_step:.1f}"]))} |'


def advice(save: float, mean: float) -> str:
    """Returns how often to save, from what a save costs, for several rates of failure."""
    lines = [f'\nA save held training for {save:.3f} s. Least is lost by a save every']
    for name, between in ((f'{mean:g} s', mean), ('hour', 3600.0), ('day', 86400.0)):
        lines.append(f'{best_interval(save, between):6.1f} s with one failure every {name}')
    return '\n'.join(lines)


if __name__ == '__main__':
    run_tool(main)
