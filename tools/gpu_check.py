"""Checks that runs keep their bits on this machine's accelerators.

    python -m tools.gpu_check [--config=FILE ...] [--platform=cuda] [--steps=300] [-- FLAGS]

Trains each config (by default the embedded reviews and SST-2) for a few steps: twice, once killed
by SIGKILL and started again, and once on one device if there are several. All must give the same
bits. FLAGS go to every train.py.
Exit code 0: they do. 1: they do not. 2: bad input, or a run that failed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from tools import compare_runs
from tools.arguments import Arguments, one_line_errors, run_tool

PROJECT = Path(__file__).resolve().parent.parent
DEVICES = 'import jax; print(len(jax.devices()), jax.devices()[0].device_kind)'


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints a line for every run; returns the exit code."""
    parser = Arguments(__doc__)
    add = parser.add_argument
    add('--config', action='append', metavar='FILE', help='may be given more than once')
    add('--platform', default='cuda', help='value of JAX_PLATFORMS (default: cuda)')
    add('--steps', type=int, default=300, help='steps of each run (default: 300)')
    add('flags', nargs='*', metavar='-- FLAGS', help='flags of train.py')
    given = parser.parse_args(argv)
    env = os.environ | {'JAX_PLATFORMS': given.platform}
    asked = subprocess.run([sys.executable, '-c', DEVICES], env=env, capture_output=True, text=True)
    if asked.returncode:
        raise UserError(
            f'--platform={given.platform}: JAX finds no such device; for NVIDIA GPUs, '
            'make setup ACCELERATOR=cuda13'
        )
    count, _, kind = asked.stdout.strip().partition(' ')
    print(f'{count} x {kind}')
    every = ('num_steps', 'eval_every', 'optimizer.decay_steps')
    options = dict.fromkeys(every, given.steps) | {
        'checkpoint_every': max(1, given.steps // 6),
        'num_shards': count,
    }
    flags = [*(f'--config.{name}={value}' for name, value in options.items()), *given.flags]
    codes = []
    for config in given.config or ('configs/reviews.py', 'configs/sst2.py'):
        with tempfile.TemporaryDirectory(prefix='gpu-check-') as folder:
            codes.append(check(Path(folder), [f'--config={config}', *flags], env, int(count)))
    return max(codes)


def check(folder: Path, flags: Sequence[str], env: dict[str, str], devices: int) -> int:
    """Trains one config in every way and compares. Returns the exit code."""
    print(flags[0])
    ways = {'first': env, 'again': env, 'killed': env}
    if devices > 1:
        first_gpu = env.get('CUDA_VISIBLE_DEVICES', '0').partition(',')[0]
        one = {'CUDA_VISIBLE_DEVICES': first_gpu, 'JAX_NUM_CPU_DEVICES': '1'}
        ways['one device'] = env | one
    code = 0
    for way, its_env in ways.items():
        began, command = time.perf_counter(), [*flags, f'--workdir={folder / way}']
        if way == 'killed':
            kill_after_a_checkpoint(folder / way, command, its_env)
        done = train(command, its_env)
        output, _ = done.communicate()
        if done.returncode:
            raise UserError(f'{way}: train.py exited with {done.returncode}: {output[-300:]}')
        first, this = (compare_runs.load(str(folder / name)) for name in ('first', way))
        same, verdict = compare_runs.compare(first, this)
        print(f'  {way:10} {time.perf_counter() - began:6.1f} s ', end='')
        speed = json.loads((folder / way / 'summary.json').read_text())['examples_per_second']
        print(f'{speed:8.0f} examples/s ', end='')
        print(this.final['state_fingerprint'][:16], 'the same bits' if same else ' '.join(verdict))
        code = max(code, int(not same))
    return code


def kill_after_a_checkpoint(workdir: Path, flags: Sequence[str], env: dict[str, str]) -> None:
    """Starts a run and kills it once it has a checkpoint after that of step 0."""
    process = train(flags, env, subprocess.DEVNULL)
    while process.poll() is None:
        if [p for p in workdir.glob('checkpoints/*') if p.name.isdecimal() and p.name != '0']:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode != -signal.SIGKILL:
        raise UserError(
            f'killed: train.py exited with {process.returncode} before its second checkpoint; '
            'give it more --steps'
        )


def train(
    flags: Sequence[str], env: dict[str, str], output: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Starts train.py."""
    return subprocess.Popen(
        [sys.executable, 'train.py', *flags],
        cwd=PROJECT,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )


if __name__ == '__main__':
    run_tool(main)
