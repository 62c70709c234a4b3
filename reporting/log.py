"""What people see while a run trains: log lines, a live line, and scalars for the loggers."""

import collections
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from arrays import Metrics
from configs.schema import Config, to_dict
from reporting.live_line import LiveLine, LogHandler
from reporting.loggers import Logger
from runtime.ledger import Ledger, is_finite
from training.optimizer import make_schedule, updates_made
from training.state import TrainState

Step = tuple[float, np.ndarray]  # seconds since the step before, and the row in the ledger
RECENT = 50  # steps that the live line and the time left are computed from
ENOUGH = 10  # known step times, of which most are no compilation


def start_logging() -> None:
    """Logs lines with the time of day to standard output; processes but the first log warnings."""
    level = logging.WARNING if jax.process_index() else logging.INFO
    layout, clock = '%(asctime)s %(message)s', '%H:%M:%S'
    handlers = [LogHandler(sys.stdout)]
    logging.basicConfig(level=level, format=layout, datefmt=clock, handlers=handlers, force=True)


class RunLog:
    """Logs a line and scalars every `log_every` steps, from the rows of the ledger.

    It works on finished steps and never waits for one.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        metrics: Callable[[Metrics], Metrics],
        config: Config,
        ledger: Ledger,
        state: TrainState,
    ) -> None:
        """Takes from `ledger` the rows of an interval that began before a resume, at `state`."""
        self._loggers, self._metrics = loggers, metrics
        self._schedule = make_schedule(config.optimizer, config.num_steps)
        self._updates = updates_made(state.opt_state)  # the learning rate follows them
        self._config, self._saved = config, ''
        self._live = LiveLine(sys.stdout, ledger.start, config.num_steps, not jax.process_index())
        before = [(np.nan, row) for row in ledger.tail(config.log_every)]  # times are not kept
        self._steps = collections.deque(before, max(RECENT, config.log_every))
        self._finished = time.perf_counter()  # the last step, or an evaluation after it
        self._speeds: list[float] = []  # examples/s of each interval

    def add(self, rows: Iterable[np.ndarray], checkpoint: int | None = None) -> None:
        """Takes the rows of finished steps; logs a line where an interval ends.

        `checkpoint`: the step of the newest one, for the live line.
        """
        self._saved = self._saved if checkpoint is None else f' saved {checkpoint}'
        for row in rows:
            before, self._finished = self._finished, time.perf_counter()
            self._steps.append((self._finished - before, row))
            self._updates += int(is_finite(row))
            step, every = int(row['step']), self._config.log_every
            if step % every == 0 or step == self._config.num_steps:
                self._log_interval(step, list(self._steps)[-(step % every or every) :])
            if self._live.due():
                self._live.draw(step, self._live_text(step))

    def evaluation(self, step: int, metrics: Metrics, samples: list[str], last: bool) -> None:
        """Logs an evaluation: one line for the metrics and one per sample.

        The time since the last step, which the evaluation took, is not counted as training.
        """
        logging.info('%s  evaluation  %s', self._place(step), scalars_text(metrics))
        for logger in self._loggers:
            if last:
                names = [f'evaluation/{name}' for name in metrics]
                logger.hyperparameters(step, to_dict(self._config), names)
            logger.scalars('evaluation', step, metrics)
            if samples:
                logger.text('evaluation/samples', step, '    ' + '\n    '.join(samples))
        for sample in samples:
            logging.info('%s  sample  %s', self._place(step), sample)
        self._finished = time.perf_counter()

    @property
    def examples_per_second(self) -> float:
        """The median over log intervals; 0 if none was finished."""
        return float(np.median(self._speeds or [0.0]))

    def flush(self) -> None:
        """Brings what was logged so far to where it lasts."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Removes the live line and ends the loggers."""
        self._live.close()
        for logger in self._loggers:
            logger.close()

    def _log_interval(self, step: int, steps: list[Step]) -> None:
        finite, seconds = finite_rows(steps), np.nanmean([seconds for seconds, _ in steps])
        self._speeds.append(self._config.batch_size / float(seconds))
        if not finite.size:
            return
        totals = sums(finite)
        scalars = self._metrics(totals)
        scalars['learning_rate'] = float(self._schedule(self._updates - 1))
        scalars['gradient_norm'] = float(np.mean(finite['grad_norm'], dtype=np.float64))
        if finite.size < len(steps):
            scalars['skipped_steps'] = float(len(steps) - finite.size)
        scalars['examples_per_second'] = self._speeds[-1]
        scalars['tokens_per_second'] = totals['tokens'] / finite.size / float(seconds)
        shown = {name: value for name, value in scalars.items() if name != 'gradient_norm'}
        logging.info('%s  %s%s', self._place(step), scalars_text(shown), self._left(step))
        for logger in self._loggers:
            logger.scalars('train', step, scalars)

    def _live_text(self, step: int) -> str:
        finite, seconds = finite_rows(self._recent()), typical_seconds(self._recent())
        scalars = self._metrics(sums(finite)) if finite.size else {}
        if seconds is not None:
            scalars['examples_per_second'] = self._config.batch_size / seconds
        text = f'{self._place(step)}  {scalars_text(scalars, 3)}{self._left(step)}{self._saved}'
        return text.replace('  ', ' ')

    def _recent(self) -> list[Step]:
        return list(self._steps)[-RECENT:]

    def _place(self, step: int) -> str:
        total = self._config.num_steps
        return f'step {step:{len(str(total))}}/{total}'

    def _left(self, step: int) -> str:
        seconds = typical_seconds(self._recent())
        if seconds is None:
            return ''
        return '  left ' + tqdm.format_interval((self._config.num_steps - step) * seconds)


def typical_seconds(steps: list[Step]) -> float | None:
    """Returns the mean seconds of a step, or None while fewer than `ENOUGH` are known."""
    known = np.array([seconds for seconds, _ in steps if seconds == seconds])
    if known.size < ENOUGH:
        return None
    # Not the median itself: where batches have several widths, it is the time of one of them.
    return float(np.mean(known[known <= 10 * np.median(known)]))  # without compilations


def finite_rows(steps: list[Step]) -> np.ndarray:
    """Returns the ledger rows of the steps that changed the parameters."""
    rows = np.array([row for _, row in steps])
    return rows[is_finite(rows)]


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
