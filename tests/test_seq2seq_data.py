"""Pairs of texts come whole from every source of texts."""

from pathlib import Path
from typing import Any

import pytest

from configs import schema
from configs.schema import Config
from errors import UserError
from input_pipeline.pairs import Pairs
from tasks.seq2seq import DataConfig, ModelConfig, make_predictor, make_task, read_pairs
from tests.tfds_reviews import Reviews, prepare_rows

Splits = tuple[Pairs, Pairs, tuple[str, ...]]  # of training, of evaluation; problems skipped

PAIRS = {
    '.tsv': 'en\tde\na film\tein Film\n\ntwo "films\tzwei "Filme\n',
    '.csv': 'en,de\na film,ein Film\n"two ""films","zwei ""Filme"\n',
    '.jsonl': (
        '{"en": "a film", "de": "ein Film"}\n{"en": "two \\"films", "de": "zwei \\"Filme"}\n'
    ),
}


def read_file(folder: Path, suffix: str, contents: str, **options: Any) -> Splits:
    """Reads one file as training and as evaluation pairs."""
    path = folder / f'pairs{suffix}'
    path.write_text(contents)
    data = {
        'source': 'files',
        'train': str(path),
        'evaluation': str(path),
        'source_feature': 'en',
        'target_feature': 'de',
    }
    return read_pairs(DataConfig(**(data | options)))


def read_tfds(data_dir: Path, **options: Any) -> Splits:
    """Reads premises and hypotheses of the data set of tests/test_tfds_source.py."""
    data = {
        'source': 'tfds',
        'name': 'reviews',
        'data_dir': str(data_dir),
        'source_feature': 'premise',
        'target_feature': 'hypothesis',
    }
    return read_pairs(DataConfig(**(data | options)))


@pytest.mark.parametrize('suffix', PAIRS)
def test_pairs_are_read_from_every_format(tmp_path: Path, suffix: str) -> None:
    train, evaluation, skipped = read_file(tmp_path, suffix, PAIRS[suffix])
    assert train == [('a film', 'ein Film'), ('two "films', 'zwei "Filme')]
    assert evaluation == train
    assert not skipped


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        ('en\tde\na film\t \n', "pairs.tsv:2: 'de' is empty, expected some text"),
        ('en\tde\n\tein Film\n', "pairs.tsv:2: 'en' is empty, expected some text"),
        ('en\tde\n', 'pairs.tsv: no examples'),
        ('en\tdu\na\tb\n', "pairs.tsv:1: column 'de' is not among"),
    ],
)
def test_pairs_with_an_empty_side_and_files_without_pairs_are_refused(
    tmp_path: Path, contents: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_file(tmp_path, '.tsv', contents)
    assert message in str(caught.value)


def test_pairs_with_an_empty_side_are_skipped_and_counted_if_asked_for(tmp_path: Path) -> None:
    contents = 'en\tde\na film\t \na dog\tein Hund\n\tein Film\n'
    train, _, skipped = read_file(tmp_path, '.tsv', contents, bad_rows='skip')
    assert train == [('a dog', 'ein Hund')]
    assert len(skipped) == 4  # two in each split


def test_vocabularies_hold_the_words_of_the_training_pairs_alone(tmp_path: Path) -> None:
    for name, pair in (('train', 'a b\tc d'), ('dev', 'a x\tc y')):
        (tmp_path / f'{name}.tsv').write_text(f'source\ttarget\n{pair}\n{pair}\n')
    options: dict[str, Any] = {name: str(tmp_path / f'{name}.tsv') for name in ('train', 'dev')}
    options['evaluation'] = options.pop('dev')
    data = DataConfig(source='files', min_frequency=1, tokenizer='words', **options)
    facts = make_task(Config(data=data, model=ModelConfig())).resume_facts
    assert facts['source_vocabulary'] == ['a', 'b']
    assert facts['target_vocabulary'] == ['c', 'd']


def test_long_texts_are_cut_in_prediction_as_in_training_and_noted() -> None:
    data = DataConfig(too_long='cut', min_frequency=2, bucket_lengths=(5,), tokenizer='words')
    facts = {'source_vocabulary': ['a', 'b'], 'target_vocabulary': ['c']}
    predictor = make_predictor(Config(data=data, model=ModelConfig()), facts)
    rows = predictor.encode(['a b x b a b'])
    assert rows['source_lengths'].tolist() == [5]
    assert predictor.notes('a b x b a b') == {'unknown': pytest.approx(1 / 6), 'cut': True}
    assert predictor.notes('a b x b') == {'unknown': 0.25, 'cut': False}
    data.too_long = 'error'
    with pytest.raises(UserError, match='needs a width of 7, expected at most 5'):
        predictor.encode(['a b x b a b'])


@pytest.mark.parametrize('unit', ['word', 'character'])
def test_records_from_before_the_tokenizer_say_what_a_unit_is(unit: str) -> None:
    config = Config(data=DataConfig(tokenizer=f'{unit}s'), model=ModelConfig())
    record = schema.to_dict(config) | {'data.unit': unit}
    del record['data.tokenizer'], record['data.vocab_size']
    assert not schema.trajectory_changes(config, record)
    fresh = schema.fill(Config(data=DataConfig(), model=ModelConfig()), record)
    assert fresh.data == config.data


def test_two_text_features_are_read_as_pairs(tmp_path: Path) -> None:
    Reviews(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    train, evaluation, _ = read_tfds(tmp_path)
    assert train == [('good', 'film'), ('bad', 'film'), ('fine é', 'play')]
    assert evaluation == [('poor', 'play')]
    with pytest.raises(UserError, match="feature 'label' is ClassLabel, expected Text"):
        read_tfds(tmp_path, target_feature='label')


def test_pair_with_an_empty_side_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_rows(tmp_path, monkeypatch, 'bad', ' ', 0)
    with pytest.raises(UserError, match=r"example \d: 'hypothesis' is empty"):
        read_tfds(tmp_path)
