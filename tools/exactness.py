"""Trains a config for a few steps on several layouts and compares the bits.

    python -m tools.exactness --config=configs/reviews.py [--layouts=1,2,4,8,2x4,4x2] [--steps=6]
        [--config.FIELD=VALUE ...]

A layout is a number of simulated CPU devices in one process, or PROCESSESxDEVICES. Each runs in
processes of its own: layouts that share a process share a thread pool, which hides differences.
Exit code 0: all the same, bit for bit. 1: not. 2: bad input, or a layout that did not run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from configs.command_line import refuse
from configs.schema import BadInput
from tools import compare_runs

PROJECT = Path(__file__).resolve().parent.parent
LAYOUTS = '1,2,4,8,2x4,4x2'


def main(argv: Sequence[str]) -> int:
    """Prints a line for every layout; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='exactness', description=__doc__.split('\n')[0], allow_abbrev=False
    )
    parser.add_argument('--layouts', default=LAYOUTS, help=f'default {LAYOUTS}')
    parser.add_argument('--steps', type=int, default=6, help='training steps, default 6')
    given, flags = parser.parse_known_args(argv)
    layouts = given.layouts.split(',')
    try:
        if wrong := [text for text in layouts if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', text)]:
            raise BadInput(f'--layouts: {wrong[0]!r}, expected devices or PROCESSESxDEVICES')
        with tempfile.TemporaryDirectory(prefix='exactness-') as folder:
            return compare(Path(folder), layouts, short(flags, given.steps))
    except BadInput as error:
        refuse(error)


def short(flags: Sequence[str], steps: int) -> list[str]:
    """The flags of a run of so many steps, with an evaluation at the end."""
    if steps < 1:
        raise BadInput(f'--steps={steps}: expected at least 1')
    every = ('num_steps', 'eval_every', 'checkpoint_every', 'log_every')
    return [*flags, *(f'--config.{name}={steps}' for name in every)]


def compare(folder: Path, layouts: Sequence[str], flags: Sequence[str]) -> int:
    """Runs the layouts one after another, each beside the first. Returns the exit code."""
    first, code = '', 0
    for layout in layouts:
        began = time.perf_counter()
        problem = run(layout, [*flags, f'--workdir={folder / layout}'])
        took = f'{layout:>6}  {time.perf_counter() - began:6.1f} s '
        if problem:
            print(took, f'did not run: {problem}', flush=True)
            code = 2
            continue
        first = first or layout
        one, other = (compare_runs.load(str(folder / name)) for name in (first, layout))
        same, verdict = compare_runs.compare(one, other)
        told = 'the same bits' if same else f'not the bits of {first}: {verdict[0]}'
        print(took, other.summary['state_fingerprint'][:16], told, flush=True)
        code = max(code, int(not same))
    return code


def run(layout: str, flags: Sequence[str]) -> str:
    """Trains on one layout; returns the last line of what went wrong, or nothing."""
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
    sys.exit(main(sys.argv[1:]))
