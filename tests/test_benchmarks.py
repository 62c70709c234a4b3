"""The benchmarks run and name what they measure; no test depends on a measured time."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__, common, data, loop, recurrence, scale, start, step
from benchmarks.common import Row
from configs.schema import Config
from runtime import backend
from tasks.classification import ModelConfig
from tests import runs
from tests.test_resume import small_config

pytestmark = pytest.mark.long


def small(**top: int) -> Config:
    """Returns a config that is quick to measure."""
    config = small_config(**top)
    return dataclasses.replace(config, batch_size=16)


def values(rows: list[Row]) -> dict[str, float]:
    """Returns what -> value."""
    found = {what: value for what, value, _ in rows}
    assert len(found) == len(rows)
    assert all(math.isfinite(value) for value in found.values()), found
    return found


def test_loop_and_data_run_on_a_small_config(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (data, loop):
        monkeypatch.setattr(module, 'config', small)
        monkeypatch.setattr(module, 'ROUNDS', 1)
    monkeypatch.setattr(data, 'BATCHES', 8)
    monkeypatch.setattr(loop, 'FIRST', 4)
    monkeypatch.setattr(loop, 'LAST', 9)
    found = values(loop.measure())
    assert found['on each device: optimizer state'] > 2 * found['on each device: parameters']
    assert found['its step alone'] > 0
    monkeypatch.setattr(scale, 'config', small)
    for name, count in (('EXAMPLES', 1000), ('LATE', 100), ('BATCHES', 4)):
        monkeypatch.setattr(scale, name, count)
    assert values(scale.measure())['examples'] == 1000
    found = values(data.measure())
    assert found['padding, one width'] > found['padding, every eight, window 4'] > 0


def test_step_and_recurrence_run_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step, recurrence):
        monkeypatch.setattr(module, 'ROUNDS', 1)
    monkeypatch.setattr(step.sst2, 'get_config', small)
    monkeypatch.setattr(recurrence, 'config', small)
    monkeypatch.setattr(recurrence, 'LENGTHS', (4,))
    assert isinstance(small().model, ModelConfig)
    assert len(values(step.measure())) == 14
    assert len(values(recurrence.measure())) == 3


def test_start_is_timed_in_a_separate_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start, 'CONFIG', 'configs/reviews.py')
    assert start.launch(tmp_path / 'run', tmp_path / 'cache') > 0
    assert list((tmp_path / 'cache').iterdir())


def test_each_value_stands_beside_the_one_of_the_version_before() -> None:
    results = {'data': {'rows': [['speed', 30.0, 'batches/s'], ['new', 1.0, 's']]}}
    record: Any = {'config': common.CONFIG, 'data': {'rows': [['speed', 40.0, 'batches/s']]}}
    assert __main__.table(results, record).splitlines()[2:] == [
        '| data | speed | 30 batches/s | 40 batches/s | 0.75 |',
        '| data | new | 1 s | | |',
    ]
    # Neither another config, nor another processor, nor a row that was not measured again.
    elsewhere = {'rows': record['data']['rows'], 'environment': {'processor': 'another'}}
    for other in (record | {'config': 'x.py'}, record | {'data': elsewhere}, record | results):
        assert '| data | speed | 30 batches/s | | |' in __main__.table(results, other)


def test_one_command_writes_a_table_and_what_it_ran_on(tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'benchmarks', '--only', 'data', f'--out={tmp_path}']
    rows, here = [['batches from 1 thread', 1.0, 'batches/s']], backend.environment()
    before: Any = {'config': 'configs/reviews.py', 'data': {'rows': rows, 'environment': here}}
    before['start'] = {'rows': [['to the first step', 3.0, 's']]}
    (tmp_path / 'bench.json').write_text(json.dumps(before))
    env = runs.environment(1, TFDS_DATA_DIR=str(tmp_path))
    done = subprocess.run(command, cwd=runs.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / 'bench.json').read_text())
    assert written['config'] == 'configs/reviews.py'
    assert written['start'] == before['start'], 'not measured now'
    assert written['data']['environment']['versions']['jax']
    assert [len(row) for row in written['data']['rows']] == [3] * 8
    assert (tmp_path / 'bench.md').read_text() in done.stdout
    assert '| 1 batches/s | ' in done.stdout
