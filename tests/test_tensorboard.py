"""TensorBoard shows each point of a run once, with its options; metrics.csv has the same points."""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from configs.schema import to_dict
from reporting.loggers import MetricsCsv
from reporting.tensorboard import TensorBoard
from tests import runs
from tests.test_resume import small_config


def records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a TFRecord file: length uint64, checksum, record, checksum of each."""
    place = 0
    while place < len(data):
        (size,) = struct.unpack_from('<Q', data, place)
        yield data[place + 12 : place + 12 + size]
        place += 16 + size


def events(folder: Path) -> list[Event]:
    """Returns the events of all files in a folder, in order."""
    return [
        Event.FromString(record)
        for file in sorted(folder.iterdir())
        for record in records(file.read_bytes())
    ]


@pytest.mark.slow
def test_finished_run_shows_every_option_and_names_the_curves_with_its_final_metrics(
    classifier_run: tuple[Path, dict[str, Any]],
) -> None:
    workdir, summary = classifier_run
    written = events(workdir / 'tensorboard')
    values = [value for event in written for value in event.summary.value]
    plugins = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for value in values
        if value.metadata.plugin_data.plugin_name == 'hparams'
    }
    start = plugins['_hparams_/session_start_info'].session_start_info
    shown = {
        name: getattr(value, str(value.WhichOneof('kind'))) for name, value in start.hparams.items()
    }
    options = to_dict(small_config())
    assert shown == {name: str(x) if isinstance(x, list) else x for name, x in options.items()}
    experiment = plugins['_hparams_/experiment'].experiment
    assert {info.name for info in experiment.hparam_infos} == options.keys()
    curves = {info.name.tag for info in experiment.metric_infos}
    assert curves == {f'evaluation/{name}' for name in summary['eval']}
    final = {value.tag: value.simple_value for value in values if value.tag in curves}
    assert final == {f'evaluation/{name}': np.float32(x) for name, x in summary['eval'].items()}
    assert '_hparams_/session_end_info' in plugins


def test_resumed_run_makes_tensorboard_drop_the_steps_that_it_repeats(tmp_path: Path) -> None:
    for start in (0, 70):
        log = TensorBoard(epath.Path(tmp_path / str(start)), start)
        log.scalars('train', start + 10, {'loss': 0.5})
        log.close()
        version, restart, point = events(tmp_path / str(start))
        assert version.file_version == 'brain.Event:2'
        assert restart.session_log.status == SessionLog.START
        assert restart.step == start + 1
        assert point.step == start + 10


def test_metrics_csv_of_a_resumed_run_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    def train(name: str, start: int, stop: int, flushed: int) -> None:
        log = MetricsCsv(epath.Path(tmp_path / name), start)
        for step in range(start + 1, stop + 1):
            log.scalars('train', step, {'loss': 1 / step, 'accuracy': step / 3})
            if step == flushed:
                log.flush()

    train('whole', 0, 9, flushed=9)
    train('killed', 0, 7, flushed=6)  # rows up to step 6 are in the file; the checkpoint has 4
    train('killed', 4, 9, flushed=9)
    rows = (tmp_path / 'whole').read_text().splitlines()
    assert rows[:2] == ['step,name,value', '1,train/loss,1.0']
    assert len(rows) == 1 + 2 * 9
    assert (tmp_path / 'killed').read_text() == (tmp_path / 'whole').read_text()


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


def test_no_client_of_buckets_is_loaded_for_a_run_on_this_machine() -> None:
    pytest.importorskip('google.cloud.storage')
    code = 'import sys, train; sys.exit("google.cloud.storage" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT).returncode == 0
    code = 'import train; from google.cloud import storage; storage.Client'
    assert subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT).returncode == 0
