"""Reads texts and labels from .tsv, .csv and .jsonl files, also with .gz at the end.

Tables start with a header line that names the columns, unless the config names them. A .jsonl file
holds one JSON object per line. All are UTF-8, with or without a byte order mark and with either
line ending. Blank lines are skipped.

A .csv file quotes as the csv module does. A .tsv file may do so too, as spreadsheets and pandas
write it; if its quotes do not fit together, they are ordinary characters of sentences.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NoReturn

from etils import epath

from errors import UserError
from input_pipeline.examples import Rows, brief, not_among

_Records = Iterator[tuple[str, Mapping[str, object]]]  # place ('a.tsv:17'), values by name
_Table = list[tuple[int, list[str]]]  # line, cells

# JSON escapes can spell what a UTF-8 file cannot: half of a surrogate pair, and NUL.
_UNSTORABLE = re.compile('[\0\ud800-\udfff]')
_OPENS_QUOTED = re.compile('(^|[\t\r\n])"')
_WHOLLY_QUOTED = re.compile('(^|[\t\r\n])"([^"\t\r\n]|"")*"([\t\r\n]|$)')
_MISSING = {'nan', 'na', 'n/a', '<na>', 'null', '-1'}  # labels that stand for no label


def refuse(problem: str) -> NoReturn:
    """Raises UserError."""
    raise UserError(problem)


def read(
    file: str,
    texts: Sequence[str],
    label: str = '',
    columns: Sequence[str] = (),
    bad: Callable[[str], None] = refuse,
) -> Rows:
    """Reads columns of a table, or keys of JSON objects. A JSON label is a string or an integer.

    `file` is a path, or a pattern with * for several files, which are read in order of their names.
    `columns` names the columns of a table without a header line. `bad` gets the problem of each row
    that cannot be used, and the row is left out. Raises UserError for a file that cannot be read:
    one line that starts with the file and, if possible, the number of the line at fault.
    """
    places, found, labels = [], [], []
    wanted = [*texts, *([label] if label else [])]
    records = (_records(path, wanted, columns, bad) for path in _paths(file))
    for where, record in itertools.chain.from_iterable(records):
        try:
            row = tuple(_text(where, name, record[name]) for name in texts)
            if label:
                labels.append(_label(where, label, record[label]))
        except UserError as error:
            bad(str(error))
        else:
            found.append(row)
            places.append(where)
    return Rows(found, labels, (), places.__getitem__)


def _paths(pattern: str) -> list[str]:
    folder, _, name = pattern.rpartition('/')
    if '*' not in name or epath.Path(pattern).expanduser().exists():
        return [pattern]
    found = sorted(str(path) for path in epath.Path(folder or '.').expanduser().glob(name))
    return found or refuse(f'{pattern}: no such files')


def _records(
    file: str, wanted: Sequence[str], columns: Sequence[str], bad: Callable[[str], None]
) -> _Records:
    match epath.Path(file.lower().removesuffix('.gz')).suffix:
        case '.tsv' | '.csv' as suffix:
            text = _contents(file)
            table = _tab_separated(file, text) if suffix == '.tsv' else _table(file, text)
            return _table_rows(file, table, wanted, list(columns), bad)
        case '.jsonl':
            return _json_objects(file, wanted, bad)
        case suffix:
            raise UserError(f'{file}: suffix {suffix!r}, expected .tsv, .csv or .jsonl')


def _contents(file: str) -> str:
    try:
        data = epath.Path(file).expanduser().read_bytes()
        text = (gzip.decompress(data) if file.lower().endswith('.gz') else data).decode('utf-8-sig')
    except FileNotFoundError as error:
        raise UserError(f'{file}: no such file') from error
    except OSError as error:  # from a bucket it has no strerror
        raise UserError(f'{file}: cannot be read ({error.strerror or error})') from error
    except (EOFError, zlib.error) as error:
        raise UserError(f'{file}: damaged gzip data ({error})') from error
    except UnicodeDecodeError as error:
        # Counted in the error's own bytes: they lack the byte order mark, as does its offset.
        line = error.object.count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: bytes that are not UTF-8, expected UTF-8') from error
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise UserError(f'{file}:{line}: a NUL byte, expected UTF-8 (is the file UTF-16?)')
    return text


def _table(
    file: str, text: str, delimiter: str = ',', quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> _Table:
    """Returns the rows of a table, each with the line it starts on: quoted cells span lines."""
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 128 KiB is an error
    source = io.StringIO(text, newline='')
    rows = csv.reader(source, strict=True, delimiter=delimiter, quoting=quoting)
    table, line = [], 1
    try:
        for row in rows:
            if len(row) > 1 or ''.join(row).strip():
                table.append((line, row))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f'{file}:{line}: {error}, expected balanced double quotes') from error
    return table


def _tab_separated(file: str, text: str) -> _Table:
    """Reads a table whose cells may be quoted, or may be sentences that have quotes in them."""
    plain = _table(file, text, '\t', csv.QUOTE_NONE)
    if not _OPENS_QUOTED.search(text):
        return plain
    try:
        quoted = _table(file, text, '\t')
    except UserError:
        if _WHOLLY_QUOTED.search(text):
            raise  # some cells are quoted, and others break the rules
        return plain
    wrong = [sum(len(row) != len(table[0][1]) for _, row in table) for table in (plain, quoted)]
    if wrong == [0, 0] and len(plain) != len(quoted):
        line = min({line for line, _ in plain} - {line for line, _ in quoted}) - 1
        raise UserError(f'{file}:{line}: a double quote that closes on a later line; remove it')
    return quoted if wrong[1] <= wrong[0] else plain


def _table_rows(
    file: str,
    table: _Table,
    wanted: Sequence[str],
    header: list[str],
    bad: Callable[[str], None],
) -> _Records:
    if header:
        _require('config.data.columns', 'column', wanted, header)
    for line, row in table:
        where, cells = f'{file}:{line}', [cell.strip() for cell in row]
        if not header:
            header = cells
            _require(where, 'column', wanted, header)
        elif cells == header:
            bad(f'{where}: the header line again, expected data (were two files joined?)')
        elif len(row) != len(header):
            bad(f'{where}: {len(row)} column(s), expected {len(header)}: {brief.repr(header)}')
        else:
            yield where, dict(zip(header, row, strict=True))


def _json_objects(file: str, wanted: Sequence[str], bad: Callable[[str], None]) -> _Records:
    # Not splitlines(), which also breaks at characters that occur inside texts, such as U+2028.
    for line, source in enumerate(_contents(file).split('\n'), start=1):
        if not source.strip():
            continue
        where = f'{file}:{line}'
        try:
            record = json.loads(source)
            if not isinstance(record, dict):
                raise UserError(f'{where}: {brief.repr(record)}, expected a JSON object')
            _require(where, 'key', wanted, list(record))
        except (ValueError, RecursionError) as error:
            reason = str(error).replace('line 1 column', 'column')
            bad(f'{where}: invalid JSON ({reason}), expected an object')
        except UserError as error:
            bad(str(error))
        else:
            yield where, record


def _require(where: str, kind: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if present.count(name) > 1:
            raise UserError(f'{where}: {kind} {name!r} occurs twice, expected once')
        if name not in present:
            hint = '; without a header line, set config.data.columns' if kind == 'column' else ''
            raise UserError(f'{where}: {kind} {not_among(name, present)}{hint}')


def _text(where: str, name: str, value: object) -> str:
    if isinstance(value, str) and not _UNSTORABLE.search(value):
        return value.strip()
    raise UserError(f'{where}: {name!r} is {brief.repr(value)}, expected some text')


def _label(where: str, name: str, value: object) -> str:
    label = str(value) if type(value) is int else value  # a bool is an int too, but no label
    if not isinstance(label, str) or not label.strip() or _UNSTORABLE.search(label):
        found = f'{where}: {name!r} is {brief.repr(value)}'
        raise UserError(f'{found}, expected some text or an integer')
    if label.strip().casefold() in _MISSING:
        raise UserError(
            f'{where}: {name!r} is {label.strip()!r}, which usually marks a missing label; '
            'expected a class (remove the row, or give the class a name)'
        )
    return label.strip()
