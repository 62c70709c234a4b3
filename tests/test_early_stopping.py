"""Early stopping is a function of recorded evaluations: no kill or stop moves its step."""

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath

import train
from errors import REQUEUE
from runtime.preemption import STOP, TRAIN, StopRequest
from runtime.run_record import read_record
from tests import runs
from tests.test_resume import small_config
from tests.test_tensorboard import events
from training.early_stopping import since_best
from training.mesh import Layout

pytestmark = pytest.mark.slow

# With this rate the loss falls and then rises again: patience ends it between checkpoints.
OPTIONS = {'eval_every': 2, 'checkpoint_every': 7, 'patience': 2, 'best_metric': 'loss'}
OPTIONS |= {'optimizer__learning_rate': 0.5, 'optimizer__schedule': 'constant', 'num_steps': 60}


class StopAfter(StopRequest):
    """Asks the run to stop after some steps of a launch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def agreed(self, layout: Layout, save: bool = False) -> int:
        self._left -= 1
        return TRAIN if self._left else STOP


def trained(workdir: Path, stop: StopRequest | None = None, **changes: Any) -> dict[str, Any]:
    """Trains at a rate of zero, which never improves the first evaluation, or until a stop."""
    config = small_config(best_metric='loss', patience=2)
    config = dataclasses.replace(config, eval_every=3, num_steps=40, **changes)
    config.optimizer.learning_rate = 0.0
    return train.train(config, epath.Path(workdir), stop=stop)


def test_run_without_improvement_stops_early_and_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first = trained(tmp_path)
    assert first['step'] == 9  # evaluations at 3, 6 and 9: none is better than the first
    assert 'stopping early: no better negative_loss since step 3' in caplog.text
    assert first['eval']['negative_loss'] == -first['eval']['loss']
    tags = [
        value.tag for event in events(tmp_path / 'tensorboard') for value in event.summary.value
    ]
    assert tags.count('_hparams_/session_end_info') == 1
    record = read_record(epath.Path(tmp_path) / 'checkpoints' / '9')
    ((key, recorded),) = record['evaluations'].items()
    assert key.startswith('negative_loss of ')
    assert recorded == [[step, first['eval']['negative_loss']] for step in (3, 6, 9)]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*.json')}
    with caplog.at_level(logging.INFO):
        assert trained(tmp_path) == first
    assert 'the run is finished at step 9' in caplog.text
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*.json')} == times


def test_evaluation_that_is_not_a_number_is_not_the_best() -> None:
    later = [(2, 0.5), (3, math.nan), (4, 0.25)]
    assert since_best([(1, math.nan), *later]) == later


@pytest.mark.parametrize(
    'steps', [5, *(pytest.param(step, marks=pytest.mark.long) for step in (3, 6, 8))]
)
def test_run_asked_to_stop_at_any_step_stops_early_at_the_same_one(
    tmp_path: Path, steps: int
) -> None:
    """A stop at step 3 or 6 falls on an evaluation, which counts like any other."""
    with pytest.raises(SystemExit) as stopped:
        trained(tmp_path, StopAfter(steps))
    assert stopped.value.code == REQUEUE
    record = read_record(epath.Path(tmp_path) / 'checkpoints' / str(steps))
    ((_, recorded),) = record['evaluations'].items()
    assert [step for step, _ in recorded] == [step for step in (3, 6) if step <= steps]
    assert bool(record['manifest']['evaluation']) == (steps in (3, 6))
    assert trained(tmp_path)['step'] == 9
    if steps in (3, 6):  # the best one
        assert (tmp_path / 'checkpoints' / str(steps)).exists()


def test_evaluations_of_a_damaged_checkpoint_are_forgotten_with_it(tmp_path: Path) -> None:
    first = trained(tmp_path, keep_newest=3)
    state = tmp_path / 'checkpoints' / '9' / 'state'
    for file in [path for path in state.rglob('*') if path.is_file()]:
        file.write_bytes(bytes(file.stat().st_size))
    again = trained(tmp_path, keep_newest=3)
    assert (tmp_path / 'damaged' / '9').exists()
    assert (again['step'], again['state_fingerprint']) == (9, first['state_fingerprint'])


def test_summary_lost_after_an_early_stop_is_written_again(tmp_path: Path) -> None:
    first = trained(tmp_path)
    (tmp_path / 'summary.json').unlink()
    again = trained(tmp_path)
    assert {**again, 'examples_per_second': 0} == {**first, 'examples_per_second': 0}


@pytest.mark.long
def test_killed_run_stops_early_at_the_step_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    runs.finish(whole, **OPTIONS)
    last = json.loads((whole / 'summary.json').read_text())['step']
    assert last < OPTIONS['num_steps']
    assert last % OPTIONS['checkpoint_every']
    process = runs.start(killed, **OPTIONS)
    limit = time.monotonic() + 200
    while not (killed / 'checkpoints' / '7').exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (killed / 'summary.json').exists()
    runs.finish(killed, devices=4, **OPTIONS)
    assert runs.outcome(killed) == runs.outcome(whole)
