"""Where a run's numbers go: metrics.csv and TensorBoard, and other services by a `Logger`."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from errors import first_line
from runtime.storage import in_bucket, write_whole


class Logger:
    """Receives the numbers of a run, on process 0. A subclass overrides what it records.

    docs/loggers.md shows loggers for other services.
    """

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Records values of one step; `group` is 'train' or 'evaluation'."""

    def text(self, name: str, step: int, text: str) -> None:
        """Records a text in Markdown."""

    def hyperparameters(self, step: int, options: Mapping[str, Any], metrics: list[str]) -> None:
        """Records the options of a finished run, and the names of its final metrics."""

    def flush(self) -> None:
        """Brings everything recorded so far to where it lasts. Called before each checkpoint."""

    def close(self) -> None:
        """Ends the recording."""
        self.flush()


def default_loggers(workdir: epath.Path, start: int) -> list[Logger]:
    """Returns the loggers of a run that resumes after step `start`; none on other processes."""
    if jax.process_index():
        return []
    return [MetricsCsv(workdir / 'metrics.csv', start), TensorBoard(workdir / 'tensorboard', start)]


@contextlib.contextmanager
def tolerate(name: str) -> Iterator[None]:
    """Logs that `name` could not be written, and lets training continue."""
    try:
        yield
    except Exception as error:  # OSError, or whatever the client of a bucket or the profiler raises
        logging.error('%s: not written (%s)', name, first_line(error))


class MetricsCsv(Logger):
    """Writes every scalar as a row `step,name,value` of one file, for scripts and spreadsheets."""

    def __init__(self, file: epath.Path, start: int = 0) -> None:
        """Drops the rows of an earlier launch after step `start`, whose steps are repeated."""
        self._file, self._lines = file, ['step,name,value']
        written = file.read_bytes() if file.exists() else b''
        for line in written.decode(errors='replace').splitlines():
            step = line.partition(',')[0]
            if step.isdecimal() and int(step) <= start:
                self._lines.append(line)
        self.flush()

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a row per value, which Python reads back exactly."""
        self._lines += [f'{step},{group}/{name},{value!r}' for name, value in values.items()]

    def flush(self) -> None:
        """Replaces the file as a whole, so that it is never half-written."""
        with tolerate(str(self._file)):
            write_whole(self._file, ('\n'.join(self._lines) + '\n').encode())


class TensorBoard(Logger):
    """Writes the event file of one launch, each event before training continues.

    tensorboardX's SummaryWriter hands events to a thread; if that dies, on a full disk for example,
    the run would wait for it forever. Here a failed write is logged once and ends the recording.
    Objects in a bucket cannot be appended to, so a local file is copied there at every flush.
    """

    def __init__(self, folder: epath.Path, start: int = 0) -> None:
        """Starts a file of a run that resumes after step `start`.

        The START event makes TensorBoard drop what earlier files say of later steps.
        """
        self._folder, self._failed = folder, False
        self._writer: EventsWriter | None = None
        self._local: tempfile.TemporaryDirectory[str] | None = None
        with tolerate('TensorBoard'):
            if in_bucket(folder):
                self._local = tempfile.TemporaryDirectory(prefix='events-')
                folder = epath.Path(self._local.name)
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / 'events'))
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        if self._writer is None or self._failed:
            return
        self._failed = True
        with tolerate('TensorBoard'):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
            self._writer.flush()
            self._failed = False

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each of the curves `group/name`."""
        points = (summary.scalar(f'{group}/{name}', x).value[0] for name, x in values.items())
        self._add(step, summary=Summary(value=points))

    def text(self, name: str, step: int, text: str) -> None:
        """Adds a text in Markdown."""
        self._add(step, summary=summary.text(name, text))

    def hyperparameters(self, step: int, options: Mapping[str, Any], metrics: list[str]) -> None:
        """Adds the options of a finished run and the curves that hold its final metrics."""
        values = {name: str(x) if isinstance(x, list) else x for name, x in options.items()}
        for part in summary.hparams(values, dict.fromkeys(metrics)):
            self._add(step, summary=part)

    def flush(self) -> None:
        """Copies the file to the bucket, if the run is in one."""
        for file in epath.Path(self._local.name).iterdir() if self._local else ():
            with tolerate(str(self._folder)):
                write_whole(self._folder / file.name, file.read_bytes())

    def close(self) -> None:
        """Ends the file."""
        with contextlib.suppress(OSError):  # every event was written when it was added
            if self._writer is not None:
                self._writer.close()
        self.flush()
