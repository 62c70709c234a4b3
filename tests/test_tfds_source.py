"""The promises of input_pipeline/tfds_source.py."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import pytest
import tensorflow_datasets as tfds

from errors import UserError
from input_pipeline.examples import SEPARATOR, TextDataset
from input_pipeline.tfds_source import read_tfds, read_tfds_pairs

ROWS = {
    'train': [('good', 'film', 1), (' bad ', 'film', 0), ('fine é', 'play', 1)],
    'validation': [('poor', 'play', 0)],
}


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A data set that, by being defined, TFDS knows by name in this process: 'reviews'."""

    VERSION = tfds.core.Version('1.0.0')
    rows: ClassVar[Mapping[str, Sequence[tuple[Any, Any, int]]]] = ROWS

    def _info(self) -> Any:
        features = {
            'premise': tfds.features.Text(),
            'hypothesis': tfds.features.Text(),
            'label': tfds.features.ClassLabel(names=['no', 'yes']),
            'score': np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.rows}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (premise, hypothesis, label) in enumerate(self.rows[split]):
            yield (
                key,
                {'premise': premise, 'hypothesis': hypothesis, 'label': label, 'score': 1.0},
            )


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of prepared data sets, holding `reviews`."""
    Reviews(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    return tmp_path


def read(data_dir: Path, **changes: Any) -> TextDataset:
    """Reads both splits of `reviews`, but for `changes` of the arguments."""
    arguments = {
        'name': 'reviews',
        'train_split': 'train',
        'eval_split': 'validation',
        'text_features': ['premise', 'hypothesis'],
        'label_feature': 'label',
        'data_dir': str(data_dir),
    }
    return read_tfds(**{**arguments, **changes})


def refusal(data_dir: Path, **changes: Any) -> str:
    """Returns the one line of error that reading raises."""
    with pytest.raises(UserError) as caught:
        read(data_dir, **changes)
    (message,) = str(caught.value).splitlines()
    return message


def prepare_rows(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, premise: Any, hypothesis: Any, label: int
) -> None:
    """Prepares `reviews` with one more training example."""
    rows = {**ROWS, 'train': [*ROWS['train'], (premise, hypothesis, label)]}
    monkeypatch.setattr(Reviews, 'rows', rows)
    Reviews(data_dir=data_dir).download_and_prepare(file_format='array_record')


def shard(data_dir: Path) -> Path:
    """Returns the file that holds the training split of `reviews`."""
    (path,) = data_dir.glob('reviews/1.0.0/reviews-train.array_record*')
    return path


def test_prepared_data_set_is_read_whole(prepared: Path) -> None:
    dataset = read(prepared)
    assert dataset.label_names == ('no', 'yes')
    splits = (dataset.train, dataset.evaluation)
    for split, rows in zip(splits, ROWS.values(), strict=True):
        assert split.labels.dtype == np.int32
        expected = {(f'{a.strip()} {SEPARATOR} {b}', label) for a, b, label in rows}
        assert set(zip(split.texts, split.labels.tolist(), strict=True)) == expected


def test_text_features_are_joined_in_the_order_asked_for(prepared: Path) -> None:
    texts = read(prepared, text_features=['hypothesis', 'premise']).evaluation.texts
    assert texts == [f'play {SEPARATOR} poor']


def test_splits_may_be_slices(prepared: Path) -> None:
    dataset = read(prepared, train_split='train[:2]', eval_split='train[2:]')
    assert len(dataset.train.texts) == 2
    assert len(dataset.evaluation.texts) == 1


def test_data_set_is_prepared_on_first_use_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(tmp_path)
    monkeypatch.delattr(tfds.core.DatasetBuilder, 'download_and_prepare')
    assert read(tmp_path).train.texts == first.train.texts


def test_files_alone_are_read_without_tensorflow(prepared: Path) -> None:
    program = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == 'tensorflow' else find(name, *rest)
from input_pipeline.tfds_source import UserError, read_tfds
assert 'tensorflow_datasets' not in sys.modules  # Slow to import, and not always needed.
arguments = 'train', 'validation', ['premise'], 'label', sys.argv[1]
assert len(read_tfds('reviews', *arguments).train.texts) == 3
assert 'tensorflow' not in sys.modules
try:
    read_tfds('revews', *arguments)
except UserError as error:
    assert "the nearest are ['reviews'" in str(error)
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, '-W', 'error', '-c', program, str(prepared)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_older_data_sets_of_tfds_are_known_by_name(tmp_path: Path) -> None:
    (tmp_path / 'glue' / 'sst2' / '2.0.0').mkdir(parents=True)
    assert 'is prepared only in part' in refusal(tmp_path, name='glue/sst2')


@pytest.mark.parametrize(
    ('name', 'nearest'),
    [('revews', 'reviews'), ('glu', 'glue'), ('glue/sst3', 'glue/sst2'), ('glu/sst2', 'glue')],
)
def test_unknown_data_set_names_the_nearest(prepared: Path, name: str, nearest: str) -> None:
    message = refusal(prepared, name=name)
    assert message.startswith(f"TFDS data set '{name}': no such name; the nearest are ['{nearest}'")


@pytest.mark.parametrize('name', ['', 'two words', 'a\nb', 'namespace:name', 'glue/x=1'])
def test_malformed_name_is_refused_in_one_line(prepared: Path, name: str) -> None:
    assert refusal(prepared, name=name).startswith(f'TFDS data set {name!r}: no such name')


def test_unknown_version_names_the_known_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path, name='glue/sst2:9.9.9')
    assert message.startswith("TFDS data set 'glue/sst2:9.9.9': Dataset glue cannot be loaded at")
    assert '2.0.0' in message


@pytest.mark.parametrize('argument', ['train_split', 'eval_split'])
def test_unknown_split_lists_the_splits(prepared: Path, argument: str) -> None:
    message = refusal(prepared, **{argument: 'valid'})
    assert "Unknown split 'valid'" in message
    assert "['train', 'validation']" in message


@pytest.mark.parametrize('split', ['', 'train[', 'train[:200%]'])
def test_malformed_slice_names_the_split(prepared: Path, split: str) -> None:
    assert refusal(prepared, train_split=split).startswith(
        f"TFDS data set 'reviews/1.0.0', '{split}': "
    )


def test_slice_without_examples_says_so(prepared: Path) -> None:
    assert refusal(prepared, train_split='train[2:2]').endswith("'train[2:2]': no examples")


def test_unknown_feature_lists_the_features(prepared: Path) -> None:
    known = "is not among ['hypothesis', 'label', 'premise', 'score']; did you mean"
    assert f"'premis' {known} 'premise'?" in refusal(prepared, text_features=['premis'])
    assert f"'labels' {known} 'label'?" in refusal(prepared, label_feature='labels')


def test_feature_of_another_type_names_both_types(prepared: Path) -> None:
    assert "'score' is Tensor, expected Text" in refusal(prepared, text_features=['score'])
    assert "'premise' is Text, expected ClassLabel" in refusal(prepared, label_feature='premise')


def test_unlabelled_examples_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_rows(tmp_path, monkeypatch, 'a', 'b', -1)
    assert "'train': 1 of 4 examples have no label" in refusal(tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_rows(tmp_path, monkeypatch, b'\xff', 'b', 1)
    assert "'utf-8' codec can't decode byte 0xff" in refusal(tmp_path)


def test_only_an_example_without_any_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_rows(tmp_path, monkeypatch, 'a', '', 1)
    assert f'a {SEPARATOR} ' in read(tmp_path).train.texts
    assert 'has no text' in refusal(tmp_path, text_features=['hypothesis'])


def test_data_set_prepared_as_tfrecord_says_how_to_prepare_it(prepared: Path) -> None:
    info = prepared / 'reviews' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    message = refusal(prepared)
    assert 'is prepared as tfrecord' in message
    assert "prepare it with file_format='array_record' in another data_dir" in message


@pytest.mark.parametrize('size', [0, 1000, 65536])
def test_damaged_file_is_refused(prepared: Path, size: int) -> None:
    path = shard(prepared)
    contents = path.read_bytes()
    path.write_bytes((contents * 2)[:size])
    assert refusal(prepared).startswith("TFDS data set 'reviews/1.0.0', 'train': ")


def test_missing_file_is_refused_by_name(prepared: Path) -> None:
    path = shard(prepared)
    path.unlink()
    assert str(path) in refusal(prepared)


def test_unreadable_metadata_is_refused(prepared: Path) -> None:
    (prepared / 'reviews' / '1.0.0' / 'dataset_info.json').write_text('{')
    assert refusal(prepared).startswith("TFDS data set 'reviews': Failed to load JSON")


def test_absent_data_dir_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / 'absent')
    assert message.startswith(f'{tmp_path / "absent"}: no such folder')


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('urllib.request.getproxies', dict)


@pytest.mark.usefixtures('no_proxy')
@pytest.mark.parametrize('answer', ['refuses', 'hangs'])
def test_unreachable_download_fails_within_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    end = threading.Event()

    def connect(*_: object) -> NoReturn:
        if answer == 'hangs':
            end.wait(60)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, 'create_connection', connect)
    before, start = set(threading.enumerate()), time.monotonic()
    message = refusal(tmp_path, name='glue/sst2')
    seconds = time.monotonic() - start
    left = set(threading.enumerate()) - before
    assert all(thread.daemon for thread in left), 'these would keep the process from ending'
    end.set()
    assert seconds < 10
    for part in ('glue/sst2', 'dl.fbaipublicfiles.com', 'TFDS_DATA_DIR', '--config.data.data_dir'):
        assert part in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every download, each of which fails."""
    calls: list[dict[str, Any]] = []

    def fail(builder: Any, **arguments: Any) -> NoReturn:
        del builder
        calls.append(arguments)
        raise ConnectionError('refused\nand more')

    monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', fail)
    return calls


@pytest.mark.usefixtures('no_proxy')
def test_reachable_download_is_prepared_as_array_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(socket, 'create_connection', lambda *_: socket.socket())
    message = refusal(tmp_path, name='glue/sst2')
    assert message == f'{tmp_path}/glue/sst2/2.0.0: TFDS cannot prepare it: refused'
    assert download == [{'file_format': 'array_record'}]


@pytest.mark.usefixtures('download')
def test_proxy_leaves_reachability_to_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HTTPS_PROXY', 'http://localhost:1')
    monkeypatch.delattr(socket, 'create_connection')
    assert 'TFDS cannot prepare it' in refusal(tmp_path, name='glue/sst2')


@pytest.mark.skipif(
    not Path(os.environ.get('TFDS_DATA_DIR', '?'), 'glue', 'sst2').is_dir(),
    reason='needs glue/sst2 prepared in $TFDS_DATA_DIR',
)
def test_sst2_is_read_from_the_default_folder() -> None:
    dataset = read_tfds('glue/sst2', 'train', 'validation', ['sentence'], 'label')
    assert dataset.label_names == ('negative', 'positive')
    assert [len(split.texts) for split in (dataset.train, dataset.evaluation)] == [67_349, 872]
    assert np.bincount(dataset.train.labels).tolist() == [29_780, 37_569]


# seq2seq: from here to the end (docs/fork.md)


def test_two_text_features_are_read_as_pairs(prepared: Path) -> None:
    pairs = read_tfds_pairs(
        'reviews', 'train', 'validation', 'premise', 'hypothesis', str(prepared)
    )
    assert pairs.train.sources == ['good', 'bad', 'fine é']
    assert pairs.train.targets == ['film', 'film', 'play']
    assert pairs.evaluation == (['poor'], ['play'])
    with pytest.raises(UserError, match="feature 'label' is ClassLabel, expected Text"):
        read_tfds_pairs('reviews', 'train', 'validation', 'premise', 'label', str(prepared))


def test_pair_with_an_empty_side_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_rows(tmp_path, monkeypatch, 'bad', ' ', 0)
    with pytest.raises(UserError, match=r"example \d: feature 'hypothesis' is empty"):
        read_tfds_pairs('reviews', 'train', 'train', 'premise', 'hypothesis', str(tmp_path))
