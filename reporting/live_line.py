"""A progress line at the foot of a terminal. Log lines go above it; it never delays a step."""

import contextlib
import logging
import select
import threading
import time
from typing import TextIO

from tqdm import tqdm

SECONDS = 0.2  # least time between two drawings

tqdm.set_lock(threading.RLock())  # the default lock spans processes, which is not needed here


class LiveLine:
    """Draws the line on a terminal, and nothing anywhere else."""

    def __init__(self, stream: TextIO, step: int, num_steps: int, shown: bool) -> None:
        """Starts after `step`. With `shown` False it stays invisible on a terminal too."""
        self._drawn, self._stream = 0.0, stream
        self._bar = tqdm(
            initial=step, total=num_steps, desc=f'step {step}/{num_steps} compiling', position=0,
            file=stream, disable=None if shown else True, leave=False, dynamic_ncols=True,
            bar_format='{desc} {bar:20}',
        )  # fmt: skip

    def due(self) -> bool:
        """Returns whether it is time to draw and the terminal takes output without blocking."""
        if self._bar.disable or time.monotonic() - self._drawn < SECONDS:
            return False
        return bool(select.select([], [self._stream], [], 0)[1])

    def draw(self, step: int, text: str) -> None:
        """Draws `text` and, where there is room, a bar that has come as far as `step`."""
        self._drawn, self._bar.n = time.monotonic(), step
        self._bar.set_description_str(text, refresh=False)
        with contextlib.suppress(OSError), tqdm.get_lock():
            self._bar.refresh(nolock=True)

    def close(self) -> None:
        """Removes the line."""
        with contextlib.suppress(OSError):
            self._bar.close()


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes log lines, above the live line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        with contextlib.suppress(OSError), tqdm.external_write_mode(self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drops a line that cannot be written, as when `head` has ended: training continues."""
