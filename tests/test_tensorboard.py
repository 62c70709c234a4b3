"""What TensorBoard shows of a run: each point once, and its settings beside how good it became."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from configs.schema import to_dict
from reporting.tensorboard import Events
from tests import runs
from tests.test_resume import small_config
from tools.curves import records


def events(folder: Path) -> list[Event]:
    """Of all files in a folder, in order."""
    return [
        Event.FromString(record)
        for file in sorted(folder.iterdir())
        for record in records(file.read_bytes())
    ]


@pytest.mark.slow
def test_finished_run_shows_every_knob_and_names_the_curves_with_its_final_metrics(
    classifier_run: tuple[Path, dict[str, Any]],
) -> None:
    workdir, summary = classifier_run
    written = events(workdir / 'tensorboard')
    values = [value for event in written for value in event.summary.value]
    told = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for value in values
        if value.metadata.plugin_data.plugin_name == 'hparams'
    }
    start = told['_hparams_/session_start_info'].session_start_info
    shown = {
        name: getattr(value, str(value.WhichOneof('kind'))) for name, value in start.hparams.items()
    }
    options = to_dict(small_config())
    assert shown == {name: str(x) if isinstance(x, list) else x for name, x in options.items()}
    experiment = told['_hparams_/experiment'].experiment
    assert {info.name for info in experiment.hparam_infos} == options.keys()
    curves = {info.name.tag for info in experiment.metric_infos}
    assert curves == {f'evaluation/{name}' for name in summary['eval']}
    final = {value.tag: value.simple_value for value in values if value.tag in curves}
    assert final == {f'evaluation/{name}': np.float32(x) for name, x in summary['eval'].items()}
    assert '_hparams_/session_end_info' in told


def test_resumed_run_tells_tensorboard_to_forget_the_steps_it_does_again(tmp_path: Path) -> None:
    for start in (0, 70):
        log = Events(epath.Path(tmp_path / str(start)), start)
        log.scalars('train', start + 10, {'loss': 0.5})
        log.close()
        version, restart, point = events(tmp_path / str(start))
        assert version.file_version == 'brain.Event:2'
        assert restart.session_log.status == SessionLog.START
        assert restart.step == start + 1
        assert point.step == start + 10


def test_no_client_of_buckets_is_loaded_for_a_run_on_this_machine() -> None:
    pytest.importorskip('google.cloud.storage')
    code = 'import sys, train; sys.exit("google.cloud.storage" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT).returncode == 0
    code = 'import train; from google.cloud import storage; storage.Client'
    assert subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT).returncode == 0
