"""Reads texts and labels from .tsv, .csv and .jsonl files, also with .gz at the end.

Tables start with a header line that names the columns, unless the config names them. A .jsonl file
holds one JSON object per line. All are UTF-8, with or without a byte order mark and with either
line ending. Blank lines are skipped.

A .csv file quotes as the csv module does. A .tsv file may do so too, as spreadsheets and pandas
write it; if its quotes do not fit together, they are ordinary characters of sentences.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from etils import epath

from configs.schema import DataConfig
from errors import UserError
from input_pipeline.examples import Features, Rows, brief, not_among

Records = Iterator[tuple[str, list[object]]]  # place ('a.tsv:17'), values in the order asked for
Report = Callable[[str], None]  # gets what is wrong with a row
Table = Iterable[tuple[int, list[str]]]  # line, cells

# JSON escapes can spell what a UTF-8 file cannot: half of a surrogate pair, and NUL.
_UNSTORABLE = re.compile('[\0\ud800-\udfff]')
_WHOLLY_QUOTED = re.compile('(^|[\t\r\n])"([^"\t\r\n]|"")*"([\t\r\n]|$)')


def read(data: DataConfig, file: str, features: Features, bad: Report) -> Rows:
    """Reads columns of a table, or keys of JSON objects; 'a.b' is key b of the object at key a.

    A JSON label is a string, a number, true or false; with a `separator`, a text or a list holds
    any number of labels. `file` is a path, or a pattern with * for several files, which are read in
    order of their names. `bad` gets the problem of each row that cannot be read, and the row is
    left out. Raises UserError for a file that cannot be read: one line that names the file and, if
    possible, the number of the line at fault.
    """
    places, found, labels = list[str](), [], []
    texts, label, separator = features[:3]
    wanted = [*texts, *([label] if label else [])]
    option = f'config.data.{"train" if file == data.train else "evaluation"}'
    for path in _paths(file, option):
        before = len(places)
        match suffix := epath.Path(path.lower().removesuffix('.gz')).suffix:
            case '.jsonl':
                # Not splitlines(): it also breaks at characters inside texts, such as U+2028.
                records = json_objects(path, contents(path).split('\n'), wanted, bad)
            case '.tsv' | '.csv':
                delimiter = data.delimiter or (',' if suffix == '.csv' else '\t')
                text = contents(path)
                if delimiter == '\t':
                    table = _tab_separated(path, text)
                else:
                    table = split_rows(path, io.StringIO(text, newline=''), delimiter)
                records = table_rows(path, table, wanted, data.columns, bad)
            case _:
                share = ', or a share of the training rows, such as 10%' * (file != data.train)
                expected = f'expected .tsv, .csv or .jsonl{share}'
                raise UserError(f'{option}: {path}: suffix {suffix!r}, {expected}')
        for where, values in records:
            try:
                row = tuple(map(cell_text, itertools.repeat(where), texts, values))
                labels += [cell_labels(where, label, values[-1], separator)] if label else []
            except UserError as error:
                bad(str(error))
            else:
                found.append(row)
                places.append(where)
        if len(places) == before:
            bad(f'{path}: no examples, expected one or more rows of data')
    return Rows(found, labels, (), places.__getitem__)


def _paths(pattern: str, option: str) -> list[str]:
    if '*' not in pattern or epath.Path(pattern).expanduser().exists():
        return [pattern]
    folder, slash, _ = pattern[: pattern.index('*')].rpartition('/')
    root, found = epath.Path(f'{folder}{slash}' or '.').expanduser(), []
    with contextlib.suppress(ValueError, NotImplementedError):  # an impossible name, or **
        found = sorted(map(str, root.glob(pattern.removeprefix(f'{folder}{slash}'))))
    if not found:
        raise UserError(f'{option}: {pattern}: no such files')
    return found


def contents(file: str) -> str:
    """Returns the text of a file, unpacked. Raises UserError for one that cannot be read."""
    try:
        data = epath.Path(file).expanduser().read_bytes()
        text = (gzip.decompress(data) if file.lower().endswith('.gz') else data).decode('utf-8-sig')
    except FileNotFoundError as error:
        raise UserError(f'{file}: no such file') from error
    except UnicodeDecodeError as error:
        # Counted in the error's own bytes: they lack the byte order mark, as does its offset.
        line = error.object.count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: bytes that are not UTF-8, expected UTF-8') from error
    # ValueError is for impossible names, and an OSError from a bucket has no strerror.
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{file}: cannot be read ({reason})') from error
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise UserError(f'{file}:{line}: a NUL byte, expected UTF-8 (is the file UTF-16?)')
    return text


def split_rows(file: str, lines: Iterable[str], delimiter: str, quoted: bool = True) -> Table:
    """Yields the rows of a table, each with the line it starts on: quoted cells span lines."""
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 128 KiB is an error
    rows = csv.reader(
        lines,
        strict=True,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    line = 1
    try:
        for row in rows:
            if len(row) > 1 or ''.join(row).strip():
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f'{file}:{line}: {error}, expected balanced double quotes and {delimiter!r} between '
            'cells (config.data.delimiter)'
        ) from error


def _tab_separated(file: str, text: str) -> Table:
    """Reads a table whose cells may be quoted, or may be sentences that have quotes in them."""

    def rows(quoted: bool) -> list[tuple[int, list[str]]]:
        return list(split_rows(file, io.StringIO(text, newline=''), '\t', quoted))

    plain = rows(quoted=False)
    try:
        quoted = rows(quoted=True)
    except UserError:
        if _WHOLLY_QUOTED.search(text):
            raise  # some cells are quoted, and others break the rules
        return plain
    wrong = [sum(len(row) != len(table[0][1]) for _, row in table) for table in (plain, quoted)]
    if wrong == [0, 0] and len(plain) != len(quoted):
        line = min({line for line, _ in plain} - {line for line, _ in quoted}) - 1
        raise UserError(f'{file}:{line}: a double quote that closes on a later line; remove it')
    return quoted if wrong[1] <= wrong[0] else plain


def table_rows(
    file: str, table: Table, wanted: Sequence[str], header: Sequence[str], bad: Report
) -> Records:
    """Yields the cells `wanted` of each row. Without a `header`, the first row is one."""
    if header:
        _require_columns('config.data.columns', wanted, header)
    names = {name.casefold() for name in header}
    for line, row in table:
        where, cells = f'{file}:{line}', [cell.strip() for cell in row]
        if not header:
            header, names = cells, {name.casefold() for name in cells}
            _require_columns(where, wanted, header)
        elif {cell.casefold() for cell in cells} == names:
            bad(f'{where}: the header line again, expected data (were two files joined?)')
        elif len(row) != len(header):
            bad(f'{where}: {len(row)} column(s), expected {len(header)}: {brief.repr(header)}')
        else:
            yield where, [row[header.index(name)] for name in wanted]


def json_objects(file: str, lines: Iterable[str], wanted: Sequence[str], bad: Report) -> Records:
    """Yields the values of the keys `wanted` of the object on each line."""
    for line, source in enumerate(lines, start=1):
        if not source.strip():
            continue
        where = f'{file}:{line}'
        try:
            record = json.loads(source, object_pairs_hook=_json_object)
            if not isinstance(record, dict):
                raise UserError(f'{where}: {brief.repr(record)}, expected a JSON object')
            values = [_value(where, record, name) for name in wanted]
        except (ValueError, RecursionError) as error:
            reason = str(error).replace('line 1 column', 'column')
            bad(f'{where}: invalid JSON ({reason}), expected an object')
        except UserError as error:
            bad(str(error))
        else:
            yield where, values


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f'one of the keys {brief.repr(list(record))} occurs twice')
    return record


def _value(where: str, record: dict[str, object], name: str) -> object:
    """Returns the value of a key, or of an inner object or list, such as 'review.labels.0'."""
    outer, _, inner = name.partition('.')
    child = record.get(outer)
    if isinstance(child, list):
        child = {str(index): item for index, item in enumerate(child)}
    if name not in record and inner and isinstance(child, dict):
        return _value(f'{where}, in {outer!r}', child, inner)
    if name not in record:
        raise UserError(f'{where}: key {not_among(name, record)}')
    return record[name]


def _require_columns(where: str, wanted: Sequence[str], header: Sequence[str]) -> None:
    for name in wanted:
        if header.count(name) > 1:
            raise UserError(f'{where}: column {name!r} occurs twice, expected once')
        if name not in header:
            raise UserError(
                f'{where}: column {not_among(name, header)}; without a header line set '
                'config.data.columns, for another separator .delimiter'
            )


def cell_labels(where: str, name: str, value: object, separator: str) -> list[str]:
    """Returns one label or, with a `separator`, those in a text or a list.

    Raises UserError for values that are no labels.
    """
    if not separator:
        return [cell_text(where, name, value, numbers=True)]
    parts = value.split(separator) if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise UserError(f'{where}: {name!r} is {brief.repr(value)}, expected a list or some text')
    return [text for part in parts if (text := cell_text(where, name, part, numbers=True))]


def cell_text(where: str, name: str, value: object, numbers: bool = False) -> str:
    """Returns a value as text. Raises UserError for other values than text and, if so, numbers."""
    if isinstance(value, str) and not _UNSTORABLE.search(value):
        return value.strip()
    if numbers and isinstance(value, int | float):
        return json.dumps(value)  # True is an int, and becomes 'true' again
    expected = 'some text' + ' or a number' * numbers
    raise UserError(f'{where}: {name!r} is {brief.repr(value)}, expected {expected}')
