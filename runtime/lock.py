"""Lets one run at a time into a workdir.

On a file system the operating system keeps the lock and frees it when its holder dies. A bucket has
no locks. There a run holds a lease: an object that it renews while it lives, always on condition
that nobody else has written the object since.
"""

import contextlib
import errno
import importlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import filelock
import jax
from etils import epath

from errors import SaveFailed, TakenOver, UserError, first_line
from runtime import processes
from runtime.storage import in_bucket, write_whole

LEASE_SECONDS = 60.0  # without a renewal, after which another run may take over
RENEWALS = 6  # in that time


@contextlib.contextmanager
def exclusive_workdir(workdir: epath.Path) -> Iterator[None]:
    """Holds the workdir inside; process 0 holds it for all. Removes it if nothing was written.

    Raises UserError where another run holds it, or where it cannot be written.
    """
    with contextlib.ExitStack() as held:
        with processes.agreed(workdir):
            try:
                if jax.process_index() == 0:
                    held.enter_context((_leased if in_bucket(workdir) else _locked)(workdir))
            except UserError:
                raise
            except Exception as error:  # OSError, or an exception of a bucket's client
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                kind = SaveFailed if full else UserError
                raise kind(f'{workdir}: cannot be written ({first_line(error)})') from error
        yield


def _refusal(workdir: epath.Path, lock: str | bytes) -> UserError:
    """Names the holder that the text of a lock names, or none where the text is cut."""
    holder = _parsed(lock)
    who = f'process {holder.get("pid")} on {holder.get("host")}' if holder else 'another process'
    return UserError(f'{workdir}: held by {who}; stop that run or use another --workdir')


def _me() -> dict[str, Any]:
    return {'host': socket.gethostname(), 'pid': os.getpid()}


def _parsed(lock: str | bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(holder := json.loads(lock), dict):
            return holder
    return {}


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    lock, named = filelock.FileLock(workdir / 'lock', blocking=False), workdir / 'lock.json'
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise _refusal(workdir, named.read_bytes() if named.exists() else '') from error
    try:
        write_whole(named, json.dumps(_me()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # failed storage has been reported by a save
            named.unlink(missing_ok=True)
            (workdir / 'lock').unlink(missing_ok=True)  # safe: filelock notices a removed file
        lock.release()
        with contextlib.suppress(OSError, ValueError):  # a folder that is not empty stays
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _leased(workdir: epath.Path) -> Iterator[None]:
    lease, released = Lease(workdir), threading.Event()
    lease.acquire()
    thread = threading.Thread(target=lease.keep, args=(released,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join(LEASE_SECONDS / RENEWALS)
        if not thread.is_alive():  # otherwise the bucket hangs, and the lease expires
            with contextlib.suppress(Exception):
                lease.release()


class Lease:
    """The object `lock.json` of a workdir in a bucket, written only on the generation last seen."""

    def __init__(self, workdir: epath.Path) -> None:
        """Names the object; asks nothing."""
        storage = importlib.import_module('google.cloud.storage')
        self._errors = importlib.import_module('google.api_core.exceptions')
        self._blob = storage.Blob.from_uri(f'{workdir}/lock.json', storage.Client())
        self._workdir, self._me, self._generation = workdir, _me() | {'id': uuid.uuid4().hex}, 0

    def acquire(self) -> None:
        """Takes the lease, if need be once its holder has not renewed it for its whole length.

        Watching for a renewal needs no clocks that agree. Raises UserError where another has it.
        """
        lock, self._generation = self._read()
        limit = time.monotonic() + LEASE_SECONDS
        while self._generation and time.monotonic() < limit:
            time.sleep(min(1.0, LEASE_SECONDS / RENEWALS))
            _, now = self._read()
            if now and now != self._generation:
                raise _refusal(self._workdir, lock)
            self._generation = now
        try:
            self._write()
        except self._errors.PreconditionFailed as error:
            raise _refusal(self._workdir, self._read()[0]) from error

    def keep(self, released: threading.Event) -> None:
        """Renews the lease until it is released. Ends the process where another run has it."""
        while not released.wait(LEASE_SECONDS / RENEWALS):
            with contextlib.suppress(Exception):  # a bucket that fails is reported by a save
                self.renew()

    def renew(self) -> None:
        """Renews the lease once."""
        try:
            self._write()
        except self._errors.PreconditionFailed:
            lock, self._generation = self._read()
            # Our own id: an earlier renewal was written, and its answer lost.
            if (holder := _parsed(lock)) and holder.get('id') != self._me['id']:
                problem = f'error: {self._workdir}: another run took it over'
                processes.end_now(problem, TakenOver.exit_code)

    def release(self) -> None:
        """Deletes the lease, unless another run has it."""
        self._blob.delete(if_generation_match=self._generation)

    def _read(self) -> tuple[bytes, int]:
        """Returns the text and the generation of the lease; (b'', 0) where there is none."""
        blob = self._blob.bucket.blob(self._blob.name)  # a new one, which asks for any generation
        try:
            return blob.download_as_bytes(), int(blob.generation)
        except self._errors.NotFound:
            return b'', 0

    def _write(self) -> None:
        data = json.dumps(self._me | {'renewed': time.time()})
        self._blob.upload_from_string(data, if_generation_match=self._generation)
        self._generation = self._blob.generation
