"""The promises of tasks/multilabel.py, which needs no line in any other file."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

import tasks
import train
from configs.schema import Config
from errors import UserError
from input_pipeline.examples import Features, read_splits
from tasks import multilabel
from tasks.multilabel import DataConfig, ModelConfig
from tests.parameters import random_params
from tests.tfds_reviews import Reviews
from tools import evaluate, predict, saved_run
from training.evaluation import make_totals

ROWS = [
    ('great food', ['food']),
    ('slow service', ['service']),
    ('great food slow service', ['food', 'service']),
    ('the door is red', []),
] * 8


def written(folder: Path, suffix: str, rows: list[tuple[str, list[str]]] = ROWS) -> Path:
    """Writes rows as a file of one kind."""
    file = folder / f'rows{suffix}'
    if 'jsonl' in suffix:
        text = ''.join(json.dumps({'text': t, 'labels': found}) + '\n\n' for t, found in rows)
    else:
        text = 'text\tlabels\n' + ''.join(f'{t}\t{" , ".join(found)}\n' for t, found in rows)
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith('.gz') else text.encode())
    return file


def config_of(file: Path, **data: Any) -> Config:
    """Returns the config of a tiny run."""
    return Config(
        num_steps=6,
        num_shards=8,
        batch_size=8,
        eval_batch_size=8,
        eval_every=3,
        checkpoint_every=3,
        data=DataConfig(
            **{'train': str(file), 'evaluation': str(file), 'min_frequency': 1}
            | {'bucket_lengths': (8,), 'window_batches': 2}
            | data
        ),
        model=ModelConfig(
            embedding_size=8, hidden_size=8, word_dropout=0.1, embedding_dropout=0.2, dropout=0.2
        ),
    )


def test_labels_in_json_lists_and_in_tables_are_the_same(tmp_path: Path) -> None:
    files = [written(tmp_path, suffix) for suffix in ('.tsv', '.jsonl', '.jsonl.gz', '.tsv.gz')]
    made = [tasks.make_task(config_of(file)) for file in files]
    assert all(task.resume_facts == made[0].resume_facts for task in made)
    batch = made[1].train.batch(np.arange(4), 8)
    assert made[1].resume_facts['labels'] == ['food', 'service']
    assert batch['labels'].tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    numbered = [(f'{text} {n}', found) for n, (text, found) in enumerate(ROWS)]
    held_out = tasks.make_task(config_of(written(tmp_path, '.jsonl', numbered), evaluation='30%'))
    assert len(held_out.train) + len(held_out.evaluation) == len(ROWS)


def test_labels_of_tfds_are_a_text(tmp_path: Path) -> None:
    Reviews(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    data = DataConfig(source='tfds', name='reviews', data_dir=str(tmp_path))
    train, _ = read_splits(data, Features(('hypothesis',), 'premise', separator=' '))
    assert train.texts == [('film',), ('film',), ('play',)]
    assert train.labels == [['good'], ['bad'], ['fine', 'é']]


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ('{"text": "a"}', "rows.jsonl:2: key 'labels' is not among ['text']"),
        ('{"text": "a", "labels": 5}', "rows.jsonl:2: 'labels' is 5, expected a list or some text"),
        (
            '{"text": "a", "labels": [null]}',
            "rows.jsonl:2: 'labels' is None, expected some text or a",
        ),
        ('{"text": "a", "labels": "Food"}', "label 'Food', but"),
    ],
)
def test_malformed_labels_are_refused_where_they_are(
    tmp_path: Path, row: str, expected: str
) -> None:
    file = tmp_path / 'rows.jsonl'
    file.write_text('{"text": "b", "labels": ["food", "service"]}\n' + row)
    with pytest.raises(UserError) as refused:
        tasks.make_task(config_of(file))
    assert expected in str(refused.value)


def test_bad_rows_are_skipped_and_listed_where_the_config_says_so(tmp_path: Path) -> None:
    """In tables and in JSON: no visible text, no labels, labels that stand for a missing one."""
    table = written(tmp_path, '.tsv')
    table.write_text(table.read_text() + '\u200b\tfood\nb\tnan,food\n')
    objects = written(tmp_path, '.jsonl')
    rows = ({'text': 'a'}, {'text': 'b', 'labels': None}, {'text': 'c', 'labels': ['N/A']})
    objects.write_text(objects.read_text() + '\n'.join(map(json.dumps, rows)))
    for file, count in ((table, 2), (objects, 3)):
        with pytest.raises(UserError):
            tasks.make_task(config_of(file))
        task = tasks.make_task(config_of(file, bad_rows='skip'))
        assert task.resume_facts['labels'] == ['food', 'service']
        assert len(task.train) == len(ROWS)
        assert len(set(task.files['skipped_rows.txt'].splitlines())) == count


def test_data_without_a_label_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, '.jsonl', [(text, []) for text, _ in ROWS])
    with pytest.raises(UserError, match=r"rows.jsonl: no row has a label in 'labels'"):
        tasks.make_task(config_of(file))


def test_equal_texts_are_on_one_side_whatever_their_labels(tmp_path: Path) -> None:
    rows = [(f'film {n % 30}', ['food', 'service'][: n // 30]) for n in range(90)]
    for suffix in ('.tsv', '.jsonl'):
        task = tasks.make_task(config_of(written(tmp_path, suffix, rows), evaluation='30%'))
        splits = (task.train, task.evaluation)
        train, held_out = ({split.text(row) for row in range(len(split))} for split in splits)
        assert train
        assert held_out
        assert not train & held_out


def test_unknown_labels_and_weights_are_refused(tmp_path: Path) -> None:
    file, other = written(tmp_path, '.tsv'), tmp_path / 'other.tsv'
    other.write_text('text\tlabels\nfood\tfod,service\n')
    with pytest.raises(UserError, match=r"other.tsv:2: label 'fod' .* did you mean 'food'"):
        tasks.make_task(config_of(file, evaluation=str(other)))
    with pytest.raises(UserError, match='expected no weights of labels'):
        tasks.make_task(config_of(file, class_weights=('balanced',)))


def test_counts_of_labels_are_of_the_evaluation_alone(tmp_path: Path) -> None:
    """With rngs it is training, even without a stream in them."""
    config = config_of(written(tmp_path, '.tsv'))
    off = dict.fromkeys(('word_dropout', 'embedding_dropout', 'dropout'), 0.0)
    config.model = ModelConfig(embedding_size=8, hidden_size=8, **off)
    task = tasks.make_task(config)
    rows = random_params(task.init), task.train.batch(np.arange(4), 8)
    assert set(task.eval_sums(*rows)) == {*task.sum_names, *multilabel.COUNTS}
    assert set(task.loss_sums(*rows, {})) == set(task.sum_names)


@pytest.mark.parametrize('devices', [1, 4])
def test_counts_of_labels_are_exact_on_any_layout(
    tmp_path: Path, layout: Callable[..., Any], devices: int
) -> None:
    task = tasks.make_task(config_of(written(tmp_path, '.tsv', ROWS[:7])))
    params = random_params(task.init)
    batch = task.evaluation.batch(np.arange(8) % 7, 8)
    batch['weights'][7] = 0
    where = layout(devices)
    total = make_totals(task.eval_sums, where, lambda: iter([batch, batch]))
    found = total(jax.device_put(params, where.replicated))
    alone = jax.jit(task.eval_sums)
    rows = [alone(params, {n: x[[row]] for n, x in batch.items()}) for row in range(7)]
    for name in ('exact_match', 'weight', *multilabel.COUNTS):
        np.testing.assert_array_equal(found[name], 2 * sum(np.asarray(row[name]) for row in rows))
    assert found['true'].tolist() == [8, 8]
    perfect = {name: np.float64([4, 4]) for name in multilabel.COUNTS}
    metrics = multilabel.multilabel_metrics(
        perfect | {'loss': np.float64(7), 'weight': np.float64(7), 'exact_match': np.float64(7)}
    )
    assert metrics == {'loss': 1, 'exact_match': 1, 'micro_f1': 1, 'macro_f1': 1}


@pytest.mark.slow
def test_run_trains_evaluates_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / 'run'
    config = config_of(written(tmp_path, '.jsonl'))
    config = dataclasses.replace(config, num_steps=60, eval_every=30, checkpoint_every=60)
    config.optimizer.learning_rate = 3e-2
    summary = train.train(config, epath.Path(workdir))
    assert summary['eval']['micro_f1'] > 0.9
    run = saved_run.open_run(str(workdir))
    task = run.task()
    assert task.metrics(evaluate.evaluation_totals(run, task)) == summary['eval']
    assert evaluate.main([str(workdir)]) == 0
    printed = capsys.readouterr().out
    assert 'micro average' in printed
    assert [example.true for example in evaluate.each_example(
        run, task, run.predictor(), run.params(task.init)
    )] == [', '.join(found) or 'none' for _, found in ROWS]  # fmt: skip
    assert predict.main([str(workdir), '--text', 'great food slow service']) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown['labels'] == ['food', 'service']
    assert set(shown['probabilities']) == {'food', 'service'}
    arguments = [str(workdir), '--text', 'great food slow service', '--format=tsv']
    assert predict.main(arguments) == 0
    header, row = (line.split('\t') for line in capsys.readouterr().out.splitlines())
    assert dict(zip(header, row, strict=True))['labels'] == 'food,service'
