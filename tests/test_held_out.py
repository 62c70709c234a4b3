"""A share of the training rows, held out for evaluation, depends on their texts alone."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from configs.schema import Config
from errors import UserError
from input_pipeline.examples import Features, Rows, read_splits
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from tools.saved_run import SavedRun

Cells = list[tuple[str, str]]  # text, label


def split(folder: Path, cells: Cells, share: str, pairs: bool = False) -> tuple[Rows, Rows]:
    """Reads a file of these cells, and returns the training rows and those held out."""
    file = folder / 'all.jsonl'
    file.write_text('\n'.join(json.dumps({'text': text, 'label': label}) for text, label in cells))
    data = DataConfig(source='files', train=str(file), evaluation=share)
    if pairs:
        return read_splits(data, Features(('text', 'label'), pairs=True))
    return read_splits(data, Features(('text',), 'label'))


def texts(rows: Rows) -> set[str]:
    """Returns the texts of a split."""
    return {text for text, *_ in rows.texts}


CELLS = [(f'film number {n}', 'pos' if n % 3 else 'neg') for n in range(2000)]


@pytest.mark.parametrize(('share', 'expected'), [('10%', 200), ('2.5%', 50), ('50%', 1000)])
def test_share_is_held_out_and_every_row_is_in_one_split(
    tmp_path: Path, share: str, expected: int
) -> None:
    train, held_out = split(tmp_path, CELLS, share)
    assert len(held_out.texts) == pytest.approx(expected, abs=40)
    together = [*zip(train.texts, train.labels), *zip(held_out.texts, held_out.labels)]  # noqa: B905
    assert sorted(((text,), [label]) for text, label in CELLS) == sorted(together)
    line = 1 + CELLS.index((held_out.texts[0][0], held_out.labels[0][0]))
    assert held_out.place(0).endswith(f'all.jsonl:{line} (held out of training)')
    assert train.place(0).endswith('all.jsonl:1')


def test_rows_keep_their_split_when_the_file_grows_or_is_shuffled(tmp_path: Path) -> None:
    _, before = split(tmp_path, CELLS[:1000], '10%')
    shuffled = random.Random(1).sample(CELLS, len(CELLS))
    train, after = split(tmp_path, shuffled, '10%')
    assert texts(before) < texts(after)
    assert not texts(before) & texts(train)
    _, more = split(tmp_path, CELLS, '20%')
    assert texts(after) < texts(more)


def test_which_rows_are_held_out_is_fixed_for_all_releases(tmp_path: Path) -> None:
    _, held_out = split(tmp_path, CELLS[:60], '10%')
    assert [
        CELLS.index((text, label))
        for (text,), (label,) in zip(held_out.texts, held_out.labels, strict=True)
    ] == [25, 37, 48, 55, 59]


def test_equal_texts_are_on_one_side_whatever_their_labels(tmp_path: Path) -> None:
    cells = [(f' film {n % 100}' + ' ' * (n % 2), 'pos' if n % 7 else 'neg') for n in range(1000)]
    train, held_out = split(tmp_path, cells, '30%')
    assert not texts(train) & texts(held_out)
    assert texts(train) | texts(held_out) == {f'film {n}' for n in range(100)}


def test_class_of_the_training_split_is_a_class_in_evaluation_too(tmp_path: Path) -> None:
    """Here -1 is one, though in evaluation only 0 and 1 are beside it."""
    files = {'train': ['-2', '-1', '0', '1'], 'dev': ['-1', '0', '1']}
    for name, labels in files.items():
        rows = [f'{name} {n}\t{label}\n' for n in range(3) for label in labels]
        (tmp_path / f'{name}.tsv').write_text('text\tlabel\n' + ''.join(rows))
    train, evaluation = (str(tmp_path / f'{name}.tsv') for name in files)
    data = DataConfig(source='files', train=train, evaluation=evaluation)
    features = Features(('text',), 'label')
    assert read_splits(data, features)[1].labels == [[label] for label in 3 * files['dev']]
    with pytest.raises(UserError, match="'-1', which marks a missing label"):
        read_splits(dataclasses.replace(data, train=evaluation), features)


def test_pairs_of_one_source_are_on_one_side(tmp_path: Path) -> None:
    cells = [(f'film {n % 100}', f'Film {n}') for n in range(300)]
    train, held_out = split(tmp_path, cells, '30%', pairs=True)
    assert len(train.texts) + len(held_out.texts) == 300
    assert not texts(train) & texts(held_out)


@pytest.mark.parametrize('share', ['0%', '0.01%', '100%', '250%'])
def test_share_that_leaves_a_split_empty_is_refused(tmp_path: Path, share: str) -> None:
    with pytest.raises(
        UserError, match=rf"^config\.data\.evaluation = '{share}': holds out \d+ of 9 "
    ):
        split(tmp_path, CELLS[:9], share)


@pytest.mark.parametrize('name', ['ten%', '-10%', '10 %', '10%%', '%', '1e1%'])
def test_what_is_no_share_is_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f'^config.data.evaluation: {name}: suffix') as caught:
        split(tmp_path, CELLS[:9], name)
    assert str(caught.value).endswith('.jsonl, or a share of the training rows, such as 10%')


def test_another_split_is_evaluated_while_the_share_stays_out_of_training(tmp_path: Path) -> None:
    other = tmp_path / 'other.jsonl'
    other.write_text('{"text": "film", "label": "pos"}')
    kept, _ = split(tmp_path, CELLS, '10%')
    train, evaluation = split(tmp_path, CELLS, f'10%:{other}')
    assert train.texts == kept.texts
    assert evaluation.texts == [('film',)]


def test_evaluating_a_run_on_another_file_trains_on_the_same_rows(tmp_path: Path) -> None:
    split(tmp_path, CELLS, '10%')
    other = tmp_path / 'other.jsonl'
    other.write_text('{"text": "film", "label": "pos"}')
    data = DataConfig(source='files', train=str(tmp_path / 'all.jsonl'), evaluation='10%')
    config = Config(data=data, model=ModelConfig())
    record: Any = {'task': classification.make_task(config).resume_facts}
    run = SavedRun(epath.Path(tmp_path), 0, record, config)
    assert len(run.task().evaluation) > 100
    assert len(run.task(str(other)).evaluation) == 1


def test_task_reports_no_text_in_both_splits_and_skipped_rows_once(tmp_path: Path) -> None:
    file = tmp_path / 'a.tsv'
    rows = ''.join(f'{text} {n}\t{label}\n' for text, label in CELLS[:300] for n in 'abaa')
    file.write_text(f'text\tlabel\n{rows}\tpos\n')
    options: dict[str, Any] = {'train': str(file), 'evaluation': '10%', 'bad_rows': 'skip'}
    data = DataConfig(source='files', min_frequency=1, **options)
    task = classification.make_task(Config(data=data, model=ModelConfig()))
    assert len(task.train) + len(task.evaluation) == 1200
    assert ' 1 bad rows skipped, ' in task.summary
    assert not any('in the training split too' in line for line in task.warnings)
