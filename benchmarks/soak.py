"""Does a run grow? The embedded reviews, trained on and on, killed now and then; memory and files.

    python -m benchmarks.soak [--minutes=30] [--seed=0]

Half of the time one process lives; the rest is launches that are killed after up to a minute, by
SIGKILL or SIGTERM in turn, all in one workdir. For each launch the table has the steps it took, and
its resident memory, open files and the size of the workdir when it was warm and at its end.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
WARM_SECONDS = 30.0


class Sizes(NamedTuple):
    """What may not grow."""

    memory: int  # MiB resident
    files: int  # open
    workdir: int  # KiB


def main() -> None:
    """Prints a row for every launch."""
    parser = argparse.ArgumentParser(prog='soak')
    parser.add_argument('--minutes', type=float, default=30)
    parser.add_argument('--seed', type=int, default=0)
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
    """Trains for some seconds, then sends a signal. Returns the row."""
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
    """Of a process, and of the folder it writes to."""
    status = Path(f'/proc/{process}/status').read_text()
    resident = int(re.findall(r'VmRSS:\s+(\d+) kB', status)[0])
    du = subprocess.run(['du', '-sk', str(workdir)], capture_output=True, text=True, check=False)
    disk = int(du.stdout.split()[0])  # of what was there while it looked
    return Sizes(resident // 1024, len(list(Path(f'/proc/{process}/fd').iterdir())), disk)


if __name__ == '__main__':
    main()
