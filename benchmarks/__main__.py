"""What training costs, measured on this machine.

    python -m benchmarks [--only NAME ...] [--out=runs/bench]

Each benchmark runs in a process of its own, one after the other; inside, variants take turns, so
that a noisy machine is noisy for all, and medians are shown. Where TFDS_DATA_DIR holds GLUE SST-2
they run configs/sst2.py, elsewhere configs/reviews.py. Into --out go bench.json and bench.md.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.common import CONFIG, Row
from training import backend

BENCHMARKS = {  # name -> module, simulated devices
    'start': ('start', 2),
    'loop on 1 device': ('loop', 1),
    'loop on 8 devices': ('loop', 8),
    'step on 1 device': ('step', 1),
    'step on 8 devices': ('step', 8),
    'recurrence': ('recurrence', 1),
    'data': ('data', 1),
}


def main() -> None:
    """Runs them all, or one whose module is named, in this process."""
    parser = argparse.ArgumentParser('benchmarks', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--only', nargs='+', choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument('--out', type=Path, default=Path('runs/bench'), metavar='DIR')
    parser.add_argument('--module', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.module:
        print(json.dumps(importlib.import_module(f'benchmarks.{given.module}').measure()))
        return
    facts = {'config': CONFIG, 'cores': os.cpu_count(), 'at': f'{datetime.now(UTC):%Y-%m-%d}'}
    facts |= backend.environment()
    given.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in given.only:
        results[name] = run(*BENCHMARKS[name])
        written = json.dumps({'environment': facts, 'results': results}, indent=2)
        (given.out / 'bench.json').write_text(written + '\n')
        (given.out / 'bench.md').write_text(table(results))
    print(table(results))


def run(module: str, devices: int) -> list[Row]:
    """The rows of one benchmark."""
    print(f'{module}, {devices} device(s) ...', file=sys.stderr, flush=True)
    command = [sys.executable, '-m', 'benchmarks', '--module', module]
    env = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def table(results: dict[str, list[Row]]) -> str:
    """Markdown."""
    lines = ['| benchmark | what | value |', '|---|---|---|']
    for name, rows in results.items():
        lines += [f'| {name} | {what} | {value:.4g} {unit} |' for what, value, unit in rows]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
