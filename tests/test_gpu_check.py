"""The promises of tools/gpu_check.py, on simulated devices."""

import re
import subprocess
import sys

import pytest

from tests import runs


def gpu_check(*flags: str, devices: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs the tool."""
    return subprocess.run(
        [sys.executable, '-m', 'tools.gpu_check', *flags],
        cwd=runs.ROOT,
        env=runs.environment(devices),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_missing_gpu_is_one_line() -> None:
    done = gpu_check()
    assert done.returncode == 2
    assert done.stderr.startswith('error: --platform=cuda: JAX finds no such device')
    assert done.stderr.count('\n') == 1


@pytest.mark.long
def test_only_runs_that_differ_are_reported_as_different() -> None:
    """With psum, one device gives other bits than four; runs on four agree."""
    config = 'configs/reviews.py'
    small = [flag for flag in runs.command(runs.ROOT, config)[4:] if 'every' not in flag]
    small = [flag for flag in small if not re.search('num_steps|num_shards', flag)]
    flags = [*small, '--config.num_shards=4', '--config.reduction=psum']
    done = gpu_check(f'--config={config}', '--platform=cpu', '--steps=36', '--', *flags, devices=4)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()[2:]
    ways = ['first', 'again', 'killed', 'one device']
    assert [line[2:12].strip() for line in lines] == ways
    same = [line.endswith('the same bits') for line in lines]
    assert same == [True, True, True, False]
