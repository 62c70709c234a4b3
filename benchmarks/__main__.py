"""Measures what training costs on this machine.

    python -m benchmarks [--only NAME ...] [--out=runs/bench] [--record=FILE]

Runs each benchmark in a separate process, in turn. Within one, variants alternate, so that noise
affects all alike, and the result is the median. Trains configs/sst2.py if TFDS_DATA_DIR holds GLUE
SST-2, otherwise configs/reviews.py. Writes bench.json and bench.md into --out, with the ratio of
each value to that of the version before, from --record or the bench.json that is in --out, if that
ran the same config on the same processor.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import CONFIG
from runtime import backend
from tools.arguments import Arguments

BENCHMARKS = {  # name -> module, simulated devices
    'start': ('start', 1),
    'loop on 1 device': ('loop', 1),
    'loop on 8 devices': ('loop', 8),
    'step on 1 device': ('step', 1),
    'step on 8 devices': ('step', 8),
    'recurrence': ('recurrence', 1),
    'data': ('data', 1),
    'scale': ('scale', 1),
}
if importlib.util.find_spec('torch'):
    BENCHMARKS['pytorch'] = ('pytorch', 1)


def main() -> None:
    """Runs all benchmarks, or in this process the one whose module is given."""
    parser = Arguments(__doc__)
    parser.add_argument(
        '--only', nargs='+', choices=BENCHMARKS, default=list(BENCHMARKS), help='(default: all)'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('runs/bench'), metavar='DIR', help='(default: runs/bench)'
    )
    parser.add_argument(
        '--record', type=Path, metavar='FILE', help='an earlier bench.json (default: in --out)'
    )
    parser.add_argument('--module', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.module:
        rows = importlib.import_module(f'benchmarks.{given.module}').measure()
        print(json.dumps({'rows': rows, 'environment': backend.environment()}))
        return
    facts = {'config': CONFIG, 'cores': os.cpu_count(), 'at': f'{datetime.now(UTC):%Y-%m-%d}'}
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / 'bench.json'
    kept = json.loads(file.read_text()) if file.exists() else {}
    if given.record and not given.record.exists():
        parser.error(f'--record={given.record}: no such file')
    record = json.loads(given.record.read_text()) if given.record else kept
    results = {name: kept[name] for name in BENCHMARKS if name in kept}
    for name in given.only:
        results[name] = run(*BENCHMARKS[name])
        file.write_text(json.dumps(facts | results, indent=2) + '\n')
        (given.out / 'bench.md').write_text(table(results, record))
    print(table(results, record))


def run(module: str, devices: int) -> dict[str, Any]:
    """Runs one benchmark; returns its rows and the environment of its process."""
    print(f'{module}, {devices} device(s) ...', file=sys.stderr, flush=True)
    command = [sys.executable, '-m', 'benchmarks', '--module', module]
    env = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[str, Any], record: dict[str, Any]) -> str:
    """Returns the results as a table in Markdown, beside those of `record`."""
    lines = ['| benchmark | what | value | before | ratio |', '|---|---|---|---|---|']
    for name, found in results.items():
        earlier = record.get(name, {})
        processors = [run.get('environment', {}).get('processor') for run in (found, earlier)]
        alike = record.get('config') == CONFIG and processors[0] == processors[1]
        rows = earlier.get('rows', ()) if alike and found is not earlier else ()
        before = {what: value for what, value, _ in rows}
        for what, value, unit in found['rows']:
            old = before.get(what)
            compared = f'{old:.4g} {unit} | {value / old:.2f}' if old else '|'
            lines.append(f'| {name} | {what} | {value:.4g} {unit} | {compared} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
