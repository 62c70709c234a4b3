"""Texts and labels from the user's own .tsv, .csv and .jsonl files.

Tables start with a header line that names the columns. A .csv file quotes as the csv module does;
a .tsv file does not quote at all, so a lone double quote in a sentence is an ordinary character.
A .jsonl file holds one JSON object per line. All are UTF-8, with or without a byte order mark and
with either line ending. Blank lines are skipped.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from errors import UserError
from input_pipeline.examples import Rows, brief, not_among

_Records = Iterator[tuple[str, Mapping[str, object]]]  # where each is ('a.tsv:17'), and its values

# JSON escapes can spell what a UTF-8 file cannot: half of a surrogate pair, and NUL.
_UNSTORABLE = re.compile('[\0\ud800-\udfff]')


def read(file: str, texts: Sequence[str], label: str = '') -> Rows:
    """Reads columns of a table, or keys of JSON objects. A JSON label is a string or an integer.

    Raises UserError for a file that cannot be read or does not hold what was asked for: one line
    that starts with the file and, where a line is at fault, its number.
    """
    places, found, labels = [], [], []
    for where, record in _records(file, [*texts, *([label] if label else [])]):
        found.append(tuple(_text(where, name, record[name]) for name in texts))
        if label:
            labels.append(_label(where, label, record[label]))
        places.append(where)
    if not found:
        raise UserError(f'{file}: no examples, expected one or more lines of data')
    return Rows(found, labels, (), places.__getitem__)


def _records(file: str, wanted: Sequence[str]) -> _Records:
    match Path(file).suffix.lower():
        case '.tsv':
            return _table_rows(file, wanted, delimiter='\t', quoting=csv.QUOTE_NONE)
        case '.csv':
            return _table_rows(file, wanted)
        case '.jsonl':
            return _json_objects(file, wanted)
        case suffix:
            raise UserError(f'{file}: suffix {suffix!r}, expected .tsv, .csv or .jsonl')


def _contents(file: str) -> str:
    try:
        text = epath.Path(file).expanduser().read_bytes().decode('utf-8-sig')
    except FileNotFoundError as error:
        raise UserError(f'{file}: no such file') from error
    except OSError as error:  # from a bucket it has no strerror
        raise UserError(f'{file}: cannot be read ({error.strerror or error})') from error
    except UnicodeDecodeError as error:
        # Counted in the error's own bytes: they lack the byte order mark, as does its offset.
        line = error.object.count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: bytes that are not UTF-8, expected UTF-8') from error
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise UserError(f'{file}:{line}: a NUL byte, expected UTF-8 (is the file UTF-16?)')
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
            raise UserError(f'{where}: {error}, expected balanced double quotes') from error
        if row is None:
            return
        if len(row) <= 1 and not ''.join(row).strip():
            continue
        if not header:
            header = [name.strip() for name in row]
            _require(where, 'column', wanted, header)
        elif len(row) != len(header):
            names = brief.repr(header)
            raise UserError(f'{where}: {len(row)} column(s), expected {len(header)}: {names}')
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
            raise UserError(f'{where}: invalid JSON ({reason}), expected an object') from error
        if not isinstance(record, dict):
            raise UserError(f'{where}: {brief.repr(record)}, expected a JSON object')
        _require(where, 'key', wanted, list(record))
        yield where, record


def _require(where: str, kind: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if present.count(name) > 1:
            raise UserError(f'{where}: {kind} {name!r} occurs twice, expected once')
        if name not in present:
            raise UserError(f'{where}: {kind} {not_among(name, present)}')


def _text(where: str, name: str, value: object) -> str:
    if isinstance(value, str) and not _UNSTORABLE.search(value):
        return value.strip()
    raise UserError(f'{where}: {name!r} is {brief.repr(value)}, expected some text')


def _label(where: str, name: str, value: object) -> str:
    if type(value) is int:  # not isinstance(): a bool is an int too, but no label
        return str(value)
    if isinstance(value, str) and value.strip() and not _UNSTORABLE.search(value):
        return value.strip()
    raise UserError(f'{where}: {name!r} is {brief.repr(value)}, expected some text or an integer')
