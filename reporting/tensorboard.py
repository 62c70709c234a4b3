"""Writes TensorBoard event files, each event before training continues.

tensorboardX's SummaryWriter hands events to a thread; if that dies, on a full disk for example, the
run would wait for it forever. Here a failed write is logged once, and training continues without.
Objects in a bucket cannot be appended to, so a local file is copied there at every flush.
"""

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from reporting.loggers import Logger
from runtime.storage import brief, in_bucket, write_whole


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Makes imports of a module that is not loaded yet fail inside the block."""
    loaded = module in sys.modules
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if not loaded:
            del sys.modules[module]


with hidden('google.cloud.storage'):  # tensorboardX would load it for 0.3 s without any use here
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class TensorBoard(Logger):
    """Writes the event file of one launch."""

    def __init__(self, folder: epath.Path, start: int = 0) -> None:
        """Starts a file of a run that resumes after step `start`.

        The START event makes TensorBoard drop what earlier files say of later steps.
        """
        self._writer: EventsWriter | None = None
        self._copy: tuple[tempfile.TemporaryDirectory[str], epath.Path] | None = None  # from, to
        self._tolerate(lambda: self._begin(folder))
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))

    def _begin(self, folder: epath.Path) -> None:
        if in_bucket(folder):
            self._copy = tempfile.TemporaryDirectory(prefix='events-'), folder
            folder = epath.Path(self._copy[0].name)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / 'events'))

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each of the curves `group/name`."""
        for name, value in values.items():
            self._add(step, summary=summary.scalar(f'{group}/{name}', value))

    def text(self, name: str, step: int, text: str) -> None:
        """Adds a text in Markdown."""
        self._add(step, summary=summary.text(name, text))

    def hyperparameters(self, step: int, options: Mapping[str, Any], metrics: list[str]) -> None:
        """Adds the options of a finished run and the curves that hold its final metrics."""
        values = {name: str(x) if isinstance(x, list) else x for name, x in options.items()}
        for part in summary.hparams(values, dict.fromkeys(metrics)):
            self._add(step, summary=part)

    def _add(self, step: int, **content: Any) -> None:
        if (writer := self._writer) is not None:
            event = Event(wall_time=time.time(), step=step, **content)
            self._tolerate(lambda: writer.write_event(event) or writer.flush())

    def flush(self) -> None:
        """Copies the file to the bucket, if the run is in one."""
        if self._copy is None:
            return
        local, folder = self._copy
        try:
            for file in epath.Path(local.name).iterdir():
                write_whole(folder / file.name, file.read_bytes())
        except Exception as error:  # whatever the client of a bucket raises
            logging.error('TensorBoard: not copied to %s (%s)', folder, brief(error))

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._tolerate(self._writer.close)
        self.flush()

    def _tolerate(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            logging.error('TensorBoard: nothing more can be written (%s)', error.strerror)
            self._writer = None
