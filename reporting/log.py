"""What a person sees of a run: log lines, TensorBoard, summary.json. Process 0 alone writes."""

import collections
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from configs.schema import Config, to_dict
from reporting.live_line import LiveLine, LogHandler
from reporting.tensorboard import Events
from runtime.ledger import Ledger, is_finite

Metrics = dict[str, float]
RECENT = 50  # steps that the live line is about


def start_logging() -> None:
    """Plain lines with the time of day on standard output; from process 0, warnings from all."""
    quiet_libraries()
    logging.basicConfig(
        level=logging.INFO if is_writer() else logging.WARNING,
        format='%(asctime)s %(message)s',
        datefmt='%H:%M:%S',
        handlers=[LogHandler(sys.stdout)],
        force=True,
    )


def quiet_libraries() -> None:
    """What they fail at they also raise."""
    logging.getLogger('jax').setLevel(logging.WARNING)
    for chatty in ('absl', 'asyncio', 'orbax', 'grain'):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    tell = sys.unraisablehook

    def tell_others(unraisable: Any) -> None:
        # Of a checkpoint that can not be read, for every array but the first.
        if str(unraisable.exc_value) != 'Event loop is closed':
            tell(unraisable)

    sys.unraisablehook = tell_others


def is_writer() -> bool:
    """Whether this process writes what people read."""
    return jax.process_index() == 0


class RunLog:
    """A line and TensorBoard scalars every `log_every` steps, from the rows of the ledger.

    On a terminal the live line as well, from the same rows: it waits for no step.
    """

    def __init__(
        self,
        workdir: epath.Path,
        metrics: Callable[[Metrics], Metrics],
        schedule: Callable[[int], Any],
        config: Config,
        ledger: Ledger,
    ) -> None:
        """`ledger`: has the rows of the interval that a resumed run stands in, for a whole line."""
        self._rows, self._workdir = ledger.tail(config.log_every), workdir
        self._events = Events(workdir / 'tensorboard' if is_writer() else None, ledger.start)
        self._metrics, self._schedule, self._config = metrics, schedule, config
        self._live = LiveLine(sys.stdout, ledger.start, config.num_steps, is_writer())
        self._recent = collections.deque[tuple[float, np.ndarray]](maxlen=RECENT)
        self._idle, self._marked, self._timed_steps = 0.0, time.perf_counter(), 0
        self._seconds_per_step: list[float] = []
        self._saved: int | None = None

    def add(self, row: np.ndarray) -> None:
        """Takes the row of a finished step; logs a line where an interval ends."""
        self._rows.append(row)
        self._timed_steps += 1
        self._recent.append((self._now(), row))
        if row['step'] % self._config.log_every == 0 or row['step'] == self._config.num_steps:
            self._log_interval()
        if len(self._recent) > 1 and self._live.due():
            self._draw()

    def saved(self, step: int | None) -> None:
        """The newest checkpoint is of `step`."""
        self._saved = step

    def _draw(self) -> None:
        times, rows = zip(*self._recent, strict=True)
        finite = np.array(rows)[is_finite(np.array(rows))]
        gaps = np.diff(times)
        seconds = float(np.mean(gaps[gaps <= 10 * np.mean(gaps)]))  # without compilations
        scalars = self._metrics(interval_totals(finite)) if finite.size else {}
        scalars['examples_per_second'] = self._config.batch_size / seconds
        step = int(rows[-1]['step'])
        saved = '' if self._saved is None else f'saved {self._saved}'
        told = [self._place(step), line(scalars, 3), self._left(step, seconds), saved]
        self._live.draw(step, ' '.join(told).replace('  ', ' '))

    def _log_interval(self) -> None:
        rows, self._rows = np.array(self._rows), []
        step = int(rows['step'][-1])
        finite = is_finite(rows)
        skipped, rows = np.sum(~finite), rows[finite]
        now = self._now()
        self._seconds_per_step.append((now - self._marked) / self._timed_steps)
        self._marked, self._timed_steps = now, 0
        if not rows.size:
            return
        totals = interval_totals(rows)
        scalars = self._metrics(totals)
        scalars['learning_rate'] = float(self._schedule(step - 1))
        scalars['gradient_norm'] = float(np.mean(rows['grad_norm'], dtype=np.float64))
        if skipped:
            scalars['skipped_steps'] = float(skipped)
        speed = 1 / self._seconds_per_step[-1]
        scalars['examples_per_second'] = speed * self._config.batch_size
        scalars['tokens_per_second'] = speed * totals['tokens'] / len(rows)
        shown = {name: value for name, value in scalars.items() if name != 'gradient_norm'}
        logging.info('%s  %s  %s', self._place(step), line(shown), self._left(step, 1 / speed))
        self._events.scalars('train', step, scalars)

    def evaluation(self, step: int, metrics: Metrics, samples: list[str]) -> None:
        """A line and scalars for one evaluation; a line for each sample, and their text."""
        logging.info('%s  evaluation  %s', self._place(step), line(metrics))
        if step == self._config.num_steps:
            names = [f'evaluation/{name}' for name in metrics]
            self._events.hyperparameters(step, to_dict(self._config), names)
        self._events.scalars('evaluation', step, metrics)
        for sample in samples:
            logging.info('%s  sample  %s', self._place(step), sample)
        if samples:
            self._events.text('evaluation/samples', step, '    ' + '\n    '.join(samples))

    def _place(self, step: int) -> str:
        total = self._config.num_steps
        return f'step {step:{len(str(total))}}/{total}'

    def _left(self, step: int, seconds_per_step: float) -> str:
        seconds = round((self._config.num_steps - step) * seconds_per_step)
        return f'left {seconds // 60}:{seconds % 60:02d}'

    def _now(self) -> float:
        """Seconds of training."""
        return time.perf_counter() - self._idle

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (an evaluation, say) does not count towards the training rates."""
        before = time.perf_counter()
        yield
        self._idle += time.perf_counter() - before

    @property
    def examples_per_second(self) -> float:
        """In training, the median over log intervals; 0 where no interval was finished."""
        if not self._seconds_per_step:
            return 0.0
        return self._config.batch_size / float(np.median(self._seconds_per_step))

    def flush(self) -> None:
        """What was logged so far is to last, as far as the run can do something about it."""
        self._events.flush()

    def close(self) -> None:
        """Ends the live line and the files of events."""
        self._live.close()
        self._events.close()


def interval_totals(rows: np.ndarray) -> Metrics:
    """The sums of a step's ledger row, added over rows in float64."""
    assert rows.dtype.names is not None
    sums = [name for name in rows.dtype.names if rows.dtype[name] == np.float32]
    return {name: float(np.sum(rows[name], dtype=np.float64)) for name in sums}


def line(scalars: Metrics, digits: int = 4) -> str:
    """'loss 0.3012  accuracy 0.8751 ...'"""

    def number(value: float) -> str:
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.{digits}g}'

    return '  '.join(
        f'{name.replace("_per_second", "/s")} {number(value)}' for name, value in scalars.items()
    )
