"""The promises of tools/evaluate.py: the metrics of training, on any layout, of any checkpoint."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

import train
from runtime.run_record import seal
from tasks.classification import DataConfig
from tests import runs
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
    task = run.task()
    assert task.metrics(evaluate.evaluation_totals(run, task)) == summary['eval']


@pytest.mark.parametrize(
    'tool', ['evaluate', pytest.param('replay --step=12', marks=pytest.mark.long)]
)
def test_fresh_process_computes_as_the_run_did(classifier_run: Trained, tool: str) -> None:
    """XLA's flags are set before JAX starts, without which a backend can be found to be wrong."""
    workdir, summary = classifier_run
    module, *flags = tool.split()
    command = [sys.executable, '-m', f'tools.{module}', str(workdir), *flags]
    printed = runs.printed(command, runs.ROOT, runs.environment(1), 300)
    same = (
        'the same bits as the ledger' if flags else f'loss           {summary["eval"]["loss"]:.6g}'
    )
    assert same in printed


@pytest.mark.parametrize('tool', ['predict', 'evaluate', 'export', 'replay', 'report'])
def test_platform_that_jax_cannot_start_is_one_line(
    classifier_run: Trained, tmp_path: Path, tool: str
) -> None:
    flags = {'predict': '--text=a', 'replay': '--step=3'}.get(tool, f'--out={tmp_path / "out"}')
    flags = '--data=x' if tool == 'evaluate' else flags
    done = subprocess.run(
        [sys.executable, '-m', f'tools.{tool}', str(classifier_run[0]), flags],
        cwd=runs.ROOT,
        env=runs.environment(1, JAX_PLATFORMS='cuda'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'JAX_PLATFORMS = cuda: JAX cannot start it' in line


def test_command_prints_metrics_and_a_confusion_matrix_that_agree(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, summary = classifier_run
    assert evaluate.main([str(workdir)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == 'step 12, 70 examples of the run'
    shown = dict(line.split() for line in lines[:4])
    assert shown == {name: f'{value:.6g}' for name, value in summary['eval'].items()}
    assert list(shown) == ['loss', 'accuracy', 'macro_f1', 'weighted_f1']
    table = {line.split()[0]: line.split()[-4:] for line in lines[6:11]}
    assert table['micro'][:3] == 3 * [f'{summary["eval"]["accuracy"]:.4f}']
    assert table['macro'][2] == f'{summary["eval"]["macro_f1"]:.4f}'
    assert table['weighted'][1:] == [  # recall, weighted by the examples, is accuracy
        f'{summary["eval"]["accuracy"]:.4f}', f'{summary["eval"]["weighted_f1"]:.4f}', '70',
    ]  # fmt: skip
    assert lines[12:14] == ['true      predicted', '          negative  positive']
    counts = np.array([line.split()[1:] for line in lines[14:]], int)
    assert [int(table[label][3]) for label in ('negative', 'positive')] == [*counts.sum(axis=1)]
    assert counts.sum() == 70
    assert np.trace(counts) == round(summary['eval']['accuracy'] * 70)


def test_best_step_is_the_checkpoint_with_the_best_evaluation(
    classifier_run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_run.tasks, 'make_task', pytest.fail)  # the data may be gone
    workdir = tmp_path / 'run'
    shutil.copytree(classifier_run[0], workdir)
    for file in ('metrics.csv', 'summary.json'):
        (workdir / file).unlink()  # the checkpoints say it
    assert saved_run.open_run(str(workdir)).step == 12
    records = {step: workdir / 'checkpoints' / str(step) / 'run' / 'metadata' for step in (6, 12)}

    def evaluated(step: int, evaluation: dict[str, float] | None) -> None:
        record = json.loads(records[step].read_text())
        record['manifest']['evaluation'] = evaluation
        records[step].write_text(json.dumps(seal(record)))

    equal = classifier_run[1]['eval']['accuracy']  # of equals, the earliest
    for accuracy, best in ((2.0, 6), (equal, 6), (-1.0, 12), (math.nan, 12)):
        evaluated(6, {'accuracy': accuracy})
        assert saved_run.open_run(str(workdir), 'best').step == best
    for step in records:
        evaluated(step, None)
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
