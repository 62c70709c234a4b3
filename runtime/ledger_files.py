"""Reading a ledger's files, with NumPy alone."""

import io
import re

import numpy as np
from etils import epath

from errors import UserError


def segments(directory: epath.Path) -> list[tuple[epath.Path, int, int]]:
    """(file, first step, last step) of every segment, in order."""
    if not directory.exists():
        return []
    names = (re.fullmatch(r'(\d+)-(\d+)\.npy', path.name) for path in directory.iterdir())
    steps = sorted((int(name[1]), int(name[2]), name[0]) for name in names if name)
    return [(directory / name, first, last) for first, last, name in steps]


def read(directory: epath.Path, first: int = 1) -> np.ndarray:
    """The rows from step `first` on. Raises UserError when a segment is missing, cut or damaged."""
    parts: list[np.ndarray] = []
    expected = first
    for path, start, stop in segments(directory):
        if stop < first:
            continue
        if start > expected or (parts and start < expected):
            raise UserError(f'{path}: expected a segment from step {expected}; one is missing')
        try:
            rows = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except Exception as error:  # a damaged header is read as Python, with all its errors
            problem = ' '.join(str(error).split())
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
