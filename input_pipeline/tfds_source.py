"""Reads texts and labels from TensorFlow Datasets (TFDS), without TensorFlow.

Only the ArrayRecord file format can be read that way; data sets are prepared in it on first use.
TFDS is imported when used: it takes seconds to load, and other sources do not need it.
"""

import contextlib
import difflib
import socket
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.schema import DataConfig
from errors import UserError, first_line
from input_pipeline.examples import Features, Rows, not_among
from input_pipeline.text_files import cell_labels

_FORMAT = 'array_record'
_PROBE_SECONDS = 5.0
_PORTS = {'https': 443, 'http': 80, 'ftp': 21}


def read(data: DataConfig, split: str, features: Features) -> Rows:
    """Reads a whole split, after downloading and preparing the data set if necessary.

    `split` may be a slice, such as 'train[:90%]'; `texts` are features of type Text, `label` one of
    type ClassLabel, whose names become the classes; '' is a missing label. With a `separator`,
    `label` is a Text with any number of labels. Raises UserError if there is no such data set,
    split or feature, or if the data cannot be prepared or read.
    """
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    texts, label, separator = features[:3]
    info = (builder := _prepared(data.name, data.data_dir)).info
    kinds = dict.fromkeys(texts, 'Text') | {label: 'Text' if separator else 'ClassLabel'}
    for feature, kind in kinds.items():
        where = f'TFDS data set {info.full_name!r}: feature'
        if feature and feature not in info.features:
            raise UserError(f'{where} {not_among(feature, sorted(info.features))}')
        if feature and (found := type(info.features[feature]).__name__) != kind:
            raise UserError(f'{where} {feature!r} is {found}, expected {kind}')
    classes = () if separator or not label else tuple(info.features[label].names)
    read_as_text = [*texts, label] if separator else texts
    place = f'TFDS data set {info.full_name!r}, {split!r}'
    rows: list[tuple[str, ...]] = []
    labels: list[list[str]] = []
    for record in _records(builder, place, split):
        # TFDS's own decoding of whole examples is more than ten times slower.
        example = Example.FromString(record).features.feature
        try:
            values = [example[name].bytes_list.value[0].decode().strip() for name in read_as_text]
        except (IndexError, UnicodeDecodeError) as error:
            raise UserError(f'{place}: example {len(rows)}: {first_line(error)}') from error
        rows.append(tuple(values[: len(texts)]))
        if separator:
            where = f'{place}: example {len(labels)}'
            labels.append(cell_labels(where, label, values[-1], separator))
        elif label:
            number = (*example[label].int64_list.value, -1)[0]
            labels.append([classes[number] if 0 <= number < len(classes) else ''])
    return Rows(rows, labels, classes, lambda row: f'{place}: example {row}')


def _prepared(name: str, data_dir: str) -> Any:
    """Returns the builder of a data set that can be read, after preparing it if necessary."""
    builder = _builder(name, data_dir)
    name, folder = builder.info.full_name, builder.data_dir
    if not Path(folder).exists():
        _require_network(builder)
        try:
            builder.download_and_prepare(file_format=_FORMAT)
        except Exception as error:  # anything that the data set's own code and downloads raise
            raise UserError(f'{folder}: TFDS cannot prepare it: {first_line(error)}') from error
    if not builder.info.splits:
        raise UserError(f'{folder}: {name!r} is prepared only in part; delete this folder')
    formats = sorted(found.value for found in builder.info.available_file_formats())
    if _FORMAT not in formats:
        raise UserError(
            f'{folder}: {name!r} is prepared as {", ".join(formats)}, which only TensorFlow can '
            f"read; prepare it with file_format='{_FORMAT}' in another data_dir"
        )
    return builder


def _builder(name: str, data_dir: str) -> Any:
    """Finds a data set by name. Raises UserError that suggests the nearest names."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # TFDS itself imports it only where TensorFlow is installed

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir and not root.is_dir():
        raise UserError(f'{data_dir}: no such folder here, expected one of prepared TFDS data sets')
    try:
        return tfds.builder(name, data_dir=root)
    except Exception as error:  # TFDS's errors have no common base; some are AssertionErrors
        unversioned = name.partition(':')[0]
        base = unversioned.partition('/')[0]
        known = set(tfds.list_builders(with_community_datasets=False))
        with contextlib.suppress(Exception):
            known.update(f'{base}/{config}' for config in tfds.builder_cls(base).builder_configs)
        with contextlib.suppress(OSError):
            known.update(folder.name for folder in root.iterdir())
        reason = first_line(error).rpartition('": ')[2]  # without TFDS's list of all arguments
        if unversioned not in known:
            sought = unversioned if base in known else base
            nearest = difflib.get_close_matches(sought, sorted(known))
            reason = f'no such name; the nearest are {nearest}' if nearest else 'no such name'
        raise UserError(f'TFDS data set {name!r}: {reason}') from error


def _require_network(builder: Any) -> None:
    """Fails within seconds if there is no network: TFDS retries its downloads for minutes."""
    urls = [urlsplit(url) for url in builder.url_infos or ()]
    ports = {url.hostname: url.port or _PORTS[url.scheme] for url in urls if url.scheme in _PORTS}
    hosts = list(ports.items())[:4]
    if not hosts or urllib.request.getproxies().keys() & {*_PORTS, 'all'}:
        return  # nothing to download, or only the proxy has to be reachable
    reached = threading.Event()

    def connect(host: str, port: int) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), _PROBE_SECONDS).close()
            reached.set()

    for host in hosts:  # in threads that may be left behind: a name lookup has no time limit
        threading.Thread(target=connect, args=host, daemon=True).start()
    if not reached.wait(_PROBE_SECONDS):
        tried = ' or '.join(host for host, _ in hosts)
        raise UserError(
            f'TFDS data set {builder.info.full_name!r} is not prepared in {builder.data_dir} and '
            f'cannot be downloaded: no connection to {tried}; prepare it where there is '
            'one, copy the folder, and set TFDS_DATA_DIR or --config.data.data_dir to the copy'
        )


def _records(builder: Any, where: str, split: str) -> Sequence[bytes]:
    """Reads the records of a split. Raises UserError for no such split or a damaged file."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    try:
        if not builder.info.splits[split].num_examples:
            raise UserError(f'{where}: no examples')
        source = builder.as_data_source(
            split, file_format=_FORMAT, deserialize_method=DeserializeMethod.RAW_BYTES
        )
        records: Sequence[bytes] = source.__getitems__(range(len(source)))
    except (ValueError, RuntimeError) as error:
        raise UserError(f'{where}: {first_line(error)}') from error
    return records
