"""Reading a ledger's files, with NumPy alone."""

import io

import numpy as np
from etils import epath

from configs.schema import BadInput


def segments(directory: epath.Path) -> list[tuple[epath.Path, int, int]]:
    """(file, first step, last step) of every segment, in order."""
    if not directory.exists():
        return []
    paths = sorted(path for path in directory.iterdir() if path.name.endswith('.npy'))
    return [(path, *map(int, path.stem.split('-'))) for path in paths]


def read(directory: epath.Path, first: int = 1) -> np.ndarray:
    """The rows from step `first` on. Raises BadInput when a segment is missing, cut or damaged."""
    parts, expected = [], None
    for path, start, stop in segments(directory):
        if stop < first:
            continue
        try:
            rows = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadInput(f'{path}: not a ledger segment, damaged or cut ({error})') from error
        if expected is not None and start != expected:
            raise BadInput(f'{path}: expected a segment from step {expected}; one is missing')
        if rows.dtype.names is None or rows['step'].tolist() != list(range(start, stop + 1)):
            raise BadInput(f'{path}: expected the rows of steps {start} to {stop}')
        parts.append(rows)
        expected = stop + 1
    if not parts:
        raise BadInput(f'{directory}: expected ledger segments (FIRST-LAST.npy), found none')
    rows = np.concatenate(parts)
    return rows[rows['step'] >= first]
