"""Where a run's numbers go: metrics.csv always, TensorBoard by default, others by `Logger`."""

import csv
import io
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from runtime.storage import brief, write_whole


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
        """Brings everything recorded so far to where it lasts. Called before a checkpoint."""

    def close(self) -> None:
        """Ends the recording."""
        self.flush()


class MetricsCsv(Logger):
    """Writes every scalar as a row `step,name,value` of one file, for scripts and spreadsheets."""

    def __init__(self, file: epath.Path, start: int = 0) -> None:
        """Keeps the rows of an earlier launch up to step `start`; later steps are repeated."""
        self._file = file
        kept = csv.reader(io.StringIO(file.read_text() if file.exists() else ''))
        self._rows = [row for row in kept if row[0].isdecimal() and int(row[0]) <= start]

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a row per value."""
        self._rows += [[str(step), f'{group}/{name}', repr(x)] for name, x in values.items()]

    def flush(self) -> None:
        """Replaces the file as a whole, so that it is never half-written."""
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows([['step', 'name', 'value'], *self._rows])
        try:
            write_whole(self._file, text.getvalue().encode())
        except Exception as error:  # OSError, or whatever the client of a bucket raises
            logging.error('%s: not written (%s)', self._file, brief(error))
