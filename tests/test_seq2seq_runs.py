"""Sequence to sequence keeps what the trainer promises: the same bits, whatever happens."""

import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests import faults, runs
from tests.seq2seq_runs import ADDITION

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcome of a run on two devices that nothing happened to."""
    workdir = tmp_path_factory.mktemp('undisturbed')
    printed = runs.finish(workdir, config=ADDITION)
    assert printed.count('  sample  ') == 10  # five at each of two evaluations
    return runs.outcome(workdir)


@pytest.mark.long
@pytest.mark.parametrize('devices', [1, 4, 8])
def test_another_device_count_gives_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Any], devices: int
) -> None:
    runs.finish(tmp_path, devices=devices, config=ADDITION)
    assert runs.outcome(tmp_path) == undisturbed


def ended_pair(*commands: list[str]) -> list[tuple[int, str]]:
    """Runs one command in each of two processes of a run: exit codes and what was printed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            command,
            cwd=runs.ROOT,
            env=runs.environment(
                2,
                JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}',
                JAX_NUM_PROCESSES='2',
                JAX_PROCESS_ID=str(index),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


@pytest.mark.long
def test_two_processes_give_the_same_bits(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    command = runs.command(tmp_path, config=ADDITION)
    ended = ended_pair(command, command)
    assert [code for code, _ in ended] == [0, 0], ended
    assert runs.outcome(tmp_path) == undisturbed


@pytest.mark.long
def test_processes_with_different_tasks_are_named(tmp_path: Path) -> None:
    """They have other facts, and another number of them."""
    run = tmp_path / 'run'
    for code, output in ended_pair(runs.command(run), runs.command(run, config=ADDITION)):
        assert code == 2, output
        (error,) = (line for line in output.splitlines() if 'error: ' in line)
        assert 'data.source is not the same on process' in error
    assert not run.exists()


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a run in the middle, without a warning."""
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.long
def test_run_killed_and_resumed_on_other_device_counts_equals_undisturbed_run_bit_for_bit(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    first = runs.start(tmp_path, devices=1, config=ADDITION)
    while first.poll() is None and not (tmp_path / 'checkpoints' / '6').exists():
        time.sleep(0.01)
    kill(first)
    second = runs.start(tmp_path, devices=4, config=ADDITION)
    assert second.stdout is not None
    assert any('resumed after step' in line for line in second.stdout)
    kill(second)
    printed = runs.finish(tmp_path, devices=8, config=ADDITION)
    assert 'resumed after step' in printed
    assert runs.outcome(tmp_path) == undisturbed


@pytest.mark.long
def test_two_processes_stopped_in_a_step_or_a_save_equal_the_undisturbed_run(
    tmp_path: Path,
) -> None:
    faults.require_same_bits_after_stops(ADDITION, 2, ('step', 'save'), tmp_path)
