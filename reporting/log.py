"""What people see while a run trains: log lines, a live line, and scalars for the loggers."""

import collections
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from configs.schema import Config, to_dict
from reporting.live_line import LiveLine, LogHandler
from reporting.loggers import Logger, MetricsCsv
from reporting.tensorboard import TensorBoard
from runtime.ledger import Ledger, is_finite

Metrics = dict[str, float]
RECENT = 50  # steps that the live line and the time left are computed from


def start_logging() -> None:
    """Logs lines with the time of day to standard output; processes but the first log warnings."""
    quiet_libraries()
    logging.basicConfig(
        level=logging.INFO if is_writer() else logging.WARNING,
        format='%(asctime)s %(message)s',
        datefmt='%H:%M:%S',
        handlers=[LogHandler(sys.stdout)],
        force=True,
    )


def quiet_libraries() -> None:
    """Silences libraries that log what they also raise."""
    logging.getLogger('jax').setLevel(logging.WARNING)
    for chatty in ('absl', 'asyncio', 'orbax', 'grain'):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)


def is_writer() -> bool:
    """Returns whether this process writes what people read."""
    return jax.process_index() == 0


def default_loggers(workdir: epath.Path, start: int) -> list[Logger]:
    """Returns the loggers of a run that resumes after step `start`; none on other processes."""
    if not is_writer():
        return []
    return [
        MetricsCsv(workdir / 'metrics.csv', start),
        TensorBoard(workdir / 'tensorboard', start),
    ]


class RunLog:
    """Logs a line and scalars every `log_every` steps, from the rows of the ledger.

    It works on finished steps and never waits for one.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        metrics: Callable[[Metrics], Metrics],
        schedule: Callable[[int], Any],
        config: Config,
        ledger: Ledger,
    ) -> None:
        """Takes from `ledger` the rows of an interval that began before a resume."""
        self._loggers, self._metrics, self._schedule = loggers, metrics, schedule
        self._config, self._rows = config, ledger.tail(config.log_every)
        self._live = LiveLine(sys.stdout, ledger.start, config.num_steps, is_writer())
        self._recent = collections.deque[tuple[float, np.ndarray]](maxlen=RECENT)
        self._paused = 0.0  # seconds that are no training
        self._interval = (self._now(), ledger.start)  # time and step at its start
        self._speeds: list[float] = []  # steps/s of each interval
        self._saved: int | None = None

    def add(self, rows: Iterable[np.ndarray]) -> None:
        """Takes the rows of finished steps; logs a line where an interval ends."""
        for row in rows:
            step = int(row['step'])
            self._rows.append(row)
            self._recent.append((self._now(), row))
            if step % self._config.log_every == 0 or step == self._config.num_steps:
                self._log_interval(step)
            if len(self._recent) > 1 and self._live.due():
                self._draw(step)

    def saved(self, step: int | None) -> None:
        """Notes the step of the newest checkpoint, for the live line."""
        self._saved = step

    def evaluation(self, step: int, metrics: Metrics, samples: list[str]) -> None:
        """Logs an evaluation: one line for the metrics and one per sample."""
        logging.info('%s  evaluation  %s', self._place(step), scalars_text(metrics))
        for logger in self._loggers:
            if step == self._config.num_steps:
                names = [f'evaluation/{name}' for name in metrics]
                logger.hyperparameters(step, to_dict(self._config), names)
            logger.scalars('evaluation', step, metrics)
            if samples:
                logger.text('evaluation/samples', step, '    ' + '\n    '.join(samples))
        for sample in samples:
            logging.info('%s  sample  %s', self._place(step), sample)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside (an evaluation) from the training rates."""
        before = time.perf_counter()
        yield
        self._paused += time.perf_counter() - before

    @property
    def examples_per_second(self) -> float:
        """The median over log intervals; 0 if none was finished."""
        return self._config.batch_size * float(np.median(self._speeds)) if self._speeds else 0.0

    def flush(self) -> None:
        """Brings what was logged so far to where it lasts."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Removes the live line and ends the loggers."""
        self._live.close()
        for logger in self._loggers:
            logger.close()

    def _log_interval(self, step: int) -> None:
        (began, first), self._interval = self._interval, (self._now(), step)
        self._speeds.append((step - first) / (self._interval[0] - began))
        rows, self._rows = np.array(self._rows), []
        finite = rows[is_finite(rows)]
        if not finite.size:
            return
        totals = sums(finite)
        scalars = self._metrics(totals)
        scalars['learning_rate'] = float(self._schedule(step - 1))
        scalars['gradient_norm'] = float(np.mean(finite['grad_norm'], dtype=np.float64))
        if finite.size < rows.size:
            scalars['skipped_steps'] = float(rows.size - finite.size)
        scalars['examples_per_second'] = self._speeds[-1] * self._config.batch_size
        scalars['tokens_per_second'] = self._speeds[-1] * totals['tokens'] / finite.size
        shown = {name: value for name, value in scalars.items() if name != 'gradient_norm'}
        logging.info('%s  %s%s', self._place(step), scalars_text(shown), self._left(step))
        for logger in self._loggers:
            logger.scalars('train', step, scalars)

    def _draw(self, step: int) -> None:
        rows = np.array([row for _, row in self._recent])
        finite = rows[is_finite(rows)]
        scalars = self._metrics(sums(finite)) if finite.size else {}
        scalars['examples_per_second'] = self._config.batch_size / self._seconds_per_step()
        saved = '' if self._saved is None else f'  saved {self._saved}'
        text = f'{self._place(step)}  {scalars_text(scalars, 3)}{self._left(step)}{saved}'
        self._live.draw(step, text.replace('  ', ' '))

    def _place(self, step: int) -> str:
        total = self._config.num_steps
        return f'step {step:{len(str(total))}}/{total}'

    def _left(self, step: int) -> str:
        if len(self._recent) < min(RECENT, 10):
            return ''
        seconds = round((self._config.num_steps - step) * self._seconds_per_step())
        return f'  left {seconds // 60}:{seconds % 60:02d}'

    def _seconds_per_step(self) -> float:
        gaps = np.diff([seconds for seconds, _ in self._recent])
        return float(np.mean(gaps[gaps <= 10 * np.median(gaps)]))  # without compilations

    def _now(self) -> float:
        """Returns seconds of training."""
        return time.perf_counter() - self._paused


def sums(rows: np.ndarray) -> Metrics:
    """Adds the float32 columns of ledger rows over the rows, in float64."""
    names = [name for name in rows.dtype.names or () if rows.dtype[name] == np.float32]
    return {name: float(np.sum(rows[name], dtype=np.float64)) for name in names}


def scalars_text(scalars: Metrics, digits: int = 4) -> str:
    """Formats scalars as 'loss 0.3012  accuracy 0.8751 ...'."""

    def number(value: float) -> str:
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.{digits}g}'

    return '  '.join(
        f'{name.replace("_per_second", "/s")} {number(value)}' for name, value in scalars.items()
    )
