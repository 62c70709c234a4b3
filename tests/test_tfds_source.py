"""The promises of input_pipeline/tfds_source.py."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import tensorflow_datasets as tfds

from errors import UserError
from input_pipeline import tfds_source
from tasks.classification import SEPARATOR, DataConfig, LabelledSplit, read_texts
from tests.tfds_reviews import ROWS, Reviews, prepare_rows


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of prepared data sets, holding `reviews`."""
    Reviews(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    return tmp_path


class TextDataset(NamedTuple):
    """What a run reads: texts and label indices of two splits, and the labels' names."""

    train: LabelledSplit
    evaluation: LabelledSplit
    label_names: tuple[str, ...]


def read(data_dir: Path, **changes: Any) -> TextDataset:
    """Reads both splits of `reviews` as a run does, but for `changes` of the config."""
    options = {
        'source': 'tfds',
        'name': 'reviews',
        'text_features': ('premise', 'hypothesis'),
        'data_dir': str(data_dir),
    }
    return TextDataset(*read_texts(DataConfig(**{**options, **changes})))


def refusal(data_dir: Path, **changes: Any) -> str:
    """Returns the one line of error that reading raises."""
    with pytest.raises(UserError) as caught:
        read(data_dir, **changes)
    (message,) = str(caught.value).splitlines()
    return message


def shard(data_dir: Path) -> Path:
    """Returns the file that holds the training split of `reviews`."""
    (path,) = data_dir.glob('reviews/1.0.0/reviews-train.array_record*')
    return path


def test_prepared_data_set_is_read_whole(prepared: Path) -> None:
    dataset = read(prepared)
    assert dataset.label_names == ('no', 'yes')
    splits = (dataset.train, dataset.evaluation)
    for (texts, labels, *_), rows in zip(splits, ROWS.values(), strict=True):
        assert labels.dtype == np.int32
        expected = {(f'{a.strip()}{SEPARATOR}{b}', label) for a, b, label in rows}
        assert set(zip(texts, labels.tolist(), strict=True)) == expected


def test_text_features_are_joined_in_the_order_asked_for(prepared: Path) -> None:
    texts = read(prepared, text_features=('hypothesis', 'premise')).evaluation[0]
    assert texts == [f'play{SEPARATOR}poor']


def test_splits_may_be_slices(prepared: Path) -> None:
    dataset = read(prepared, train='train[:2]', evaluation='train[2:]')
    assert len(dataset.train[0]) == 2
    assert len(dataset.evaluation[0]) == 1


def test_data_set_is_prepared_on_first_use_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(tmp_path)
    monkeypatch.delattr(tfds.core.DatasetBuilder, 'download_and_prepare')
    assert read(tmp_path).train[0] == first.train[0]


def test_files_alone_are_read_without_tensorflow(prepared: Path) -> None:
    program = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == 'tensorflow' else find(name, *rest)
from input_pipeline.tfds_source import DataConfig, Features, UserError, read
assert 'tensorflow_datasets' not in sys.modules  # Slow to import, and not always needed.
arguments = 'train', Features(['premise'], 'label')
assert len(read(DataConfig(name='reviews', data_dir=sys.argv[1]), *arguments).texts) == 3
assert 'tensorflow' not in sys.modules
try:
    read(DataConfig(name='revews', data_dir=sys.argv[1]), *arguments)
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


@pytest.mark.parametrize('argument', ['train', 'evaluation'])
def test_unknown_split_lists_the_splits(prepared: Path, argument: str) -> None:
    message = refusal(prepared, **{argument: 'valid'})
    assert "Unknown split 'valid'" in message
    assert "['train', 'validation']" in message


@pytest.mark.parametrize('split', ['', 'train[', 'train[:200%]'])
def test_malformed_slice_names_the_split(prepared: Path, split: str) -> None:
    assert refusal(prepared, train=split).startswith(f"TFDS data set 'reviews/1.0.0', '{split}': ")


def test_slice_without_examples_says_so(prepared: Path) -> None:
    assert refusal(prepared, train='train[2:2]').endswith("'train[2:2]': no examples")


def test_unknown_feature_lists_the_features(prepared: Path) -> None:
    known = "is not among ['hypothesis', 'label', 'premise', 'score']; did you mean"
    assert f"'premis' {known} 'premise'?" in refusal(prepared, text_features=('premis',))
    assert f"'labels' {known} 'label'?" in refusal(prepared, label_feature='labels')


def test_feature_of_another_type_names_both_types(prepared: Path) -> None:
    assert "'score' is Tensor, expected Text" in refusal(prepared, text_features=('score',))
    assert "'premise' is Text, expected ClassLabel" in refusal(prepared, label_feature='premise')


def test_unlabelled_examples_are_refused_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_rows(tmp_path, monkeypatch, 'a', 'b', -1)
    assert "'label' is '', which marks a missing label" in refusal(tmp_path)
    train, *_ = read(tmp_path, bad_rows='skip')
    assert len(train.texts) == 3
    assert len(train.skipped) == 1


def test_text_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_rows(tmp_path, monkeypatch, b'\xff', 'b', 1)
    assert "'utf-8' codec can't decode byte 0xff" in refusal(tmp_path)


def test_only_an_example_without_any_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_rows(tmp_path, monkeypatch, 'a', '', 1)
    assert f'a{SEPARATOR}' in read(tmp_path).train[0]
    assert 'expected some text' in refusal(tmp_path, text_features=('hypothesis',))


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

    assert tfds_source._PROBE_SECONDS <= 5
    monkeypatch.setattr(tfds_source, '_PROBE_SECONDS', 0.5)
    monkeypatch.setattr(socket, 'create_connection', connect)
    before, start = set(threading.enumerate()), time.monotonic()
    message = refusal(tmp_path, name='glue/sst2')
    seconds = time.monotonic() - start
    left = set(threading.enumerate()) - before
    assert all(thread.daemon for thread in left), 'these would keep the process from ending'
    end.set()
    assert 0.5 <= seconds < 5.5  # five more than the limit
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
    data = DataConfig(source='tfds', name='glue/sst2', text_features=('sentence',))
    (texts, labels, *_), (eval_texts, *_), label_names = read_texts(data)
    assert label_names == ('negative', 'positive')
    assert [len(texts), len(eval_texts)] == [67_349, 872]
    assert np.bincount(labels).tolist() == [29_780, 37_569]
