"""Rungs 1 and 2 of the ladder: the same bits again, and the same bits after any kill."""

import dataclasses
import json
import logging
import random
import re
import shutil
import signal
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

import train
from configs import reviews
from configs.schema import Config, SeedsConfig
from errors import REQUEUE, UserError
from input_pipeline.reviews import make_reviews
from runtime import backend, command_line, preemption, resume
from runtime.run_record import read_record
from tasks.classification import DataConfig, ModelConfig
from tests import runs
from tools import curves

Trained = tuple[Path, dict[str, Any]]
LOSS = re.compile(r'step +(\d+)/\d+  (?!evaluation)(loss .*?accuracy [\d.]+)')


def small_config(**top: Any) -> Config:
    """The configuration of tests/runs.py, for a run in this process."""
    return dataclasses.replace(
        reviews.get_config(),
        num_steps=12,
        batch_size=16,
        eval_batch_size=64,
        eval_every=6,
        checkpoint_every=6,
        log_every=4,
        data=DataConfig(
            num_train=200, num_eval=70, bucket_lengths=(42,), window_batches=4, affixes=(3, 2)
        ),
        model=ModelConfig(embedding_size=8, hidden_size=8),
        **top,
    )


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Outcome and output of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp('undisturbed')
    output = runs.finish(workdir)
    return runs.outcome(workdir), output


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, pytest.param(8, marks=pytest.mark.long)])
def test_same_command_twice_gives_the_same_bits_on_1_and_on_8_devices(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], str], devices: int
) -> None:
    runs.finish(tmp_path, devices=devices)
    assert runs.outcome(tmp_path) == undisturbed[0]


@pytest.mark.slow
def test_run_stopped_at_random_moments_equals_undisturbed_run_bit_for_bit(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    moments = random.Random(20)
    for seed in (0, 7, 8, 9):  # another seed on a resume warns and has no effect
        number = signal.SIGKILL if seed else signal.SIGTERM
        process = runs.start(tmp_path, seed=seed)
        assert process.stdout is not None
        lines = (line for line in process.stdout if 'saving' not in line)  # only a new run has it
        assert any('compiling' in line for line in lines)  # the last line of the start report
        for _ in range(moments.randint(1, 2)):
            next(lines)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(number)
        process.communicate()
        assert process.returncode == (-signal.SIGKILL if seed else REQUEUE)
    printed = runs.finish(tmp_path, seed=10)
    assert runs.outcome(tmp_path) == undisturbed[0]
    assert 'config.seed = 10 has no effect' in printed
    logged = dict(LOSS.findall(undisturbed[1]))
    assert dict(LOSS.findall(printed)).items() <= logged.items()


@pytest.mark.slow
def test_run_killed_inside_a_save_equals_undisturbed_run_bit_for_bit(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    torn: list[Path] = []
    for _ in range(5):
        process = runs.start(tmp_path)
        while process.poll() is None and not torn:
            torn = list((tmp_path / 'checkpoints').glob('[1-9]*tmp*'))
        process.kill()
        process.communicate()
        torn = list((tmp_path / 'checkpoints').glob('[1-9]*tmp*'))
        if torn or process.returncode == 0:
            break
    assert torn, 'no kill fell into a save'
    runs.finish(tmp_path)
    assert runs.outcome(tmp_path) == undisturbed[0]


@pytest.fixture
def finished(classifier_run: Trained, tmp_path: Path) -> Trained:
    """The workdir, a copy, and the summary of a finished run of `small_config()`."""
    shutil.copytree(classifier_run[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, classifier_run[1]


@pytest.mark.slow
def test_finished_run_says_so_and_changes_nothing(
    finished: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path, first = finished
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
    with caplog.at_level(logging.INFO):
        second = train.train(small_config(), epath.Path(tmp_path))
    assert 'the run is finished at step 12' in caplog.text
    assert second == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()} == before


@pytest.mark.long
def test_run_stopped_and_prolonged_equals_the_long_run(tmp_path: Path) -> None:
    def config(steps: int) -> Config:
        whole = small_config()
        whole.optimizer.schedule = 'constant'
        return dataclasses.replace(whole, num_steps=steps)

    train.train(config(6), epath.Path(tmp_path / 'a'))
    resumed = train.train(config(12), epath.Path(tmp_path / 'a'))
    whole = train.train(config(12), epath.Path(tmp_path / 'b'))
    assert resumed['state_fingerprint'] == whole['state_fingerprint']
    assert resumed['eval'] == whole['eval']


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_passed_over_without_changing_a_bit(
    finished: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path, whole = finished
    run_record = tmp_path / 'checkpoints' / '12' / 'run' / 'metadata'
    run_record.write_text(run_record.read_text().replace('movie', 'novie'))
    (tmp_path / 'summary.json').unlink()
    resumed = train.train(small_config(), epath.Path(tmp_path))
    assert 'is damaged' in caplog.text
    assert (tmp_path / 'damaged' / '12').is_dir()
    assert resumed['state_fingerprint'] == whole['state_fingerprint']


@pytest.mark.slow
def test_run_asked_to_stop_in_its_last_step_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption.StopRequest, 'agreed', lambda *_: preemption.STOP)
    config = small_config()
    config.num_steps = 1
    assert train.train(config, epath.Path(tmp_path))['step'] == 1


@pytest.mark.slow
def test_no_whole_checkpoint_stops_the_run_instead_of_starting_over(finished: Trained) -> None:
    tmp_path, _ = finished
    for run_record in tmp_path.glob('checkpoints/*/run/metadata'):
        run_record.write_text('{}')
    with pytest.raises(UserError, match=r'no intact checkpoint is left'):
        train.train(small_config(), epath.Path(tmp_path))
    assert len(list((tmp_path / 'damaged').iterdir())) >= 2
    with pytest.raises(UserError, match=r'no intact checkpoint is left'):  # nor later
        train.train(small_config(), epath.Path(tmp_path))
    assert list((tmp_path / 'ledger').iterdir())


@pytest.mark.slow
def test_run_whose_checkpoints_are_gone_is_not_started_over(finished: Trained) -> None:
    tmp_path, _ = finished
    shutil.rmtree(tmp_path / 'checkpoints')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(UserError, match=r'found \d+-\d+\.npy and no checkpoint; bring back'):
        train.train(small_config(), epath.Path(tmp_path))
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize('name', ['config.json', 'summary.json'])
def test_new_run_overwrites_no_file_of_another_program(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=f'found {name} and no checkpoint'):
        command_line.require_free(epath.Path(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / 'config.json').write_text('{"num_shards": 1}')  # killed before its first checkpoint
    (tmp_path / 'ledger').mkdir()
    command_line.require_free(epath.Path(tmp_path))
    command_line.require_free(epath.Path(tmp_path / 'new'))


@pytest.mark.slow
def test_change_of_trajectory_is_refused_with_a_diff_unless_allowed(finished: Trained) -> None:
    tmp_path, _ = finished
    other = small_config()
    other.model.dropout = 0.4
    other.batch_size = 32
    with pytest.raises(UserError, match=r'batch_size: 16 -> 32; model.dropout: 0.5 -> 0.4'):
        train.train(other, epath.Path(tmp_path))
    other.num_steps = 14
    train.train(other, epath.Path(tmp_path), allow_changes=True)
    run_record = (tmp_path / 'checkpoints' / '14' / 'run' / 'metadata').read_text()
    assert 'batch_size: 16 -> 32' in run_record


@pytest.mark.slow
def test_resumable_options_and_seed_may_change_without_changing_a_bit(
    classifier_run: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = classifier_run[1]
    first = small_config()
    first.optimizer.decay_steps = first.num_steps
    train.train(dataclasses.replace(first, num_steps=6), epath.Path(tmp_path / 'b'))
    other = dataclasses.replace(first, seed=5, log_every=3, eval_every=4, checkpoint_every=4)
    resumed = train.train(other, epath.Path(tmp_path / 'b'))
    assert 'config.seed = 5 has no effect' in caplog.text
    assert resumed['root_key'] == reference['root_key']
    assert resumed['state_fingerprint'] == reference['state_fingerprint']
    assert resumed['eval'] == reference['eval']


@pytest.mark.slow
def test_checkpoints_by_the_clock_change_no_bit(tmp_path: Path, classifier_run: Trained) -> None:
    for minutes, steps in ((1e-9, range(13)), (1e6, (0, 6, 12))):
        config = small_config(checkpoint_minutes=minutes, keep_newest=20)
        run = tmp_path / str(minutes)
        summary = train.train(config, epath.Path(run))
        assert summary['state_fingerprint'] == classifier_run[1]['state_fingerprint']
        assert sorted(int(path.name) for path in (run / 'checkpoints').iterdir()) == list(steps)
        assert runs.outcome(run) == runs.outcome(classifier_run[0])


def test_processes_save_once_for_each_time_that_a_clock_asks(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The votes that are on their way when all save asked for this save, too."""
    monkeypatch.setattr(preemption.jax, 'process_count', lambda: 2)
    request, asks, decisions = preemption.StopRequest(), True, []
    for step in range(9):
        decisions.append(request.agreed(layout(8), asks or step == 5))
        asks = asks and decisions[-1] != preemption.SAVE
    save, train_on = preemption.SAVE, preemption.TRAIN
    assert decisions == [train_on, train_on, save] + [train_on] * 4 + [save, train_on]
    request._asked = True
    decisions = [request.agreed(layout(8), True) for _ in range(3)]
    assert preemption.STOP in decisions


def test_one_process_that_is_asked_to_stop_stops_all(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption.jax, 'process_count', lambda: 2)

    def put(batch: dict[str, Any]) -> Any:
        return layout(8).put({'votes': batch['votes'] * (np.arange(8) == 5)})

    place, request = types.SimpleNamespace(put=put), preemption.StopRequest()
    for vote, save in ((preemption.SAVE, True), (preemption.STOP, False)):
        request._asked = vote == preemption.STOP
        train_on = preemption.TRAIN
        assert [request.agreed(place, save) for _ in range(3)] == [train_on, train_on, vote]


@pytest.mark.slow
@pytest.mark.parametrize(('split', 'fact'), [('train', 'training'), ('eval', 'evaluation')])
def test_changed_data_is_refused(finished: Trained, split: str, fact: str) -> None:
    other = small_config()
    setattr(other.data, f'num_{split}', getattr(other.data, f'num_{split}') + 1)
    with pytest.raises(UserError, match=f'{fact}_data'):
        train.train(other, epath.Path(finished[0]))


@pytest.mark.slow
def test_best_and_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = small_config(keep_newest=1, keep_best=1)
    config.num_steps, config.checkpoint_every, config.eval_every = 20, 2, 2
    train.train(config, epath.Path(tmp_path))
    kept = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
    curve = curves.read(epath.Path(tmp_path))['evaluation/accuracy']
    best = int(curve[np.argmax(curve[:, 1]), 0])
    assert best < 20
    assert kept == {best, 20}


def resumed(run: Path, **manifest: Any) -> list[str]:
    """Plans a resume of a finished run on other code or another machine, which trains nothing."""
    saved = read_record(epath.Path(run) / 'checkpoints' / '12')
    saved['manifest'] |= manifest
    config = small_config()
    where = epath.Path(run)
    planned, run_record = resume.plan(config, saved['task'], where, saved, False)
    assert planned == config
    assert run_record['manifest']['overrides'] == []
    return sorted(run_record['manifest']['code']['files'])


@pytest.mark.slow
def test_finished_run_is_evaluated_again_on_other_data(tmp_path: Path) -> None:
    """A summary is only ever for the data that was evaluated."""
    splits = make_reviews(80, 90)
    for name, (texts, labels), rows in (
        ('train', splits[0], slice(None)),
        ('dev', splits[1], slice(40)),
        ('other', splits[1], slice(40, None)),
    ):
        pairs = list(zip(texts, labels, strict=True))[rows]
        lines = [f'{text}\t{label}\n' for text, label in pairs]
        (tmp_path / f'{name}.tsv').write_text('text\tlabel\n' + ''.join(lines))

    def summary(evaluation: str, **flags: bool) -> dict[str, Any]:
        config = small_config()
        config.num_steps, config.data.source = 2, 'files'
        config.data.train = str(tmp_path / 'train.tsv')
        config.data.evaluation = str(tmp_path / f'{evaluation}.tsv')
        return train.train(config, epath.Path(tmp_path / 'run'), **flags)

    first = summary('dev')
    other = summary('other', allow_changes=True)
    assert other['eval'] != first['eval']
    assert other['state_fingerprint'] == first['state_fingerprint']
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text()) == other
    assert summary('dev')['eval'] == first['eval']


@pytest.mark.slow
def test_resume_under_other_code_warns_once_with_the_files_that_changed(
    classifier_run: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = classifier_run
    files = resumed(run)
    assert not caplog.messages
    edited = dict.fromkeys(files, '0') | {'model/gone.py': '1'}
    resumed(run, code={'commit': 'a' * 40, 'dirty': False, 'files': edited})
    (warning,) = caplog.messages
    assert warning.startswith(
        'code changed since the checkpoint: arrays.py, configs/checks.py, configs/schema.py, '
    )
    assert len(warning) <= 400
    caplog.clear()
    same = backend.code_files() | {'model/gone.py': '1'}
    resumed(run, code={'commit': '', 'dirty': True, 'files': same})
    assert caplog.messages == ['code changed since the checkpoint: model/gone.py']


def test_shards_stay_and_formats_and_devices_that_change_bits_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, workdir = backend.environment(), epath.Path('run')

    def planned(saved: dict[str, Any] | None, devices: int = 8, **changes: Any) -> dict[str, Any]:
        monkeypatch.setattr(backend, 'environment', lambda: here | {'device_count': devices})
        config = small_config(**({'num_shards': 0} | changes))
        return resume.plan(config, {}, workdir, saved, False)[1]

    saved = planned(None)
    for changes in ({'devices': 2}, {'num_shards': 8}):
        assert planned(saved, **changes)['manifest']['num_shards'] == 8
    with pytest.raises(UserError, match='num_shards: 8 -> 4'):
        planned(saved, num_shards=4)
    for name in ('key_format', 'mask_format'):
        other = saved | {'manifest': saved['manifest'] | {name: 9}}
        with pytest.raises(UserError, match=f'^the checkpoint has {name} 9, this code '):
            planned(other)
    summed = planned(None, reduction='psum')
    assert planned(summed, reduction='psum')['manifest']['overrides'] == []
    for count in (4, 16):
        summed['manifest']['device_count'] = count
        with pytest.raises(UserError, match=rf'device_count: {count} -> 8 \(only reduction='):
            planned(summed, reduction='psum')


def test_manifest_keeps_every_change_that_was_ever_allowed() -> None:
    record = None
    for precision in ('highest', 'high', 'high', 'default'):
        config = small_config(matmul_precision=precision)
        where = epath.Path('run')
        record = resume.plan(config, {}, where, record, True)[1]
    assert record
    changes = ("'highest' -> 'high'", "'high' -> 'default'")
    assert record['manifest']['overrides'] == [f'matmul_precision: {text}' for text in changes]


def test_resumed_run_records_the_seeds_that_made_its_root_keys() -> None:
    where, first = epath.Path('run'), small_config(seed=3, seeds=SeedsConfig(dropout=7))
    saved = resume.plan(first, {}, where, None, False)[1]
    config, record = resume.plan(small_config(), {}, where, saved, False)
    assert config == first
    assert record['config'] == saved['config']


@pytest.mark.slow
def test_resume_with_other_xla_flags_warns_of_roundings(
    classifier_run: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    resumed(classifier_run[0], xla_flags='--xla_old=1')
    (warning,) = caplog.messages
    assert warning.startswith("since the checkpoint was written: xla_flags '--xla_old=1' -> '--xla")
    assert 'numbers agree to rounding' in warning


def test_change_of_a_long_fact_is_told_in_brief() -> None:
    words = [[f'w{n}' for n in range(10_000)]]
    for then, now in ((words, []), ([], words), (words, words[:1] * 2), ('a' * 999, 'b' * 999)):
        (change,) = resume.task_changes({'affixes': then}, {'affixes': now})
        assert change.startswith('affixes: ')
        assert len(change) <= 200
