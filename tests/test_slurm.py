"""The promises of a Slurm job: the same bits, requeued if and only if that helps.

A private cluster runs launch/slurm.sbatch: two nodes, which are this machine twice.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import runs, slurm_cluster
from tests.slurm_cluster import ask
from tests.test_processes import trainers, wait_for

MISSING = slurm_cluster.missing()
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
LONGER = {
    'num_steps': 240,
    'log_every': 40,
    'checkpoint_every': 20,
    'eval_every': 120,
    'data__bucket_lengths': '(42,)',  # one width to compile
}
MIDDLE = r'step +\d+/240  loss'  # logged; at least one checkpoint exists
PAUSE = 0.3  # seconds between questions to Slurm

# Replaces python: exits as its arguments say, LAUNCH,LAUNCH,..., each of PROCESS/PROCESS/...
STAND_IN = """#!/bin/bash
IFS=, read -ra launches <<<"$2"
IFS=/ read -ra ends <<<"${launches[${SLURM_RESTART_COUNT:-0}]}"
end=${ends[SLURM_PROCID]}
echo "gpus ${CUDA_VISIBLE_DEVICES-} jax ${JAX_LOCAL_DEVICE_IDS-}"
case $end in
  killed) kill -9 $$ ;;
  waits) sleep 100 ;;
  hangs) trap '' TERM; touch "$VENV/hangs"; sleep 100 ;;
  then5) until [[ -e $VENV/hangs ]]; do sleep 0.1; done; exit 5 ;;
  saves) trap 'sleep 2; exit 75' TERM; sleep 100 & wait ;;
  *) exit "$end" ;;
esac
"""


class Job:
    """A job of launch/slurm.sbatch on the cluster of `env`."""

    def __init__(self, env: dict[str, str], folder: Path, *words: str, **more: str) -> None:
        """Submits it: flags of sbatch, ' -- ', flags of train.py; `more` environment."""
        self.env, self.output = env, folder / 'output'
        folder.mkdir(parents=True, exist_ok=True)
        flags, rest = words[: words.index('--')], words[words.index('--') + 1 :]
        flags = ('--parsable', '--cpus-per-task=2', f'--output={self.output}', *flags)
        script = str(runs.ROOT / 'launch' / 'slurm.sbatch')
        self.id = ask(env | more, 'sbatch', f'--chdir={runs.ROOT}', *flags, script, *rest)
        assert self.id.isdecimal()

    def printed(self) -> str:
        """Returns what it has printed, in all its launches."""
        return self.output.read_text() if self.output.exists() else ''

    def state(self) -> tuple[str, str, int]:
        """Returns state, exit code and restarts, as Slurm reports them."""
        shown = ask(self.env, 'scontrol', 'show', 'job', self.id)
        found = dict(re.findall(r'(JobState|ExitCode|Restarts)=(\S+)', shown))
        return found['JobState'], found['ExitCode'].split(':')[0], int(found['Restarts'])

    def wait_for(self, pattern: str, times: int = 1) -> None:
        """Waits until it has printed so many matches; it must not end before."""
        wait_for(lambda: len(re.findall(pattern, self.printed())) >= times or self.ended(), PAUSE)
        assert len(re.findall(pattern, self.printed())) >= times, self.printed()

    def ended(self) -> bool:
        """Returns whether it will not run again."""
        return self.state()[0] in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')

    def end(self) -> tuple[str, str, int]:
        """Returns its last state."""
        wait_for(self.ended, PAUSE)
        return self.state()


@pytest.fixture(scope='module')
def slurm() -> Iterator[dict[str, str]]:
    """Returns the environment of a cluster."""
    with slurm_cluster.cluster() as env:
        yield env


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run in one process."""
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    runs.finish(workdir, devices=1, **LONGER)
    return workdir


@pytest.fixture
def submit(slurm: dict[str, str], tmp_path: Path) -> Callable[..., Job]:
    """Submits (flags of sbatch, exits of the stand-in, environment): two processes on a node."""
    python = tmp_path / 'bin' / 'python'
    python.parent.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)
    number = itertools.count()

    def start(flags: str, ends: str, **env: str) -> Job:
        flags = f'--ntasks-per-node=2 --cpus-per-task=1 {flags}'
        env = {'VENV': str(tmp_path), **env}
        return Job(slurm, tmp_path / str(next(number)), *flags.split(), '--', ends, **env)

    return start


def test_job_equals_undisturbed_run_through_a_crash_and_a_requeue(
    slurm: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    """Two nodes, a process on each."""
    job = train(slurm, tmp_path, '--nodes=2', devices=2)
    job.wait_for(MIDDLE)
    os.kill(trainers(tmp_path / 'run')[1], signal.SIGKILL)
    job.wait_for(r'resumed after step [1-9](?s:.)*' + MIDDLE)
    ask(slurm, 'scontrol', 'requeue', job.id)
    assert job.end() == ('COMPLETED', '0', 2), job.printed()
    assert len(re.findall(r'resumed after step [1-9]', job.printed())) == 2
    assert runs.outcome(tmp_path / 'run') == runs.outcome(undisturbed)


def test_job_equals_undisturbed_run_through_its_signal(
    slurm: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    """Two nodes, two processes on each."""
    job = train(slurm, tmp_path, '--nodes=2', '--ntasks-per-node=2', devices=1)
    job.wait_for(MIDDLE)
    ask(slurm, 'scancel', '--signal=TERM', job.id)
    assert job.end() == ('COMPLETED', '0', 1), job.printed()
    (step,) = re.findall(r'stopped after step (\d+) as asked', job.printed())
    assert f'resumed after step {step}' in job.printed()
    assert runs.outcome(tmp_path / 'run') == runs.outcome(undisturbed)


def train(slurm: dict[str, str], folder: Path, *flags: str, devices: int) -> Job:
    """Submits a job that trains in `folder`/run, with so many devices in each process."""
    words = runs.command(folder / 'run', **LONGER)[2:]
    env = {'VENV': str(Path(sys.executable).parent.parent)}
    return Job(slurm, folder, *flags, '--', *words, **runs.environment(devices, **slurm, **env))


def test_how_processes_end_decides_whether_the_job_starts_again(submit: Callable[..., Job]) -> None:
    expected = {
        '0/0': ('COMPLETED', '0', 0),
        '2/saves': ('FAILED', '2', 0),
        '3/waits': ('FAILED', '3', 0),
        'saves/4': ('FAILED', '4', 0),
        '5/waits': ('FAILED', '5', 0),
        '75/75,75/75,0/0': ('COMPLETED', '0', 2),  # asked to stop: any number of times
        'killed/saves,0/0': ('COMPLETED', '0', 1),
        '1/saves,1/saves,0/0': ('FAILED', '129', 1),  # a crash, although one was asked to stop
        'waits/killed,killed/waits,0/0': ('FAILED', '137', 1),
    }
    jobs = {ends: submit('', ends, MAX_RESTARTS='1') for ends in expected}
    assert {ends: job.end() for ends, job in jobs.items()} == expected
    assert 'exit code 129 after 1 restarts: not requeued' in jobs['1/saves,1/saves,0/0'].printed()


def test_a_process_that_has_to_be_killed_does_not_hide_that_another_failed_for_good(
    submit: Callable[..., Job],
) -> None:
    job = submit('', 'then5/hangs,0/0')
    state, code, restarts = job.end()
    assert (state, restarts) == ('FAILED', 0), job.printed()
    assert code in ('137', '5'), job.printed()  # by which of the two srun hears of last


def test_what_slurm_does_decides_whether_the_job_starts_again(
    slurm: dict[str, str], submit: Callable[..., Job]
) -> None:
    """None of these counts as a crash: MAX_RESTARTS=0."""
    signalled = [submit('', f'{end}/{end},0/0', MAX_RESTARTS='0') for end in ('saves', 'waits')]
    ending = submit('', 'killed/saves,0/0')
    limited = submit('--time=1', 'saves/saves,0/0', MAX_RESTARTS='0')
    requeued = submit('', 'waits/waits,0/0', MAX_RESTARTS='0')
    cancelled = submit('', 'saves/saves,0/0')
    for job in (*signalled, limited, requeued, cancelled):
        job.wait_for('gpus', times=2)
    ending.wait_for('Terminating')
    for job in signalled:
        ask(slurm, 'scancel', '--signal=TERM', job.id)
    ask(slurm, 'scontrol', 'requeue', requeued.id)
    ask(slurm, 'scancel', cancelled.id, ending.id)
    for job in (*signalled, limited, requeued):
        assert job.end() == ('COMPLETED', '0', 1), job.printed()
    for job in (cancelled, ending):
        state, _, restarts = job.end()
        assert (state, restarts) == ('CANCELLED', 0), job.printed()


def test_missing_set_up_is_one_line(submit: Callable[..., Job]) -> None:
    job = submit('--ntasks-per-node=1', '', VENV='nowhere')
    assert job.end() == ('FAILED', '2', 0)
    lines = [line for line in job.printed().splitlines() if 'error: no nowhere/bin/python' in line]
    assert len(lines) == 1, job.printed()
    assert 'after make setup' in lines[0]


def test_a_process_gets_the_gpus_that_are_its_own(submit: Callable[..., Job]) -> None:
    expected = {
        '--ntasks-per-node=1 --gpus-per-node=2': {'gpus 0,1 jax 0,1'},
        '--ntasks-per-node=1 --gpus-per-task=2': {'gpus 0,1 jax 0,1'},
        '--ntasks-per-node=2 --gpus-per-task=1': {'gpus 0 jax 0', 'gpus 1 jax 0'},
        '--ntasks-per-node=2 --gpus-per-task=2': {'gpus 0,1 jax 0,1', 'gpus 2,3 jax 0,1'},
        '--ntasks-per-node=2 --gpus-per-node=4': {'gpus 0,1,2,3 jax 0,1', 'gpus 0,1,2,3 jax 2,3'},
        '--ntasks-per-node=4 --gpus-per-node=4': {f'gpus 0,1,2,3 jax {n}' for n in range(4)},
        '--ntasks-per-node=1': {'gpus  jax '},
    }
    for flags, lines in expected.items():
        job = submit(f'--nodes=2 {flags}', '/'.join('0' * 8))
        assert job.end() == ('COMPLETED', '0', 0), job.printed()
        assert set(re.findall(r'gpus \S* jax \S*', job.printed())) == lines


def test_gpus_that_cannot_be_shared_equally_are_refused(submit: Callable[..., Job]) -> None:
    job = submit('--ntasks-per-node=3 --gpus-per-node=4', '0/0/0')
    assert job.end() == ('FAILED', '2', 0)
    assert re.search(r'error: 4 GPUs on \S+ for 3 processes; give --ntasks-per', job.printed())


def test_nothing_outlives_the_cluster() -> None:
    with slurm_cluster.cluster() as env:
        ask(env, 'sbatch', '--output=/dev/null', '--wrap', 'srun sleep 1000')
        wait_for(lambda: 'sleep' in started_with(env))
        assert len(started_with(env)) >= 6
    wait_for(lambda: not started_with(env))


def started_with(env: dict[str, str]) -> list[str]:
    """Returns the programs that run in a cluster."""
    found, sign = [], f'SLURM_CONF={env["SLURM_CONF"]}'.encode()
    for folder in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if sign in (folder / 'environ').read_bytes().split(b'\0'):
                found.append((folder / 'comm').read_text().strip())
    return found
