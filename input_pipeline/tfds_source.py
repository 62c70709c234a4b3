"""Labelled texts, and pairs of texts, from TensorFlow Datasets (TFDS), without TensorFlow.

Only the ArrayRecord file format can be read that way; data sets are prepared in it on first use.
TFDS is imported where it is needed: it loads slowly, and other sources do without it.
"""

import contextlib
import difflib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from configs.schema import BadInput
from input_pipeline.examples import (
    PairDataset,
    PairSplit,
    TextDataset,
    TextSplit,
    join_features,
    not_among,
)

_FORMAT = 'array_record'
_PROBE_SECONDS = 5.0
_PORTS = {'https': 443, 'http': 80, 'ftp': 21}


def read_tfds(
    name: str,
    train_split: str,
    eval_split: str,
    text_features: Sequence[str],
    label_feature: str,
    data_dir: str = '',
) -> TextDataset:
    """Reads both splits whole, after downloading and preparing the data set where that is due.

    Args:
        name: a data set that TFDS knows, such as 'glue/sst2', or one prepared in `data_dir`.
        train_split: a split, or a slice of one such as 'train[:90%]'; `eval_split` likewise.
        text_features: features of type Text; of several, an example may lack some, but not all.
        label_feature: a feature of type ClassLabel; the label names are its own.
        data_dir: existing local folder of prepared data sets; '' for TFDS's own default, which
            is $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
        BadInput: no such data set, split or feature, or the data cannot be prepared or read; the
            message is one line.
    """
    builder = _builder(name, data_dir)
    _prepare(builder)
    for feature in text_features:
        _require_feature(builder, feature, 'Text')
    _require_feature(builder, label_feature, 'ClassLabel')
    train, evaluation = (
        _read_split(builder, split, text_features, label_feature)
        for split in (train_split, eval_split)
    )
    return TextDataset(train, evaluation, tuple(builder.info.features[label_feature].names))


def _builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # Which TFDS itself only gets to where TensorFlow is there.

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir and not root.is_dir():
        raise BadInput(f'{data_dir}: no such folder here, expected one of prepared TFDS data sets')
    try:
        return tfds.builder(name, data_dir=root)
    except Exception as error:  # TFDS has no common base, and raises AssertionError among others.
        unversioned = name.partition(':')[0]
        base = unversioned.partition('/')[0]
        known = set(tfds.list_builders(with_community_datasets=False))
        with contextlib.suppress(Exception):
            known.update(f'{base}/{config}' for config in tfds.builder_cls(base).builder_configs)
        with contextlib.suppress(OSError):
            known.update(folder.name for folder in root.iterdir())
        reason = _first_line(error).rpartition('": ')[2]  # Less TFDS's prefix of all arguments.
        if unversioned not in known:
            sought = unversioned if base in known else base
            nearest = difflib.get_close_matches(sought, sorted(known))
            reason = f'no such name; the nearest are {nearest}' if nearest else 'no such name'
        raise BadInput(f'TFDS data set {name!r}: {reason}') from error


def _prepare(builder: Any) -> None:
    name, folder = builder.info.full_name, builder.data_dir
    if not Path(folder).exists():
        _require_network(builder)
        try:
            builder.download_and_prepare(file_format=_FORMAT)
        except Exception as error:  # Whatever the data set's own code and its downloads raise.
            raise BadInput(f'{folder}: TFDS cannot prepare it: {_first_line(error)}') from error
    if not builder.info.splits:
        raise BadInput(f'{folder}: {name!r} is prepared only in part; delete this folder')
    formats = sorted(found.value for found in builder.info.available_file_formats())
    if _FORMAT not in formats:
        raise BadInput(
            f'{folder}: {name!r} is prepared as {", ".join(formats)}, which only TensorFlow can '
            f"read; prepare it with file_format='{_FORMAT}' in another data_dir"
        )


def _require_network(builder: Any) -> None:
    """Fails within seconds where TFDS, which retries its downloads, would take minutes."""
    urls = [urlsplit(url) for url in builder.url_infos or ()]
    ports = {url.hostname: url.port or _PORTS[url.scheme] for url in urls if url.scheme in _PORTS}
    hosts = list(ports.items())[:4]
    if not hosts or urllib.request.getproxies().keys() & {*_PORTS, 'all'}:
        return  # Nothing known to download, or nothing that need be reachable but for the proxy.
    reached: list[str] = []

    def connect(host: str, port: int) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), _PROBE_SECONDS).close()
            reached.append(host)

    # In threads that may be left behind, as looking up a host's name has no time limit.
    threads = [threading.Thread(target=connect, args=host, daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _PROBE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if not reached:
        tried = ' or '.join(host for host, _ in hosts)
        raise BadInput(
            f'TFDS data set {builder.info.full_name!r} is not prepared in {builder.data_dir} and '
            f'cannot be downloaded: no connection to {tried}; prepare it where there is '
            'one, copy the folder, and set TFDS_DATA_DIR or --config.data.data_dir to the copy'
        )


def _require_feature(builder: Any, name: str, kind: str) -> None:
    where, features = f'TFDS data set {builder.info.full_name!r}', builder.info.features
    if name not in features:
        raise BadInput(f'{where}: feature {not_among(name, sorted(features))}')
    if (found := type(features[name]).__name__) != kind:
        raise BadInput(f'{where}: feature {name!r} is {found}, expected {kind}')


def _read_split(
    builder: Any, split: str, text_features: Sequence[str], label_feature: str
) -> TextSplit:
    texts: list[str] = []
    labels: list[int] = []
    for where, features in _examples(builder, split):
        parts = _texts(where, features, text_features)
        if not any(parts):
            raise BadInput(f'{where} has no text')
        texts.append(join_features(parts))
        label = features[label_feature].int64_list.value
        labels.append(label[0] if label else -1)
    classes = builder.info.features[label_feature].num_classes
    if unlabelled := sum(not 0 <= label < classes for label in labels):
        raise BadInput(
            f'{_place(builder, split)}: {unlabelled} of {len(labels)} examples have no label, '
            'expected a split with labels (test splits often come without)'
        )
    return TextSplit(texts, np.array(labels, np.int32))


def _examples(builder: Any, split: str) -> Iterator[tuple[str, Any]]:
    """Where each example stands, and its features by name."""
    # Parsed here, as TFDS's own decoding of whole examples takes more than ten times as long.
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    place = _place(builder, split)
    for position, record in enumerate(_records(builder, place, split)):
        yield f'{place}: example {position}', Example.FromString(record).features.feature


def _texts(where: str, features: Any, names: Sequence[str]) -> list[str]:
    try:
        return [features[name].bytes_list.value[0].decode().strip() for name in names]
    except (IndexError, UnicodeDecodeError) as error:
        raise BadInput(f'{where}: {_first_line(error)}') from error


def _place(builder: Any, split: str) -> str:
    return f'TFDS data set {builder.info.full_name!r}, {split!r}'


def _records(builder: Any, where: str, split: str) -> Sequence[bytes]:
    from tensorflow_datasets.core.decode import DeserializeMethod

    try:
        if not builder.info.splits[split].num_examples:
            raise BadInput(f'{where}: no examples')
        source = builder.as_data_source(
            split, file_format=_FORMAT, deserialize_method=DeserializeMethod.RAW_BYTES
        )
        records: Sequence[bytes] = source.__getitems__(range(len(source)))
    except (ValueError, RuntimeError) as error:  # No such split; a file damaged or missing.
        raise BadInput(f'{where}: {_first_line(error)}') from error
    return records


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


# seq2seq: from here to the end (docs/fork.md)


def read_tfds_pairs(
    name: str,
    train_split: str,
    eval_split: str,
    source_feature: str,
    target_feature: str,
    data_dir: str = '',
) -> PairDataset:
    """Reads both splits whole, as `read_tfds` does; both features are of type Text, none empty."""
    names = (source_feature, target_feature)
    builder = _builder(name, data_dir)
    _prepare(builder)
    for feature in names:
        _require_feature(builder, feature, 'Text')

    def pairs(split: str) -> Iterator[tuple[str, str]]:
        for where, features in _examples(builder, split):
            source, target = _texts(where, features, names)
            if not source or not target:
                empty = names[1] if source else names[0]
                raise BadInput(f'{where}: feature {empty!r} is empty, expected some text')
            yield source, target

    return PairDataset(PairSplit.of(pairs(train_split)), PairSplit.of(pairs(eval_split)))
