"""metrics.csv has the points of TensorBoard, each step once; other loggers may fail."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

import train
from reporting.loggers import Logger, MetricsCsv, default_loggers
from tests.test_resume import small_config
from tests.test_tensorboard import events


def test_metrics_csv_of_a_resumed_run_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    def train(name: str, start: int, stop: int, flushed: int) -> None:
        log = MetricsCsv(epath.Path(tmp_path / name), start)
        for step in range(start + 1, stop + 1):
            log.scalars('train', step, {'loss': 1 / step, 'accuracy': step / 3})
            if step == flushed:
                log.flush()

    train('whole', 0, 12, flushed=12)
    train('killed', 0, 11, flushed=10)  # rows up to step 10 are in the file; the checkpoint has 4
    train('killed', 4, 12, flushed=12)
    rows = (tmp_path / 'whole').read_text().splitlines()
    assert rows[:2] == ['step,name,value', '1,train/loss,1.0']
    assert len(rows) == 1 + 2 * 12
    assert (tmp_path / 'killed').read_text() == (tmp_path / 'whole').read_text()


def test_metrics_csv_drops_repeated_steps_and_what_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / 'metrics.csv'
    file.write_bytes(b'step,name,value\n4,train/loss,0.5\n\n\xff\n6,train/loss,0.4\n')
    MetricsCsv(epath.Path(file), 4)
    assert file.read_text() == 'step,name,value\n4,train/loss,0.5\n'
    assert list(tmp_path.iterdir()) == [file]


def test_metrics_csv_that_cannot_be_written_is_logged_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / 'file').touch()
    log = MetricsCsv(epath.Path(tmp_path / 'file' / 'metrics.csv'))
    log.scalars('train', 1, {'loss': 0.5})
    log.close()
    assert 'metrics.csv: not written' in caplog.text


@pytest.mark.slow
def test_metrics_csv_has_the_points_of_tensorboard(
    classifier_run: tuple[Path, dict[str, Any]],
) -> None:
    workdir, _ = classifier_run
    points = {
        (event.step, value.tag, value.simple_value)
        for event in events(workdir / 'tensorboard')
        for value in event.summary.value
        if value.HasField('simple_value')
    }
    _, *rows = (workdir / 'metrics.csv').read_text().splitlines()
    cells = [row.split(',') for row in rows]
    found = {(int(step), name, float(np.float32(value))) for step, name, value in cells}
    assert found == points
    assert len(found) == len(rows)


def test_only_process_0_writes_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    assert default_loggers(epath.Path(tmp_path), 0) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_logger_that_raises_ends_the_run_and_is_not_taken_for_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Offline(Logger):
        def flush(self) -> None:
            raise ConnectionError('service is down')

    monkeypatch.setattr(train, 'default_loggers', lambda *_: [Offline()])
    with pytest.raises(ConnectionError, match='service is down'):
        train.train(small_config(), epath.Path(tmp_path))
    assert 'could not be written' not in caplog.text
