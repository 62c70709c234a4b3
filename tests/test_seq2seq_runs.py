"""Sequence to sequence keeps what the trainer promises: the same bits, whatever happens."""

import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs

ADDITION = 'configs/addition.py'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcome of a run on two devices that nothing happened to."""
    workdir = tmp_path_factory.mktemp('undisturbed')
    printed = runs.finish(workdir, config=ADDITION)
    assert printed.count('  sample  ') == 10  # five at each of two evaluations
    return runs.outcome(workdir)


@pytest.mark.parametrize('devices', [1, 4, 8])
def test_another_device_count_gives_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Any], devices: int
) -> None:
    runs.finish(tmp_path, devices=devices, config=ADDITION)
    assert runs.outcome(tmp_path) == undisturbed


def test_two_processes_give_the_same_bits(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            runs.command(tmp_path, config=ADDITION),
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
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert runs.outcome(tmp_path) == undisturbed


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a run in the middle, without a warning."""
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


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
