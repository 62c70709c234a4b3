"""TensorBoard shows each point of a run once, with its options beside the final metrics."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from configs.schema import to_dict
from reporting.loggers import TensorBoard
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
    options = to_dict(small_config()) | {'data.tokenizer': 'words'}  # which the task chose
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


def test_tensorboard_that_cannot_be_written_is_logged_once_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, 'No space left on device')

    log = TensorBoard(epath.Path(tmp_path), 0)
    log.scalars('train', 10, {'loss': 0.5, 'accuracy': 0.25})
    with monkeypatch.context() as disk:
        disk.setattr(EventsWriter, 'write_event', full)
        log.scalars('train', 20, {'loss': 0.5})
        log.text('evaluation/samples', 20, 'text')
    log.scalars('train', 30, {'loss': 0.5})
    log.close()
    assert caplog.messages == ['TensorBoard: not written ([Errno 28] No space left on device)']
    *_, last = events(tmp_path)
    assert last.step == 10
    assert {value.tag: value.simple_value for value in last.summary.value} == {
        'train/loss': 0.5,
        'train/accuracy': 0.25,
    }
