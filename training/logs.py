"""What a person sees of a run: log lines, TensorBoard, summary.json. Process 0 alone writes."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from configs.schema import Config
from training import nonfinite
from training.events import Events
from training.layout import Layout
from training.state import TrainState, root_key_hex
from training.storage import NotSaved, brief, write_whole

Metrics = dict[str, float]


def start_logging() -> None:
    """Plain lines with the time of day on standard output; from process 0, warnings from all."""
    quiet_libraries()
    logging.basicConfig(
        level=logging.INFO if is_writer() else logging.WARNING,
        format='%(asctime)s %(message)s',
        datefmt='%H:%M:%S',
        stream=sys.stdout,
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


def start_report(layout: Layout, task_summary: str, state: TrainState, resumed: bool) -> None:
    """What a person wants to know before the first step."""
    mesh, shards = layout.mesh, layout.num_shards
    counts = [2**k for k in range(shards.bit_length())] if layout.reduction == 'tree' else []
    logging.info('data: %s', task_summary)
    logging.info(
        '%d %s devices in %d process(es), %d of %d shards on each; a resume gives the same bits '
        'on a device count of %s',
        mesh.size, mesh.devices.flat[0].device_kind, jax.process_count(),
        layout.shards_per_device, shards, ', '.join(map(str, counts or [mesh.size])),
    )  # fmt: skip
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    logging.info('parameters: %s, root key %s', f'{parameters:,}', root_key_hex(state))
    logging.info(f'resumed after step {state.step}' if resumed else 'new run')


class RunLog:
    """A line and TensorBoard scalars every `log_every` steps, from the rows of the ledger."""

    def __init__(
        self,
        workdir: epath.Path,
        metrics: Callable[[Metrics], Metrics],
        schedule: Callable[[int], Any],
        config: Config,
        tail: Iterable[np.ndarray],
    ) -> None:
        """`tail`: rows of the interval that a resumed run stands in, so that its line is whole."""
        self._rows, self._workdir = list(tail), workdir
        self._events = Events(workdir / 'tensorboard' if is_writer() else None)
        self._metrics, self._schedule, self._config = metrics, schedule, config
        self._marked, self._timed_steps = time.perf_counter(), 0
        self._seconds_per_step: list[float] = []

    def add(self, rows: Iterable[np.ndarray]) -> None:
        """Takes the rows of finished steps; logs where an interval ends.

        Tells of steps that are not finite: raises NonFinite if they are to stop the run.
        """
        for row in rows:
            nonfinite.tell(row, self._config.optimizer.on_nonfinite, self._workdir)
            self._rows.append(row)
            self._timed_steps += 1
            if row['step'] % self._config.log_every == 0 or row['step'] == self._config.num_steps:
                self._log_interval()

    def _log_interval(self) -> None:
        rows, self._rows = np.array(self._rows), []
        step = int(rows['step'][-1])
        finite = nonfinite.is_finite(rows)
        skipped, rows = np.sum(~finite), rows[finite]
        now = time.perf_counter()
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
        minutes, seconds = divmod(round((self._config.num_steps - step) / speed), 60)
        shown = {name: value for name, value in scalars.items() if name != 'gradient_norm'}
        logging.info('%s  %s  left %d:%02d', self._place(step), line(shown), minutes, seconds)
        self._events.scalars('train', step, scalars)

    def evaluation(self, step: int, metrics: Metrics, samples: list[str]) -> None:
        """A line and scalars for one evaluation; a line for each sample, and their text."""
        logging.info('%s  evaluation  %s', self._place(step), line(metrics))
        self._events.scalars('evaluation', step, metrics)
        for sample in samples:
            logging.info('%s  sample  %s', self._place(step), sample)
        if samples:
            self._events.text('evaluation/samples', step, '    ' + '\n    '.join(samples))

    def _place(self, step: int) -> str:
        total = self._config.num_steps
        return f'step {step:{len(str(total))}}/{total}'

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (an evaluation, say) does not count towards the training rates."""
        before = time.perf_counter()
        yield
        self._marked += time.perf_counter() - before

    @property
    def examples_per_second(self) -> float:
        """In training, the median over log intervals; 0 where no interval was finished."""
        if not self._seconds_per_step:
            return 0.0
        return self._config.batch_size / float(np.median(self._seconds_per_step))

    def keep(self) -> None:
        """What was logged so far is to last, as far as the run can do something about it."""
        self._events.keep()

    def close(self) -> None:
        """Ends the files of events."""
        self._events.close()


def interval_totals(rows: np.ndarray) -> Metrics:
    """The sums of a step's ledger row, added over rows in float64."""
    assert rows.dtype.names is not None
    sums = [name for name in rows.dtype.names if rows.dtype[name] == np.float32]
    return {name: float(np.sum(rows[name], dtype=np.float64)) for name in sums}


def line(scalars: Metrics) -> str:
    """'loss 0.3012  accuracy 0.8751 ...'"""

    def number(value: float) -> str:
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'

    return '  '.join(
        f'{name.replace("_per_second", "/s")} {number(value)}' for name, value in scalars.items()
    )


def write_files(workdir: epath.Path, files: dict[str, str]) -> None:
    """Writes text files into the workdir, each whole or not at all. Raises NotSaved."""
    if not is_writer():
        return
    try:
        for name, text in files.items():
            write_whole(workdir / name, (text.rstrip() + '\n').encode())
    except Exception as error:  # OSError, or whatever the client of a bucket makes of it
        raise NotSaved(f'{workdir}: {", ".join(files)} not written ({brief(error)})') from error


def write_summary(workdir: epath.Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The run is finished: says so, in summary.json and in the log. Returns the summary."""
    write_files(workdir, {'summary.json': json.dumps(summary, indent=2)})
    logging.info('finished: %s', json.dumps(summary))
    return summary


def read_summary(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The workdir's summary.json if it is of this step."""
    try:
        summary = json.loads((workdir / 'summary.json').read_text())
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get('step') == step else None
