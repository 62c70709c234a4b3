"""Checks that the memory, open files and workdir of a run do not grow, through restarts, too.

    python -m benchmarks.soak [--minutes=30] [--seed=0]

Trains the embedded reviews in one workdir: half of the time in one process, then in launches that
are ended after up to a minute, by SIGKILL and SIGTERM in turn. Prints a row per launch: its steps,
and resident memory, open files and size of the workdir after warm-up and at the end.
"""

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.arguments import Arguments

PROJECT = Path(__file__).resolve().parent.parent
WARM_SECONDS = 30.0


class Sizes(NamedTuple):
    """The sizes that must not grow."""

    memory: int  # MiB resident
    files: int  # open
    workdir: int  # KiB


def main() -> None:
    """Prints a row per launch."""
    parser = Arguments(__doc__)
    parser.add_argument('--minutes', type=float, default=30, help='(default: 30)')
    parser.add_argument('--seed', type=int, default=0, help='of the times (default: 0)')
    given = parser.parse_args()
    chance, began = random.Random(given.seed), time.monotonic()
    print(
        '| seconds | steps | MiB | open files | workdir KiB | ended by |\n|---|---|---|---|---|---|'
    )
    with tempfile.TemporaryDirectory(prefix='soak-') as folder:
        lives, number = given.minutes * 30, signal.SIGTERM
        while True:
            print(launch(Path(folder) / 'run', lives, number), flush=True)
            if time.monotonic() - began > given.minutes * 60:
                break
            lives = WARM_SECONDS + chance.uniform(5, 60)
            number = signal.SIGKILL if number == signal.SIGTERM else signal.SIGTERM


def launch(workdir: Path, seconds: float, number: signal.Signals) -> str:
    """Trains for some seconds, then sends a signal. Returns the row of the table."""
    command = [sys.executable, 'train.py', '--config=configs/reviews.py', f'--workdir={workdir}']
    endless = ['--config.num_steps=100000000', '--config.optimizer.schedule=constant']
    with tempfile.TemporaryFile('w+') as output:
        process = subprocess.Popen(
            [*command, *endless], cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            time.sleep(WARM_SECONDS)
            warm = sizes(process.pid, workdir)
            time.sleep(max(0, seconds - WARM_SECONDS))
            late = sizes(process.pid, workdir)
            process.send_signal(number)
            process.wait()
        finally:
            process.kill()
        output.seek(0)
        steps = [int(step) for step in re.findall(r'step +(\d+)/', output.read())]
    grown = ' | '.join(f'{a} → {b}' for a, b in zip(warm, late, strict=True))
    return f'| {seconds:.0f} | {steps[-1] - steps[0] if steps else 0} | {grown} | {number.name} |'


def sizes(process: int, workdir: Path) -> Sizes:
    """Measures a process and its workdir."""
    status = Path(f'/proc/{process}/status').read_text()
    resident = int(re.findall(r'VmRSS:\s+(\d+) kB', status)[0])
    du = subprocess.run(['du', '-sk', str(workdir)], capture_output=True, text=True, check=False)
    disk = int(du.stdout.split()[0])  # du may fail on a file that has just been deleted
    return Sizes(resident // 1024, len(list(Path(f'/proc/{process}/fd').iterdir())), disk)


if __name__ == '__main__':
    main()
