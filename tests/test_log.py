"""The lines of a run: what they show, and what their rates and the time left are computed from."""

import logging
import re
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import reviews
from configs.schema import OptimizerConfig
from reporting import log, summary
from reporting.loggers import Logger
from runtime.ledger import Ledger

COLUMNS = {'step': '<u4', 'grad_norm': '<f4', 'loss': '<f4', 'tokens': '<f4', 'weight': '<f4'}
COMPILATION = 30.0


class Recorder(Logger):
    """Remembers scalars."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], dict[str, float]] = {}

    def scalars(self, group: str, step: int, values: Any) -> None:
        self.points[group, step] = dict(values)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the time that a run measures, to be moved by hand."""
    now = [0.0]
    monkeypatch.setattr(log.time, 'perf_counter', lambda: now[0])  # type: ignore[attr-defined]
    return now


def row(step: int, loss: float = 32.0) -> Any:
    """Returns the row of a step: a batch of 64 with a mean loss of 0.5, and 640 tokens."""
    values = {'step': step, 'grad_norm': step, 'loss': loss, 'tokens': 640, 'weight': 64}
    return np.array([tuple(values.values())], list(COLUMNS.items()))[0]


def run_log(workdir: Path, recorder: Recorder, start: int = 0, num_steps: int = 100) -> log.RunLog:
    """Returns the log of a run whose steps have 64 examples, with a line every 20 steps."""
    config = reviews.get_config()
    config.num_steps, config.log_every, config.batch_size = num_steps, 20, 64
    config.optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=64)  # update / 64
    ledger = Ledger(epath.Path(workdir / 'ledger'), COLUMNS, start)
    updated: Any = types.SimpleNamespace(opt_state=optax.ScaleByScheduleState(jnp.int32(start)))
    return log.RunLog(
        [recorder], lambda sums: {'loss': sums['loss'] / sums['weight']}, config, ledger, updated
    )


def test_line_shows_means_of_the_interval_and_rates_without_evaluations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    recorder = Recorder()
    shown = run_log(tmp_path, recorder)
    for step in range(1, 41):
        clock[0] += 0.25
        shown.add([row(step, loss=np.nan if step == 30 else step)])
        if step in (20, 25):
            clock[0] += 60
            shown.evaluation(step, {'loss': 0.25}, [], False)
    shown.close()
    lines = [re.sub(' +', ' ', line) for line in caplog.messages]
    assert lines == [
        'step 20/100 loss 0.1641 learning_rate 0.2969 examples/s 256 tokens/s 2,560 left 00:20',
        'step 20/100 evaluation loss 0.25',
        'step 25/100 evaluation loss 0.25',
        'step 40/100 loss 0.477 learning_rate 0.5938 skipped_steps 1 examples/s 256 '
        'tokens/s 2,560 left 00:15',
    ]
    assert recorder.points['train', 20] == {
        'loss': 210 / 20 / 64, 'learning_rate': 19 / 64, 'gradient_norm': 10.5,
        'examples_per_second': 256, 'tokens_per_second': 2560,
    }  # fmt: skip
    assert shown.examples_per_second == 256


def test_line_of_the_last_step_is_about_the_steps_since_the_line_before(
    tmp_path: Path, clock: list[float]
) -> None:
    recorder = Recorder()
    shown = run_log(tmp_path, recorder, num_steps=24)
    for step in range(1, 25):
        clock[0] += 0.25 if step > 20 else 0.5
        shown.add([row(step, loss=step)])
    last = recorder.points['train', 24]
    assert last['loss'] == (21 + 22 + 23 + 24) / 4 / 64
    assert last['examples_per_second'] == 256


def test_time_left_is_not_shown_before_it_is_known_and_has_no_compilation(
    tmp_path: Path, clock: list[float]
) -> None:
    shown = run_log(tmp_path, Recorder())
    texts = {}
    for step in range(1, 61):
        clock[0] += COMPILATION if step in (1, 2, 7, 50) else 0.5
        shown.add([row(step)])
        texts[step] = shown._live_text(step)
    assert [step for step, text in texts.items() if 'left' not in text] == list(range(1, 10))
    assert ' examples/s 128 left 00:45' in texts[10]
    assert ' examples/s 128 left 00:20' in texts[60]


def test_resumed_run_logs_the_whole_interval_and_the_rates_of_its_own_steps(
    tmp_path: Path, clock: list[float]
) -> None:
    points = {}
    for start in (0, 30):
        recorder = Recorder()
        shown = run_log(tmp_path, recorder, start)
        for step in range(start + 1, 101):
            clock[0] += 0.25
            shown.add([row(step, loss=step)])
        shown.close()
        points[start] = recorder.points
        (tmp_path / 'ledger').mkdir(exist_ok=True)
        rows = np.array([row(step, loss=step) for step in range(1, 31)])
        np.save(tmp_path / 'ledger' / '000000001-000000030.npy', rows)
    assert list(points[30]) == [('train', step) for step in (40, 60, 80, 100)]
    assert points[30] == {place: points[0][place] for place in points[30]}


def test_last_line_is_rounded_and_summary_json_is_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    values = {'step': 100, 'eval': {'loss': 0.11111111111111112, 'accuracy': 1.0}}
    made = values | {'state_fingerprint': 'f' * 64, 'examples_per_second': 3185.1234567890124}
    summary.log_finished(epath.Path('runs/x'), made)
    assert caplog.messages == [
        'the run is finished at step 100: loss 0.1111  accuracy 1  '
        'state_fingerprint ffffffffffffffff  (runs/x/summary.json)'
    ]
