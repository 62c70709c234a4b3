"""The run's book: one row of exact bits for every step, in files that are never changed.

A row is a NumPy record: the finished step, fingerprints of batch, dropout keys and parameters
(uint32), gradient norm and loss sums (float32). A segment `ledger/FIRST-LAST.npy` is written when
a checkpoint is, before it, so the rows up to a checkpoint exist whenever the checkpoint does.
"""

import collections
import contextlib
import io
import logging
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from etils import epath

from errors import NonFinite, UserError
from runtime.ledger_files import read, segments
from runtime.storage import write_whole

IN_FLIGHT = 2  # steps that the device may have queued before the host waits for a row


def is_finite(rows: np.ndarray | np.void) -> np.ndarray:
    """Returns for each row whether its step changed the parameters: bool[rows]."""
    return np.isfinite(rows['loss']) & np.isfinite(rows['grad_norm'])


def checked(
    rows: Iterable[np.ndarray], on_nonfinite: str, workdir: epath.Path
) -> Iterator[np.ndarray]:
    """Yields the rows of finished steps, and warns of each that is not finite.

    Such a step has changed neither parameters nor optimizer state (training/step.py). Raises
    NonFinite for it if `on_nonfinite` is 'stop'.
    """
    for row in rows:
        if not is_finite(row):
            found = (
                f'step {row["step"]}: loss {row["loss"]}, gradient norm {row["grad_norm"]} '
                f'(batch {row["batch"]:08x})'
            )
            if on_nonfinite == 'stop':
                raise NonFinite(
                    f'{found}. The newest checkpoint is from before it. python -m tools.replay '
                    f'{workdir} --step={row["step"]} shows the step; '
                    '--config.optimizer.on_nonfinite=skip continues without it'
                )
            logging.warning('%s: skipped', found)
        yield row


class Ledger:
    """Takes the rows of steps as they are dispatched, gives them back as they are finished."""

    def __init__(self, directory: epath.Path, columns: dict[str, str], start: int) -> None:
        """`columns`: the words of a step's row, name -> NumPy type.

        Continues after `start` finished steps: rows beyond are of a future that was lost.
        """
        self._directory, self.start = directory, start
        self._dtype = np.dtype(list(columns.items()))
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._unwritten: list[np.ndarray] = []
        self._writes = jax.process_index() == 0
        if self._writes:
            for path, first, _ in segments(directory):
                if first > start:
                    path.unlink()

    def tail(self, every: int) -> list[np.ndarray]:
        """The rows since the last multiple of `every` steps, which a resumed run stands on."""
        first = self.start - self.start % every + 1
        if first > self.start or not self._writes:  # the writer has removed the lost future
            return []
        try:
            return list(read(self._directory, first))
        except UserError as problem:
            logging.warning('%s; the run goes on without these rows', problem)
            return []

    def add(self, row: jax.Array) -> list[np.ndarray]:
        """Takes the newest step's row; returns the rows that are finished, without a bubble."""
        self._pending.append(row)
        return self._finish(IN_FLIGHT)

    def drain(self) -> list[np.ndarray]:
        """Waits for every step dispatched and returns the rows not returned yet."""
        return self._finish(0)

    def _finish(self, keep: int) -> list[np.ndarray]:
        done = []
        while len(self._pending) > keep:
            words = jax.device_get(self._pending.popleft()).astype('<u4')
            done.append(words.view(self._dtype)[0])
        self._unwritten += done
        return done

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
        """Writes the rows of a run that ends before its next checkpoint, for people and tools."""
        with contextlib.suppress(Exception):  # storage that fails was told of by a save
            self.write_segment()
