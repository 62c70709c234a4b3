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

from errors import UserError
from runtime import processes
from runtime.paths import in_bucket
from runtime.storage import brief, write_whole

LEASE_SECONDS = 60.0  # without renewal, after which another machine takes over
RENEWALS = 6  # in one lease
SETTLED_SECONDS = 0.2  # in which runs that start at the same moment see whose lease stands
LOST = 4  # exit code of a run whose workdir another took over


@contextlib.contextmanager
def exclusive_workdir(workdir: epath.Path) -> Iterator[None]:
    """Holds the workdir inside. Raises UserError where another run holds it.

    Process 0 holds it for all processes of a pod. A folder that stays empty is removed again.
    """
    file, problem, released = workdir / 'lock.json', '', threading.Event()
    me = {'id': uuid.uuid4().hex, 'host': socket.gethostname(), 'process': identity(os.getpid())}
    made: list[epath.Path] = []
    if jax.process_index() == 0:
        if not in_bucket(workdir):
            made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        try:
            problem = refusal(file) or taken(file, me)
        except Exception as error:  # OSError, or whatever the client of a bucket makes of it
            problem = f'can not be written ({brief(error)})'
    if not processes.all_processes(not problem):
        raise UserError(f'{workdir}: {problem or "process 0 can not hold it"}')
    if jax.process_index() != 0:
        yield
        return

    def renew() -> None:
        while not released.wait(LEASE_SECONDS / RENEWALS):
            with contextlib.suppress(Exception):  # storage that fails is told by a save
                owner = read(file)
                if owner and owner['id'] != me['id']:
                    processes.end_now(f'error: {workdir}: another run took it over', LOST)
                write(file, me)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join(LEASE_SECONDS / RENEWALS)
        if not thread.is_alive():  # else storage hangs, and the lease runs out by itself
            with contextlib.suppress(Exception):  # epath says ValueError where it is not empty
                if (read(file) or me)['id'] == me['id']:
                    file.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()


def taken(file: epath.Path, me: dict[str, Any]) -> str:
    """Takes the lease; returns why it can not be, or nothing.

    The last that writes has it. Where a write takes long, so may that of another run.
    """
    began = time.monotonic()
    write(file, me)
    time.sleep(SETTLED_SECONDS + 2 * (time.monotonic() - began))
    owner = read(file)
    return '' if owner and owner['id'] == me['id'] else 'another run has just started in it'


def refusal(file: epath.Path) -> str:
    """Why the workdir can not be taken from the owner its lock names; nothing where it can.

    On this machine a dead owner is known at once. From another machine it is watched: alive, it
    renews its lease soon; what the clocks of the two say does not matter.
    """
    owner = read(file)
    if not owner:
        return ''
    number, *machine = owner['process'].split()
    told = f'process {number} on {owner["host"]} is at work in it; stop it or use another --workdir'
    if owner['host'] == socket.gethostname() and machine[:1] == identity(os.getpid()).split()[1:2]:
        return told if identity(int(number)) == owner['process'] else ''
    logging.warning('%s names a run on %s: watching if it lives', file, owner['host'])
    last = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < last:
        time.sleep(min(1.0, LEASE_SECONDS / RENEWALS))
        now = read(file)
        if not now:
            return ''
        if now != owner:
            return told
    return ''


def identity(process: int) -> str:
    """A process by number, boot of its machine and start, since numbers come again.

    'NUMBER dead' if it is not alive; where there is no /proc, 'NUMBER alive' must do.
    """
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        with contextlib.suppress(ProcessLookupError):
            with contextlib.suppress(PermissionError):
                os.kill(process, 0)
            return f'{process} alive'
        return f'{process} dead'
    try:
        state, *fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        state = 'X'
    return f'{process} dead' if state in 'ZX' else f'{process} {boot} {fields[18]}'


def read(file: epath.Path) -> dict[str, Any] | None:
    """The owner that a lock file names; None without one, or where it is cut."""
    try:
        owner = json.loads(file.read_text())
        whole = all(isinstance(owner[name], str) for name in ('id', 'host', 'process'))
        return owner if whole and int(owner['process'].split()[0]) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, IndexError):
        return None


def write(file: epath.Path, owner: dict[str, Any]) -> None:
    """Takes or renews the lease."""
    write_whole(file, json.dumps(owner | {'renewed': time.time()}).encode(), owner['id'])
