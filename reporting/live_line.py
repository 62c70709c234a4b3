"""The line at the foot of a terminal that a run is watched on; log lines go above it.

It holds up nothing: a terminal that is stopped, slow or gone is passed over.
"""

import contextlib
import logging
import select
import threading
import time
from typing import TextIO

from tqdm import tqdm

SECONDS = 0.2  # between two drawings, at least

tqdm.set_lock(threading.RLock())  # its own is one between processes too, which none here needs


class LiveLine:
    """On a terminal a line that changes; anywhere else nothing."""

    def __init__(self, stream: TextIO, step: int, num_steps: int, shown: bool) -> None:
        """Of a run that goes on after `step`. Not `shown`, it is nothing on a terminal either."""
        self._drawn, self._stream = 0.0, stream
        self._bar = tqdm(
            initial=step, total=num_steps, desc=f'step {step}/{num_steps} compiling', position=0,
            file=stream, disable=None if shown else True, leave=False, dynamic_ncols=True,
            bar_format='{desc} {bar:20}',
        )  # fmt: skip

    def due(self) -> bool:
        """Whether it is there, was not drawn just now, and the terminal would take it at once."""
        if self._bar.disable or time.monotonic() - self._drawn < SECONDS:
            return False
        return bool(select.select([], [self._stream], [], 0)[1])

    def draw(self, step: int, text: str) -> None:
        """`text`, and where there is room for it a bar that has come as far as `step`."""
        self._drawn, self._bar.n = time.monotonic(), step
        self._bar.set_description_str(text, refresh=False)
        with contextlib.suppress(OSError), tqdm.get_lock():
            self._bar.refresh(nolock=True)

    def close(self) -> None:
        """Wipes it off."""
        with contextlib.suppress(OSError):
            self._bar.close()


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes lines, above the live one where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        with contextlib.suppress(OSError), tqdm.external_write_mode(self.stream):
            super().emit(record)
