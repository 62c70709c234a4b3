"""The fault matrix: runs killed in every phase and at file events of a save, resumed, compared.

    python -m tests.faults [--rounds=3] [--table=FILE.md]

A round goes through every phase by SIGKILL and by SIGTERM, for an LSTM, a Transformer and a
Transformer that is fine-tuned from it, in one process and in two. The kills of a round and case hit
one run, each after the run was started again; then it is let go to its end, and must be the
undisturbed run bit for bit. Exit code 1 where one is not.
"""

import argparse
import collections
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from errors import REQUEUE
from tests import runs

LSTM, TRANSFORMER = 'configs/reviews.py', 'configs/reviews_transformer.py'
PHASES = ('start', 'set-up', 'compilation', 'step', 'evaluation', 'save')
LONGER = {'num_steps': 400, 'eval_every': 40, 'checkpoint_every': 25, 'log_every': 4}
PATIENCE = 300.0
USUAL = {signal.SIGKILL: (-9, 137), signal.SIGTERM: (REQUEUE, -15, 0)}  # exit codes of a kill
SAVES = 10  # file events of a save, of which one is picked


class Case(NamedTuple):
    """What is run, and how it is killed."""

    config: str
    processes: int
    number: signal.Signals
    overrides: dict[str, Any] | None = None


class Launch:
    """A run that is under way, and what it has printed."""

    def __init__(self, case: Case, workdir: Path) -> None:
        """Starts it."""
        self.workdir, self.case, self.began = workdir, case, time.time()
        command = runs.command(workdir, case.config, **LONGER, **(case.overrides or {}))
        if case.processes > 1:
            pod = [f'--processes={case.processes}', '--devices_per_process=1', '--restarts=0']
            command = [command[0], '-m', 'launch.local_pod', *pod, '--', *command[2:]]
        with tempfile.NamedTemporaryFile('w', suffix='.log', delete=False) as output:
            self._output = Path(output.name)
            self.process = subprocess.Popen(
                command,
                cwd=runs.ROOT,
                env=runs.environment(2, PYTHONUNBUFFERED='1'),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def printed(self) -> str:
        """The output so far."""
        return self._output.read_text(errors='replace')

    def wait_for(self, condition: Callable[[], Any]) -> bool:
        """Returns as soon as `condition()` holds, or False if the run ends before."""
        limit = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < limit, self.printed()
            time.sleep(0.001)
        return True

    def kill(self) -> None:
        """SIGTERM goes to the launcher as from a scheduler, SIGKILL to one process of the pod."""
        victim = self.process.pid
        if self.case.processes > 1 and self.case.number == signal.SIGKILL:
            children = Path(f'/proc/{victim}/task/{victim}/children').read_text().split()
            victim = int(random.choice(children)) if children else victim
        os.kill(victim, self.case.number)

    def ended(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self._output.unlink(missing_ok=True)


def file_events(launch: Launch, count: int) -> bool:
    """Waits until the folder of checkpoints was seen to change `count` times."""
    folder, changes = launch.workdir / 'checkpoints', 0

    def listing() -> list[str]:
        return sorted(itertools.chain(*(dirs + names for _, dirs, names in os.walk(folder))))

    seen = listing()

    def changed() -> bool:
        nonlocal seen, changes
        now = listing()
        changes += now != seen
        seen = now
        return changes >= count

    return launch.wait_for(changed)


def phases(chance: random.Random, done: int) -> dict[str, Callable[[Launch], bool]]:
    """Phase -> a wait until a launch is in it, which says whether it came there.

    `done` is the step of the newest checkpoint: what is waited for is still to come.
    """

    def line(text: str, delay: float) -> Callable[[Launch], bool]:
        def wait(launch: Launch) -> bool:
            arrived = launch.wait_for(lambda: text in launch.printed())
            time.sleep(chance.uniform(0, delay))
            return arrived

        return wait

    def started(launch: Launch) -> bool:
        time.sleep(chance.uniform(0, 3))
        return True

    def locked(launch: Launch) -> bool:
        lock = launch.workdir / 'lock.json'
        return launch.wait_for(lambda: lock.exists() and lock.stat().st_mtime > launch.began)

    log, evaluation = LONGER['log_every'], LONGER['eval_every']
    step = done - done % log + log * chance.randint(1, 3)
    evaluated = done - done % evaluation + evaluation
    return {
        'start': started,
        'set-up': locked,
        'compilation': line('root key', 1.0),
        'step': line(f' step {step:3}/', 0.01),
        'evaluation': line(f' step {evaluated:3}/', 0.02),
        'save': lambda launch: file_events(launch, chance.randint(1, SAVES)),
    }


def disturbed(
    case: Case, workdir: Path, chance: random.Random, names: Sequence[str] = PHASES
) -> Iterator[tuple[str, int]]:
    """(phase, exit code) of each kill; no more where the run is finished before it."""
    for phase in chance.sample(names, len(names)):
        steps = [int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdecimal()]
        launch = Launch(case, workdir)
        arrived = phases(chance, max(steps, default=0))[phase](launch)
        if arrived and launch.process.poll() is None and not (workdir / 'summary.json').exists():
            launch.kill()
            yield phase, launch.ended()
        else:
            launch.ended()
            return


def require_same_bits_after_stops(
    config: str, processes: int, names: Sequence[str], folder: Path
) -> None:
    """A short cut of the matrix: SIGTERM in each of these phases, and an undisturbed run."""
    assert Launch(Case(config, 1, signal.SIGKILL), folder / 'undisturbed').ended() == 0
    case, run = Case(config, processes, signal.SIGTERM), folder / 'run'
    codes = dict(disturbed(case, run, random.Random(1), names))
    assert len(codes) > len(names) // 2, 'phases were not reached'
    for phase, code in codes.items():
        assert code in USUAL[case.number], phase
    assert Launch(case, run).ended() == 0
    assert runs.outcome(run) == runs.outcome(folder / 'undisturbed')


def main(argv: list[str]) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--table', type=Path, help='file that the table is written to as well')
    parser.add_argument('--seed', type=int, default=0)
    given = parser.parse_args(argv)
    chance, kills = random.Random(given.seed), collections.Counter[tuple[str, str]]()
    same, odd = collections.Counter[bool](), []
    with tempfile.TemporaryDirectory(prefix='faults-') as folder:
        tuned = {'init__run': f'{folder}/Transformer', 'init__freeze': "('embedding',)"}
        trained: dict[str, tuple[str, dict[str, Any]]] = {
            'LSTM': (LSTM, {}),
            'Transformer': (TRANSFORMER, {}),
            'fine-tuned': (TRANSFORMER, tuned),
        }
        expected = {}
        for name, (config, overrides) in trained.items():
            alone = Launch(Case(config, 1, signal.SIGKILL, overrides), Path(folder) / name)
            assert alone.ended() == 0, name
            expected[name] = runs.outcome(Path(folder) / name)
        rounds, numbers = range(given.rounds), (signal.SIGKILL, signal.SIGTERM)
        for cell in itertools.product(rounds, trained, (1, 2), numbers):
            _, name, processes, signal_number = cell
            config, overrides = trained[name]
            case = Case(config, processes, signal_number, overrides)
            workdir = Path(folder) / '-'.join(map(str, cell))
            for phase, code in disturbed(case, workdir, chance):
                kills[phase, case.number.name] += 1
                if code not in USUAL[case.number]:
                    odd.append(f'{workdir.name}: exit code {code} in {phase}')
            finished = Launch(case, workdir).ended() == 0
            same[finished and runs.outcome(workdir) == expected[name]] += 1
            print(workdir.name, f'{sum(kills.values())} kills, identical {dict(same)}', flush=True)
    lines = ['| killed in | SIGKILL | SIGTERM |', '|---|---|---|']
    lines += [
        f'| {phase} | {kills[phase, "SIGKILL"]} | {kills[phase, "SIGTERM"]} |' for phase in PHASES
    ]
    lines += ['', f'{sum(kills.values())} kills of {same.total()} runs; {same[True]} ended '
              'identical to the undisturbed run.', *odd]  # fmt: skip
    print('\n'.join(lines))
    if given.table:
        given.table.write_text('\n'.join(lines) + '\n')
    return 0 if same[False] == 0 and not odd else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
