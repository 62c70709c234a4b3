"""Trains a config for a few steps on several layouts and compares the bits.

    python -m tools.exactness --config=FILE [--config.FIELD=VALUE ...]
        [--layouts=1,2,4,8,2x4,4x2] [--steps=6]

A layout is a number of simulated CPU devices in one process, or PROCESSESxDEVICES. Each runs in
separate processes: layouts in one process would share a thread pool, which hides differences.
Exit code 0: all have the same bits. 1: they differ. 2: bad input, or a layout that failed.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs.schema import Config
from errors import UserError
from runtime import command_line
from tools import compare_runs

PROJECT = Path(__file__).resolve().parent.parent

CONFIG = config_flags.DEFINE_config_file('config', None, 'What to train.')
LAYOUTS = flags.DEFINE_list(
    'layouts', '1,2,4,8,2x4,4x2', 'Devices in one process, or PROCESSESxDEVICES.'
)
STEPS = flags.DEFINE_integer('steps', 6, 'Training steps on every layout.', lower_bound=1)


def main() -> None:
    """Prints a line for every layout and exits."""
    config = command_line.checked_config(CONFIG)
    devices = {layout: device_count(layout) for layout in LAYOUTS.value}
    shards = config.num_shards or max(devices.values(), default=1)
    usable = [layout for layout in devices if shards % devices[layout] == 0]
    for layout, count in devices.items():
        if layout not in usable:
            print(f'{layout:>6}  left out: {count} devices do not divide {shards} shards')
    if len(usable) < 2:
        raise UserError(f'--layouts: expected at least two that divide {shards} shards')
    with tempfile.TemporaryDirectory(prefix='exactness-') as folder:
        threads = config.cpu_threads or max(devices[layout] for layout in usable)
        sys.exit(compare(Path(folder), usable, short_run(config, shards, threads)))


def device_count(layout: str) -> int:
    """Returns the devices of all processes. Raises UserError for an invalid layout."""
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', layout):
        raise UserError(f'--layouts: {layout!r}, expected devices or PROCESSESxDEVICES')
    processes, _, devices = layout.rpartition('x')
    return int(processes or 1) * int(devices)


def short_run(config: Config, shards: int, threads: int) -> list[str]:
    """Returns the config flags of this command, for a few steps and an evaluation at the end."""
    every = ('num_steps', 'eval_every', 'checkpoint_every', 'log_every')
    rule = config.optimizer
    decay_steps = rule.decay_steps or max(config.num_steps, rule.warmup_steps + 1)
    options = dict.fromkeys(every, STEPS.value) | {
        'num_shards': shards,
        'cpu_threads': threads,
        'optimizer.decay_steps': decay_steps,
    }
    given, args = [], iter(sys.argv[1:])
    for arg in args:
        if re.fullmatch('--?(layouts|steps)', arg):
            next(args, None)  # its value
        elif not re.match('--?(layouts|steps)=', arg):
            given.append(arg)
    return [*given, *(f'--config.{name}={value}' for name, value in options.items())]


def compare(folder: Path, layouts: Sequence[str], flags: Sequence[str]) -> int:
    """Runs the layouts in turn and compares each with the first. Returns the exit code."""
    first, code = '', 0
    for layout in layouts:
        began = time.perf_counter()
        problem = run(layout, [*flags, f'--workdir={folder / layout}'])
        took = f'{layout:>6}  {time.perf_counter() - began:6.1f} s '
        if problem:
            print(took, f'failed: {problem}', flush=True)
            code = 2
            continue
        first = first or layout
        one, other = (compare_runs.load(str(folder / name)) for name in (first, layout))
        same, verdict = compare_runs.compare(one, other)
        outcome = 'the same bits' if same else f'other bits than {first}. {" ".join(verdict)}'
        print(took, other.final['state_fingerprint'][:16], outcome, flush=True)
        code = max(code, int(not same))
    return code


def run(layout: str, flags: Sequence[str]) -> str:
    """Trains on one layout. Returns the error of a run that failed, or ''."""
    processes, _, devices = layout.rpartition('x')
    program = ['train.py']
    if processes:
        pod = [f'--processes={processes}', f'--devices_per_process={devices}', '--']
        program = ['-m', 'launch.local_pod', *pod]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': devices}
    done = subprocess.run(
        [sys.executable, *program, *flags],
        cwd=PROJECT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    lines = [line for line in done.stdout.splitlines() if 'error' in line.lower()]
    return (lines or [f'exit code {done.returncode}'])[-1] if done.returncode else ''


if __name__ == '__main__':
    command_line.run(main)
