"""One run in a workdir at a time: a lease that is renewed while its owner lives.

A file and no lock of the operating system, so that it works on an object store too. An owner that
is dead holds it no longer: on the same machine it is looked for, from another its lease runs out.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from configs.schema import BadInput
from training import backend

LEASE_SECONDS = 60.0  # without renewal, after which another machine may take over
RENEWALS = 6  # in one lease
SETTLED_SECONDS = 0.2  # in which runs that start at the same moment see whose lease stands
LOST = 4  # exit code of a run whose workdir another took over


@contextlib.contextmanager
def only_run_in(workdir: epath.Path) -> Iterator[None]:
    """Holds the workdir inside. Raises BadInput where another run holds it.

    Process 0 holds it for all processes of a pod. A folder that stays empty is removed again.
    """
    file, problem, released = workdir / 'lock.json', '', threading.Event()
    me = {'id': uuid.uuid4().hex, 'host': socket.gethostname(), 'process': identity(os.getpid())}
    made: list[epath.Path] = []
    if jax.process_index() == 0:
        problem = refusal(read(file), time.time())
        if not problem:
            made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
            workdir.mkdir(parents=True, exist_ok=True)
            write(file, me)
            time.sleep(SETTLED_SECONDS)
            owner = read(file) or me
            problem = '' if owner['id'] == me['id'] else refusal(owner, time.time())
    if not backend.on_all_processes(not problem):
        raise BadInput(f'{workdir}: {problem or "another run is at work in it"}')
    if jax.process_index() != 0:
        yield
        return

    def renew() -> None:
        while not released.wait(LEASE_SECONDS / RENEWALS):
            with contextlib.suppress(OSError):  # a full disk or a lost one is told by a save
                owner = read(file)
                if owner and owner['id'] != me['id']:
                    logging.error('%s: another run took it over; this one ends', workdir)
                    os._exit(LOST)
                write(file, me)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        if (read(file) or me)['id'] == me['id']:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError, ValueError):  # epath says ValueError where not empty
                for folder in made:
                    folder.rmdir()


def refusal(owner: dict[str, Any] | None, now: float) -> str:
    """Why the workdir can not be taken from `owner`; empty where it can."""
    if not owner:
        return ''
    left = owner['renewed'] + LEASE_SECONDS - now
    number = owner['process'].partition(' ')[0]
    if owner['host'] == socket.gethostname():
        alive = identity(int(number)) == owner['process']
        advice = 'wait for it, stop it, or use another --workdir'
    else:
        alive = left > 0
        advice = f'use another --workdir; if it is dead, start again in {max(1, round(left))} s'
    if not alive:
        return ''
    return f'process {number} on {owner["host"]} is at work in it; {advice}'


def identity(process: int) -> str:
    """A process by number and start, since numbers come again; only the number if none is alive."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        start = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]
    except OSError:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return f'{process}'
        except PermissionError:
            pass
        return f'{process} alive'
    return f'{process} {boot} {start}'


def read(file: epath.Path) -> dict[str, Any] | None:
    """The owner that a lock file names; None without one, or where it is cut."""
    try:
        owner = json.loads(file.read_text())
        return owner if float(owner['renewed']) and int(owner['process'].split()[0]) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def write(file: epath.Path, owner: dict[str, Any]) -> None:
    """Takes or renews the lease."""
    partial = file.parent / f'{file.name}.{owner["id"]}'
    partial.write_text(json.dumps(owner | {'renewed': time.time()}))
    partial.replace(file)
