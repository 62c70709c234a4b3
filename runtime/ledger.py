"""The ledger: one row of exact bits for every step, in files that never change.

A row is a NumPy record: the finished step, fingerprints of batch, dropout keys and parameters
(uint32), gradient norm and sums of losses (float32). A segment `ledger/FIRST-LAST.npy` is written
before each checkpoint, so that no checkpoint lacks its past. Tools read it without importing JAX.
"""

import collections
import contextlib
import io
import logging
import re
from typing import Any

import numpy as np
from etils import epath

from errors import NonFinite, UserError, first_line
from runtime.storage import write_whole

IN_FLIGHT = 2  # steps that the device may have queued before the host waits for a row


def is_finite(rows: np.ndarray | np.void) -> np.ndarray:
    """Returns for each row whether its step changed the parameters: bool[rows]."""
    return np.isfinite(rows['loss']) & np.isfinite(rows['grad_norm'])


def segments(directory: epath.Path) -> list[tuple[epath.Path, int, int]]:
    """Returns (file, first step, last step) of every segment, in order."""
    if not directory.exists():
        return []
    names = (re.fullmatch(r'(\d+)-(\d+)\.npy', path.name) for path in directory.iterdir())
    steps = sorted((int(name[1]), int(name[2]), name[0]) for name in names if name)
    return [(directory / name, first, last) for first, last, name in steps]


def read(directory: epath.Path, first: int = 1) -> np.ndarray:
    """Returns the rows from step `first` on. Raises UserError for a missing or damaged segment."""
    parts, expected = list[np.ndarray](), first
    for path, start, stop in segments(directory):
        if stop < first:
            continue
        if start > expected or (parts and start < expected):
            raise UserError(f'{path}: expected a segment from step {expected}; one is missing')
        try:
            rows = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except Exception as error:  # NumPy evaluates the header, so a damaged one raises anything
            problem = first_line(error)
            raise UserError(f'{path}: not a ledger segment, damaged or cut ({problem})') from error
        if 'step' not in (rows.dtype.names or ()) or rows.dtype != (parts or [rows])[0].dtype:
            raise UserError(f'{path}: expected the columns of a ledger, as in the segments before')
        if rows['step'].tolist() != list(range(start, stop + 1)):
            raise UserError(f'{path}: expected the rows of steps {start} to {stop}')
        parts.append(rows)
        expected = stop + 1
    if not parts:
        raise UserError(f'{directory}: expected ledger segments (FIRST-LAST.npy), found none')
    rows = np.concatenate(parts)
    return rows[rows['step'] >= first]


class Ledger:
    """Takes the rows of steps as they are dispatched, and returns them once they are computed."""

    def __init__(
        self,
        directory: epath.Path,
        columns: dict[str, str],
        start: int,
        on_nonfinite: str = 'stop',
        writes: bool = True,
    ) -> None:
        """`columns`: name -> NumPy type of a row's words. `writes`: on one process of a run.

        Continues after `start` finished steps, and removes rows of later ones, which were lost.
        """
        self._directory, self.start, self._writes = directory, start, writes
        self._on_nonfinite = on_nonfinite
        self._dtype = np.dtype(list(columns.items()))
        self._pending = collections.deque[Any]()  # jax.Array uint32[columns] of each step
        self._unwritten: list[np.ndarray] = []
        for path, first, _ in segments(directory) if writes else ():
            if first > start:
                path.unlink()

    def tail(self, every: int) -> list[np.ndarray]:
        """Returns the rows since the last multiple of `every` steps before `start`."""
        first = self.start - self.start % every + 1
        if first > self.start or not self._writes:  # only the writer has removed lost rows
            return []
        try:
            return list(read(self._directory, first))
        except UserError as problem:
            logging.warning('%s; training continues without these rows', problem)
            return []

    def add(self, row: Any) -> list[np.ndarray]:
        """Takes the newest step's row and returns finished rows, without stalling the device.

        Raises NonFinite for a row that is not finite, or warns, as `on_nonfinite` says.
        """
        self._pending.append(row)
        return self._finish(IN_FLIGHT)

    def drain(self) -> list[np.ndarray]:
        """Waits for every dispatched step and returns the rows not returned yet, as `add` does."""
        return self._finish(0)

    def _finish(self, keep: int) -> list[np.ndarray]:
        done = []
        while len(self._pending) > keep:
            words = np.asarray(self._pending.popleft()).astype('<u4')
            done.append(words.view(self._dtype)[0])
        self._unwritten += done
        for row in done:
            if not is_finite(row):
                self._stop_or_warn(row)
        return done

    def _stop_or_warn(self, row: np.void) -> None:
        found = (
            f'step {row["step"]}: loss {row["loss"]}, gradient norm {row["grad_norm"]} '
            f'(batch {row["batch"]:08x})'
        )
        if self._on_nonfinite == 'stop':
            raise NonFinite(
                f'{found}. The newest checkpoint is from before it. python -m tools.replay '
                f'{self._directory.parent} --step={row["step"]} shows the step; '
                '--config.optimizer.on_nonfinite=skip continues without it'
            )
        logging.warning('%s: skipped', found)

    def write_segment(self) -> None:
        """Writes the finished rows that are in no file yet."""
        rows = self._unwritten
        if not rows or not self._writes:
            return
        buffer = io.BytesIO()
        np.save(buffer, np.array(rows, self._dtype), allow_pickle=False)
        name = f'{rows[0]["step"]:09d}-{rows[-1]["step"]:09d}.npy'
        write_whole(self._directory / name, buffer.getvalue())
        self._unwritten = []

    def close(self) -> None:
        """Writes the rows since the last checkpoint, for people and tools."""
        with contextlib.suppress(Exception):  # failed storage has been reported by a save
            self.write_segment()
