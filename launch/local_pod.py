"""Trains one run in several processes of this machine, on simulated devices: a pod on a laptop.

    python -m launch.local_pod --processes=2 --devices_per_process=4 -- --config=... --workdir=...

The flags after ` -- ` go to every train.py. Each line starts with the number of its process. If a
process fails, the others are stopped, since they would wait for it, and all restart from the newest
checkpoint after 1, 2, 4, ... seconds, up to --restarts times. The exit code is that of the last
failure. SIGTERM, Ctrl-C and a closed terminal are passed on: the run saves and exits with 75; a
second signal stops it at once. No process outlives the launcher (on Linux not even if it is killed
by SIGKILL).
"""

import argparse
import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from errors import REQUEUE, SIGNALS
from runtime.command_line import refuse
from tools.arguments import Arguments

PROJECT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 2.0  # between signals to processes that should end
FINAL = (0, 2, 3, 4, 5, REQUEUE)  # exit codes after which a restart would not help
GLOO_NOISE = 'peer ranks. Expected number of'  # XLA's CPU collectives log every connection
PR_SET_PDEATHSIG = 1  # Linux: sets the signal that a process gets when its parent dies


class PodArguments(Arguments):
    """Parses the arguments of the pod, which precede the flags of train.py."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message}; the flags of train.py come after ' -- '")


def main(argv: Sequence[str]) -> int:
    """Runs the pod; returns the exit code."""
    parser = PodArguments(__doc__)
    add = parser.add_argument
    add('--processes', type=positive, default=2, metavar='N', help='(default: 2)')
    add('--devices_per_process', type=positive, default=4, metavar='N', help='(default: 4)')
    add('--restarts', type=positive_or_zero, default=3, metavar='N', help='(default: 3)')
    add('flags', nargs='*', metavar='-- FLAGS', help='flags of train.py')
    given = parser.parse_args(argv)

    asked: list[int] = []  # signals that the launcher received
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    for attempt in range(given.restarts + 1):
        envs = environments(given.processes, given.devices_per_process)
        code = run_pod(given.flags, envs, asked)
        if asked or code in FINAL or attempt == given.restarts:
            break
        seconds = 2**attempt
        print(f'restarting in {seconds} s, {attempt + 1} of {given.restarts}', flush=True)
        last = time.monotonic() + seconds
        while not asked and time.monotonic() < last:
            time.sleep(0.05)
        if asked:
            return REQUEUE
    return code


def run_pod(
    flags: Sequence[str],
    envs: Sequence[dict[str, str]],
    asked: list[int],
    program: Sequence[str] = ('train.py',),
) -> int:
    """Runs all processes to their end; returns the exit code, as a shell reports it."""
    processes: list[subprocess.Popen[str]] = []
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def pass_on(number: int, _: Any) -> None:
        if asked and number == signal.SIGHUP:
            return  # the kernel and the shell may both send it
        if asked:
            sys.exit(128 + number)
        asked.append(number)
        signal_all(processes, signal.SIGTERM)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        for env in envs:
            processes.append(start([*program, *flags], env))
        relays = watch(processes, ended)
        failed = first_failure(processes, ended)
    finally:
        for number in SIGNALS:  # another Ctrl-C must not keep the processes from being stopped
            signal.signal(number, lambda number, _: asked.append(number))
        stop(processes)
    for thread in relays:
        thread.join(timeout=1)  # a child of the process may hold its output open
    if failed is None:
        return max(process.returncode for process in processes)
    code = processes[failed].returncode
    if asked and code == -signal.SIGTERM:  # before it handled signals, so before it wrote
        return REQUEUE
    cause = f'exit code {code}' if code > 0 else f'signal {signal.Signals(-code).name}'
    print(f'process {failed} ended with {cause}; the others were stopped', file=sys.stderr)
    return code if code > 0 else 128 - code


def positive(text: str) -> int:
    """Parses a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} expected a whole number >= 1')
    return int(text)


def positive_or_zero(text: str) -> int:
    """Parses a count that may be 0."""
    return 0 if text == '0' else positive(text)


def environments(count: int, devices: int) -> list[dict[str, str]]:
    """Returns the environment of each process, with JAX's settings for the pod."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    pod = {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_COORDINATOR_BIND_ADDRESS': address,  # not reachable from other machines
        'JAX_NUM_PROCESSES': str(count),
        'PYTHONUNBUFFERED': '1',
    }
    pod = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'} | os.environ | pod  # see Makefile
    return [pod | {'JAX_PROCESS_ID': str(index)} for index in range(count)]


def start(command: Sequence[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """Starts one process, in a new process group, so that Ctrl-C reaches only the launcher."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=PROJECT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        process_group=0,
        preexec_fn=end_with_parent(),
    )


def end_with_parent() -> Callable[[], None] | None:
    """Returns what a child calls first so that it dies with its parent; None except on Linux."""
    if not sys.platform.startswith('linux'):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def request() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return request


def watch(
    processes: list[subprocess.Popen[str]], ended: queue.SimpleQueue[int]
) -> list[threading.Thread]:
    """Starts threads that print each process's lines and put its index in `ended` at its end.

    Returns the threads that print.
    """
    lock = threading.Lock()

    def relay(index: int) -> None:
        for line in processes[index].stdout or ():
            if GLOO_NOISE in line:
                continue
            with lock:
                print(f'[{index}] {line.rstrip()}', flush=True)

    def report_end(index: int) -> None:
        processes[index].wait()
        ended.put(index)

    jobs = [(job, index) for index in range(len(processes)) for job in (relay, report_end)]
    threads = [threading.Thread(target=job, args=(index,), daemon=True) for job, index in jobs]
    for thread in threads:
        thread.start()
    return threads[::2]


def first_failure(
    processes: list[subprocess.Popen[str]], ended: queue.SimpleQueue[int]
) -> int | None:
    """Waits for all processes or the first that fails, and returns its index."""
    for _ in processes:
        index = ended.get()
        if processes[index].returncode not in (0, REQUEUE):
            return index
    return None


def stop(processes: list[subprocess.Popen[str]]) -> None:
    """Ends those still running: SIGTERM to save, SIGTERM to exit at once, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        signal_all(processes, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.05)


def signal_all(processes: list[subprocess.Popen[str]], number: int) -> None:
    """Sends a signal to every process that still runs, and to its children."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
