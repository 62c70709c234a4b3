"""The promises of tools/evaluate.py: the metrics of training, on any layout, of any checkpoint."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

import train
from tasks.classification import DataConfig
from tests.test_resume import small_config
from tools import evaluate, saved_run

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]


@pytest.mark.parametrize('devices', [1, 4, 8])
def test_metrics_are_those_of_training_on_any_number_of_devices(
    classifier_run: Trained, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    workdir, summary = classifier_run
    run = saved_run.open_run(str(workdir))
    found = jax.devices()[:devices]
    monkeypatch.setattr(jax, 'devices', lambda: found)
    assert run.layout().mesh.size == devices
    assert evaluate.evaluate(run, run.task()) == summary['eval']


def test_command_prints_metrics_and_a_confusion_matrix_that_agree(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, summary = classifier_run
    assert evaluate.main([str(workdir)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == 'step 12, 70 examples of the run'
    shown = dict(line.split() for line in lines[:2])
    assert shown == {name: f'{value:.6g}' for name, value in summary['eval'].items()}
    assert lines[3:5] == ['true      predicted', '          negative  positive']
    counts = np.array([line.split()[1:] for line in lines[5:]], int)
    assert counts.sum() == 70
    assert np.trace(counts) == round(summary['eval']['accuracy'] * 70)


def test_best_step_is_the_checkpoint_with_the_best_evaluation(
    classifier_run: Trained, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    shutil.copytree(classifier_run[0], workdir)
    file = workdir / 'metrics.csv'
    assert saved_run.open_run(str(workdir)).step == 12
    for accuracy, best in ((2.0, 6), (-1.0, 12)):
        changed = re.sub(
            r'(?m)^6,evaluation/accuracy,.*$', f'6,evaluation/accuracy,{accuracy}', file.read_text()
        )
        file.write_text(changed)
        assert saved_run.open_run(str(workdir), 'best').step == best
    file.unlink()
    with pytest.raises(evaluate.UserError, match='was evaluated; expected one of its steps, 6, 12'):
        saved_run.open_run(str(workdir), 'best')


def test_other_data_is_read_from_the_file_that_is_named(
    classifier_run: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda: one)  # compiles faster
    lines = [
        f'{word} film {n}\t{label}' for n in range(8) for word, label in (('good', 1), ('bad', 0))
    ]
    for name, rows in (('train', lines), ('dev', lines), ('other', lines[:5])):
        (tmp_path / f'{name}.tsv').write_text('\n'.join(['text\tlabel', *rows]) + '\n')
    data = DataConfig(
        source='files', train=str(tmp_path / 'train.tsv'), evaluation=str(tmp_path / 'dev.tsv'),
        min_frequency=1, bucket_lengths=(20,), window_batches=2,
    )  # fmt: skip
    train.train(
        dataclasses.replace(small_config(), num_steps=2, data=data), epath.Path(tmp_path / 'run')
    )
    flags = [str(tmp_path / 'run'), f'--data={tmp_path / "other.tsv"}']
    assert evaluate.main(flags) == 0
    assert f'step 2, 5 examples of {tmp_path / "other.tsv"}' in capsys.readouterr().out

    (tmp_path / 'train.tsv').write_text('text\tlabel\nnew\t1\nwords\t0\n')
    for wrong, expected in (
        (flags, 'the data is not what the run was trained on: tokenizer'),
        ([str(classifier_run[0]), '--data=dev.tsv'], "config.data.source = 'reviews'"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate.main(wrong)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
