"""Measures the time from the start of a process to its first step, and the peak memory."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import CONFIG, ROOT, Row

ROUNDS = 3


def measure() -> list[Row]:
    """Measures with an empty compilation cache, and with that of the launch before."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        launch(scratch / 'run', scratch / 'cache')  # the first one reads the packages from disk
        cold, warm = [], []
        for number in range(ROUNDS):
            cache = scratch / f'cache{number}'
            cold.append(launch(scratch / f'cold{number}', cache))
            warm.append(launch(scratch / f'warm{number}', cache))
    return [
        ('time to the first step, empty compilation cache', float(np.median(cold)), 's'),
        ('time to the first step, warm compilation cache', float(np.median(warm)), 's'),
        (
            'peak resident memory',
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
            'MiB',
        ),
    ]


def launch(workdir: Path, cache: Path) -> float:
    """Trains one step; returns the seconds until its line is logged."""
    command = [sys.executable, 'train.py', f'--config={CONFIG}', f'--workdir={workdir}']
    command += ['--config.num_steps=1', '--config.log_every=1', '--config.optimizer.warmup_steps=0']
    env = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)}
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if 'step 1/1' in line)
        seconds = time.perf_counter() - began
        assert 'loss' in line, line
        process.stdout.read()
    assert process.returncode == 0
    return seconds
