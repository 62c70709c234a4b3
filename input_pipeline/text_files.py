"""Labelled texts, and pairs of texts, from the user's own .tsv, .csv and .jsonl files.

Tables start with a header line that names the columns. A .csv file quotes as the csv module does;
a .tsv file does not quote at all, so a lone double quote in a sentence is an ordinary character.
A .jsonl file holds one JSON object per line. All are UTF-8, with or without a byte order mark and
with either line ending. Blank lines are skipped wherever they stand.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.paths import located
from configs.schema import BadInput
from input_pipeline.examples import (
    PairDataset,
    PairSplit,
    TextDataset,
    TextSplit,
    brief,
    join_features,
    not_among,
)

_Records = Iterator[tuple[str, Mapping[str, object]]]  # Where each stands ('a.tsv:17'); its values.
_Examples = list[tuple[str, str, str]]  # Where each stands, its text and its label.

# JSON escapes can spell what a UTF-8 file cannot: half of a surrogate pair, and NUL.
_UNSTORABLE = re.compile('[\0\ud800-\udfff]')


def read_text_files(
    train_file: str, eval_file: str, text_features: Sequence[str], label_feature: str
) -> TextDataset:
    """Reads both files whole; the training file decides which labels there are.

    Labels are sorted as numbers if all of them are integers, otherwise as text. The features
    named are columns of a table or keys of a JSON object; a JSON label is a string or an integer.

    Raises:
        BadInput: a file cannot be read or does not hold what was asked for; one line that starts
            with the file and, where a line of it is at fault, that line's number.
    """
    train = _read(train_file, text_features, label_feature)
    evaluation = _read(eval_file, text_features, label_feature)
    names = _label_names({label for _, _, label in train})
    if len(names) == 1:
        raise BadInput(f'{train_file}: only label {brief.repr(names[0])}, expected two or more')
    return TextDataset(_split(train, names), _split(evaluation, names), names)


def _read(file: str, text_features: Sequence[str], label_feature: str) -> _Examples:
    examples: _Examples = []
    for where, record in _records(file, [*text_features, label_feature]):
        text = join_features(
            _word(where, name, record[name], 'some text') for name in text_features
        )
        label = record[label_feature]
        if type(label) is int:  # Not isinstance(): a bool is an int too, but no label.
            label = str(label)
        label = _word(where, label_feature, label, 'some text or an integer')
        examples.append((where, text, label))
    if not examples:
        raise BadInput(f'{file}: no examples, expected one or more lines of data')
    return examples


def _records(file: str, wanted: Sequence[str]) -> _Records:
    match Path(file).suffix.lower():
        case '.tsv':
            return _table_rows(file, wanted, delimiter='\t', quoting=csv.QUOTE_NONE)
        case '.csv':
            return _table_rows(file, wanted)
        case '.jsonl':
            return _json_objects(file, wanted)
        case suffix:
            raise BadInput(f'{file}: suffix {suffix!r}, expected .tsv, .csv or .jsonl')


def _contents(file: str) -> str:
    try:
        text = located(file).read_bytes().decode('utf-8-sig')
    except OSError as error:  # from a bucket it has no strerror
        missing = isinstance(error, FileNotFoundError)
        reason = 'No such file' if missing else error.strerror or error
        raise BadInput(f'{file}: {reason}, expected a readable file') from error
    except UnicodeDecodeError as error:
        # Counted in the error's own bytes: they lack the byte order mark, as does its offset.
        line = error.object.count(b'\n', 0, error.start) + 1
        raise BadInput(f'{file}:{line}: bytes that are not UTF-8, expected UTF-8') from error
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise BadInput(f'{file}:{line}: a NUL byte, expected UTF-8 (is the file UTF-16?)')
    return text


def _table_rows(file: str, wanted: Sequence[str], **dialect: Any) -> _Records:
    csv.field_size_limit(2**31 - 1)  # By default a text of more than 128 KiB is an error.
    rows = csv.reader(io.StringIO(_contents(file), newline=''), strict=True, **dialect)
    header: list[str] = []
    while True:
        where = f'{file}:{rows.line_num + 1}'  # Where the row starts: quoted fields span lines.
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise BadInput(f'{where}: {error}, expected balanced double quotes') from error
        if row is None:
            return
        if len(row) <= 1 and not ''.join(row).strip():
            continue
        if not header:
            header = [name.strip() for name in row]
            _require(where, 'column', wanted, header)
        elif len(row) != len(header):
            names = brief.repr(header)
            raise BadInput(f'{where}: {len(row)} column(s), expected {len(header)}: {names}')
        else:
            yield where, dict(zip(header, row, strict=True))


def _json_objects(file: str, wanted: Sequence[str]) -> _Records:
    # Not splitlines(), which also breaks at characters that occur inside texts, such as U+2028.
    for line, source in enumerate(_contents(file).split('\n'), start=1):
        if not source.strip():
            continue
        where = f'{file}:{line}'
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            reason = str(error).replace('line 1 column', 'column')
            raise BadInput(f'{where}: invalid JSON ({reason}), expected an object') from error
        if not isinstance(record, dict):
            raise BadInput(f'{where}: {brief.repr(record)}, expected a JSON object')
        _require(where, 'key', wanted, list(record))
        yield where, record


def _require(where: str, kind: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if present.count(name) > 1:
            raise BadInput(f'{where}: {kind} {name!r} occurs twice, expected once')
        if name not in present:
            raise BadInput(f'{where}: {kind} {not_among(name, present)}')


def _word(where: str, name: str, value: object, expected: str) -> str:
    if isinstance(value, str) and value.strip() and not _UNSTORABLE.search(value):
        return value.strip()
    raise BadInput(f'{where}: {name!r} is {brief.repr(value)}, expected {expected}')


def _label_names(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _split(examples: _Examples, names: tuple[str, ...]) -> TextSplit:
    index = {name: position for position, name in enumerate(names)}
    for where, _, label in examples:
        if label not in index:
            raise BadInput(f'{where}: label {not_among(label, names)}')
    labels = np.array([index[label] for _, _, label in examples], np.int32)
    return TextSplit([text for _, text, _ in examples], labels)


# seq2seq: from here to the end (docs/fork.md)


def read_pair_files(
    train_file: str, eval_file: str, source_feature: str, target_feature: str
) -> PairDataset:
    """Reads both files whole. Raises BadInput as `read_text_files` does, for an empty side too."""
    train, evaluation = (
        PairSplit.of(_read_pairs(file, source_feature, target_feature))
        for file in (train_file, eval_file)
    )
    return PairDataset(train, evaluation)


def _read_pairs(file: str, source_feature: str, target_feature: str) -> list[tuple[str, str]]:
    names = (source_feature, target_feature)
    pairs = []
    for where, record in _records(file, names):
        source, target = (_word(where, name, record[name], 'some text') for name in names)
        pairs.append((source, target))
    if not pairs:
        raise BadInput(f'{file}: no examples, expected one or more lines of data')
    return pairs
