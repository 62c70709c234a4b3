"""Texts and labels from TensorFlow Datasets (TFDS), without TensorFlow.

Only the ArrayRecord file format can be read that way; data sets are prepared in it on first use.
TFDS is imported when it is used, because it loads slowly and other sources do not need it.
"""

import contextlib
import difflib
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errors import UserError
from input_pipeline.examples import Rows, not_among

_FORMAT = 'array_record'
_PROBE_SECONDS = 4.0
_PORTS = {'https': 443, 'http': 80, 'ftp': 21}


def read(name: str, split: str, texts: Sequence[str], label: str = '', data_dir: str = '') -> Rows:
    """Reads a split whole, after downloading and preparing the data set where that is due.

    `split` may be a slice, such as 'train[:90%]'; `texts` are features of type Text, `label` one of
    type ClassLabel, whose names become the classes. Raises UserError where there is no such data
    set, split or feature, or the data cannot be prepared or read.
    """
    builder = _builder(name, data_dir)
    _prepare(builder)
    for feature in texts:
        _require_feature(builder, feature, 'Text')
    classes: tuple[str, ...] = ()
    if label:
        _require_feature(builder, label, 'ClassLabel')
        classes = tuple(builder.info.features[label].names)
    place = f'TFDS data set {builder.info.full_name!r}, {split!r}'
    found, labels, unlabelled = [], [], 0
    for position, features in enumerate(_examples(builder, place, split)):
        found.append(_texts(f'{place}: example {position}', features, texts))
        if label:
            number = (*features[label].int64_list.value, -1)[0]
            unlabelled += not 0 <= number < len(classes)
            labels.append(classes[number])
    if unlabelled:
        raise UserError(
            f'{place}: {unlabelled} of {len(found)} examples have no label, expected a split with '
            'labels (test splits often come without)'
        )
    return Rows(found, labels, classes, lambda position: f'{place}: example {position}')


def _builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # TFDS itself imports it only if TensorFlow is installed

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir and not root.is_dir():
        raise UserError(f'{data_dir}: no such folder here, expected one of prepared TFDS data sets')
    try:
        return tfds.builder(name, data_dir=root)
    except Exception as error:  # TFDS's errors share no base class
        unversioned = name.partition(':')[0]
        base = unversioned.partition('/')[0]
        known = set(tfds.list_builders(with_community_datasets=False))
        with contextlib.suppress(Exception):
            known.update(f'{base}/{config}' for config in tfds.builder_cls(base).builder_configs)
        with contextlib.suppress(OSError):
            known.update(folder.name for folder in root.iterdir())
        reason = _first_line(error).rpartition('": ')[2]  # without TFDS's prefix of all arguments
        if unversioned not in known:
            sought = unversioned if base in known else base
            nearest = difflib.get_close_matches(sought, sorted(known))
            reason = f'no such name; the nearest are {nearest}' if nearest else 'no such name'
        raise UserError(f'TFDS data set {name!r}: {reason}') from error


def _prepare(builder: Any) -> None:
    name, folder = builder.info.full_name, builder.data_dir
    if not Path(folder).exists():
        _require_network(builder)
        try:
            builder.download_and_prepare(file_format=_FORMAT)
        except Exception as error:  # the data set's own code can raise anything
            raise UserError(f'{folder}: TFDS cannot prepare it: {_first_line(error)}') from error
    if not builder.info.splits:
        raise UserError(f'{folder}: {name!r} is prepared only in part; delete this folder')
    formats = sorted(found.value for found in builder.info.available_file_formats())
    if _FORMAT not in formats:
        raise UserError(
            f'{folder}: {name!r} is prepared as {", ".join(formats)}, which only TensorFlow can '
            f"read; prepare it with file_format='{_FORMAT}' in another data_dir"
        )


def _require_network(builder: Any) -> None:
    """Fails within seconds without a network, where TFDS would retry its downloads for minutes."""
    urls = [urlsplit(url) for url in builder.url_infos or ()]
    ports = {url.hostname: url.port or _PORTS[url.scheme] for url in urls if url.scheme in _PORTS}
    hosts = list(ports.items())[:2]
    if not hosts or urllib.request.getproxies().keys() & {*_PORTS, 'all'}:
        return  # nothing known to download, or only the proxy has to be reachable
    reached: list[tuple[str, int]] = []

    def connect() -> None:
        for host in hosts:
            with contextlib.suppress(OSError):
                socket.create_connection(host, _PROBE_SECONDS).close()
                reached.append(host)

    # In a thread, because looking up the name of a host has no time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(len(hosts) * _PROBE_SECONDS)
    if reached:
        return
    raise UserError(
        f'TFDS data set {builder.info.full_name!r} is not prepared in {builder.data_dir} and '
        f'cannot be downloaded: no connection to {" or ".join(host for host, _ in hosts)}; prepare '
        'it where there is one, copy the folder, and set TFDS_DATA_DIR or --config.data.data_dir'
    )


def _require_feature(builder: Any, name: str, kind: str) -> None:
    where, features = f'TFDS data set {builder.info.full_name!r}', builder.info.features
    if name not in features:
        raise UserError(f'{where}: feature {not_among(name, sorted(features))}')
    if (found := type(features[name]).__name__) != kind:
        raise UserError(f'{where}: feature {name!r} is {found}, expected {kind}')


def _examples(builder: Any, place: str, split: str) -> Iterator[Any]:
    # Parsed here, as TFDS's own decoding of whole examples takes more than ten times as long.
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    for record in _records(builder, place, split):
        yield Example.FromString(record).features.feature


def _texts(where: str, features: Any, names: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(features[name].bytes_list.value[0].decode().strip() for name in names)
    except (IndexError, UnicodeDecodeError) as error:
        raise UserError(f'{where}: {_first_line(error)}') from error


def _records(builder: Any, where: str, split: str) -> Sequence[bytes]:
    from tensorflow_datasets.core.decode import DeserializeMethod

    try:
        if not builder.info.splits[split].num_examples:
            raise UserError(f'{where}: no examples')
        source = builder.as_data_source(
            split, file_format=_FORMAT, deserialize_method=DeserializeMethod.RAW_BYTES
        )
        records: Sequence[bytes] = source.__getitems__(range(len(source)))
    except (ValueError, RuntimeError) as error:  # no such split; a damaged or missing file
        raise UserError(f'{where}: {_first_line(error)}') from error
    return records


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
