"""Events for TensorBoard, each in its file before the run goes on.

tensorboardX's SummaryWriter hands events to a thread; where that dies, on a full disk say, the run
would wait for it for ever. Here a file that can not be written is told once, and done without.
In a bucket nothing can be appended to: there a file of this machine is copied again and again.
"""

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from runtime.storage import brief, in_bucket, write_whole


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Inside, a module that is not loaded yet is not found."""
    loaded = module in sys.modules
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if not loaded:
            del sys.modules[module]


with hidden('google.cloud.storage'):  # tensorboardX would load it, 0.3 s, and not use it here
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class Events:
    """An event file in a folder; none at all without a folder."""

    def __init__(self, folder: epath.Path | None, start: int = 0) -> None:
        """Begins a new file, of a run that goes on after step `start`.

        TensorBoard forgets what earlier files have of later steps: these will be done again.
        """
        self._writer: EventsWriter | None = None
        self._copy: tuple[tempfile.TemporaryDirectory[str], epath.Path] | None = None  # from, to
        if folder is not None:
            self._survived(lambda: self._begin(folder))
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))

    def _begin(self, folder: epath.Path) -> None:
        if in_bucket(folder):
            self._copy = tempfile.TemporaryDirectory(prefix='events-'), folder
            folder = epath.Path(self._copy[0].name)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / 'events'))

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """A point at `step` on each of the curves `group/name`."""
        for name, value in values.items():
            self._add(step, summary=summary.scalar(f'{group}/{name}', value))

    def text(self, name: str, step: int, text: str) -> None:
        """Markdown."""
        self._add(step, summary=summary.text(name, text))

    def hyperparameters(self, step: int, options: Mapping[str, Any], metrics: list[str]) -> None:
        """The settings of the run that is finished, and the curves that say how good they were."""
        values = {name: str(x) if isinstance(x, list) else x for name, x in options.items()}
        for part in summary.hparams(values, dict.fromkeys(metrics)):
            self._add(step, summary=part)

    def _add(self, step: int, **content: Any) -> None:
        if (writer := self._writer) is not None:
            event = Event(wall_time=time.time(), step=step, **content)
            self._survived(lambda: writer.write_event(event) or writer.flush())

    def flush(self) -> None:
        """Brings what was written to where it lasts."""
        if self._copy is None:
            return
        local, folder = self._copy
        try:
            for file in epath.Path(local.name).iterdir():
                write_whole(folder / file.name, file.read_bytes())
        except Exception as error:  # whatever the client of a bucket makes of it
            logging.error('TensorBoard: not copied to %s (%s)', folder, brief(error))

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._survived(self._writer.close)
        self.flush()

    def _survived(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            logging.error('TensorBoard: nothing more can be written (%s)', error.strerror)
            self._writer = None
