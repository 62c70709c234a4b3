"""Steps whose loss or gradient is no finite number: they stop the run, or are skipped, and told.

Such a step changes neither parameters nor optimizer (training/step.py).
"""

import logging

import numpy as np
from etils import epath

from configs.schema import BadInput


class NonFinite(BadInput):
    """A run that does not go on by itself."""

    exit_code = 3


def is_finite(rows: np.ndarray | np.void) -> np.ndarray:
    """Of each of the ledger's rows, whether its step changed the parameters: bool[rows]."""
    return np.isfinite(rows['loss']) & np.isfinite(rows['grad_norm'])


def tell(row: np.ndarray, on_nonfinite: str, workdir: epath.Path) -> None:
    """Where a step's row is not finite: warns, or raises NonFinite."""
    if is_finite(row):
        return
    told = (
        f'step {row["step"]}: loss {row["loss"]}, gradient norm {row["grad_norm"]} '
        f'(batch {row["batch"]:08x})'
    )
    if on_nonfinite == 'stop':
        raise NonFinite(
            f'{told}. The newest checkpoint is from before it. python -m tools.replay '
            f'{workdir} --step={row["step"]} shows the step; '
            '--config.optimizer.on_nonfinite=skip goes on without it'
        )
    logging.warning('%s: skipped', told)
