"""Runs of train.py for tests: a configuration that is done in seconds, and its outcome."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from runtime import backend, ledger

ROOT = Path(__file__).resolve().parent.parent
# What tests compile is kept for all processes, for the next time, and for copies of the project.
COMPILED = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(
    ROOT / '.pytest_cache' / 'compiled' / backend.processor_kind()
)

STEPS = {
    'num_steps': 24,
    'num_shards': 8,
    'cpu_threads': 8,
    'batch_size': 16,
    'eval_batch_size': 64,
    'eval_every': 12,
    'checkpoint_every': 6,
    'log_every': 5,
    'data.window_batches': 4,
    'model.embedding_size': 8,
    'model.hidden_size': 8,
    'optimizer.clip_norm': 0.05,
    'optimizer.warmup_steps': 4,
}
REVIEWS = STEPS | {
    'data.num_train': 300,
    'data.num_eval': 100,
    'data.min_frequency': 2,
    'data.bucket_lengths': '(24,42)',
}
SMALL = {
    'configs/reviews.py': REVIEWS | {'data.affixes': '(3,2)'},
    'configs/reviews_transformer.py': REVIEWS | {'model.num_layers': 1, 'model.num_heads': 2},
}


def command(workdir: Path, config: str = 'configs/reviews.py', **overrides: Any) -> list[str]:
    """The command line of a small run; overrides by dotted name, with __ for the dot."""
    named = {name.replace('__', '.'): value for name, value in overrides.items()}
    return [
        sys.executable,
        'train.py',
        f'--config={config}',
        f'--workdir={workdir}',
        *(f'--config.{name}={value}' for name, value in (SMALL.get(config, STEPS) | named).items()),
    ]


PASSED_ON_BY_MAKE = ('ARGS', 'MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS')
SET_BY_PREPARE = ('XLA_FLAGS', 'PJRT_NPROC')  # by tests/conftest.py, which users lack


def environment(devices: int, **extra: str) -> dict[str, str]:
    """The environment of a run on simulated CPU devices, otherwise as in a fresh shell."""
    ours = (*PASSED_ON_BY_MAKE, *SET_BY_PREPARE)
    kept = {name: text for name, text in os.environ.items() if name not in ours}
    return kept | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_COMPILATION_CACHE_DIR': COMPILED,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        **extra,
    }


def start(workdir: Path, devices: int = 2, **overrides: Any) -> subprocess.Popen[str]:
    """Starts a small run and returns at once."""
    return subprocess.Popen(
        command(workdir, **overrides),
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(workdir: Path, devices: int = 2, **overrides: Any) -> str:
    """Runs to the end, and returns what was printed."""
    process = start(workdir, devices, **overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def copied(folder: Path) -> Path:
    """A copy of the project whose .venv is this Python, for what changes its files."""
    copy, venv = folder / 'project', folder / 'project' / '.venv'
    left = shutil.ignore_patterns(
        '.git', '.venv*', 'runs', '__pycache__', '.hypothesis', '.pytest_cache'
    )
    shutil.copytree(ROOT, copy, ignore=left)
    venv.mkdir()
    for name in ('bin', 'lib', 'pyvenv.cfg'):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    for name in ('accelerator', 'ready-cpu'):  # complete, and newer than the requirements
        (venv / name).write_text('cpu\n')
    return copy


def shell(project: Path, commands: str, **extra: str) -> str:
    """What commands of the documents print, run in a copy of the project by one shell."""
    path = f'{project / ".venv" / "bin"}:{os.environ["PATH"]}'
    return printed(['bash', '-ec', commands], project, environment(2, PATH=path, **extra), 1800)


def printed(command: Sequence[str], folder: Path, env: dict[str, str], timeout: float) -> str:
    """Returns what a command prints, to both outputs, after asserting that it succeeded."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def outcome(workdir: Path) -> dict[str, Any]:
    """All that two runs must share to be the same run: summary, and the bits of every step."""
    summary = json.loads((workdir / 'summary.json').read_text())
    kept = ('step', 'eval', 'state_fingerprint', 'root_key', 'num_shards')
    book = ledger.read(epath.Path(workdir) / 'ledger')
    return {name: summary[name] for name in kept} | {'ledger': book.tobytes()}


def check_refusal(result: tuple[int, str, str], expected: str) -> None:
    """Checks that a command (exit code, output, errors) was refused in one line, and why."""
    code, output, errors = result
    assert (code, output) == (2, '')
    (line,) = errors.splitlines()
    assert line.startswith('error: ')
    assert expected in line
