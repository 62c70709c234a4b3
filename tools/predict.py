"""Predicts on new texts, from a checkpoint alone.

    python -m tools.predict RUN --text "..." [--text "..."]
    python -m tools.predict RUN --input FILE.tsv --column NAME [--format jsonl|tsv] > predictions

Writes a line per text, in order, while it reads: for a classifier the label, the probability of
each label and the attention on each word; for sequence to sequence the decoded text. FILE.tsv,
FILE.csv (both with a header line) and FILE.jsonl have named columns; any other file has a text on
each line. A text that cannot be predicted from stops it with exit code 2, or is skipped.
"""

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from errors import KeyfoldError, UserError
from input_pipeline.examples import brief, not_among
from runtime.storage import in_bucket, open_location
from tasks.task import Predictor
from tools import saved_run
from tools.arguments import Arguments, one_line_errors, run_tool

ROWS = 256  # of a batch


class Text(NamedTuple):
    """A text to predict on, or what is wrong with it."""

    place: str  # 'text 3', or 'dev.tsv:17'
    text: str
    problem: str = ''


Row = dict[str, np.ndarray]  # an encoded text, every array [1, ...]
Prediction = dict[str, Any]


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints the predictions; returns the exit code."""
    parser = Arguments(__doc__)
    add = parser.add_argument
    add('run', help='workdir of a run')
    add('--text', action='append', help='a text; may be given more than once')
    add('--input', metavar='FILE', help='file of texts; /dev/stdin for standard input')
    add('--column', metavar='NAME', help='column or key of FILE.tsv, .csv or .jsonl to read')
    add(
        '--format', choices=('jsonl', 'tsv'), default='jsonl', help='of the output (default: jsonl)'
    )
    add('--bad_lines', choices=('stop', 'skip'), default='stop', help='(default: stop)')
    saved_run.add_step_argument(parser)
    given = parser.parse_args(argv)
    if (given.text is None) == (given.input is None):
        raise UserError('expected --text or --input, one of them')
    if given.input is None:
        texts = iter([Text(f'text {n}', text) for n, text in enumerate(given.text, 1)])
    else:
        texts = read_texts(given.input, given.column)
        first = list(itertools.islice(texts, 1))  # a mistake is reported before the model is read
        texts = itertools.chain(first, texts)
    run = saved_run.open_run(given.run, given.step)
    predictor = run.predictor()
    params = run.params(predictor.init)
    found = predictions(predictor, params, texts, skip=given.bad_lines == 'skip')
    print_all(found, given.format)
    return 0


def print_all(found: Iterator[Prediction], form: str) -> None:
    """Prints predictions as they come, floats with six digits."""
    header: list[str] = []
    for prediction in found:
        line = rounded(prediction)
        if form == 'jsonl':
            print(json.dumps(line, ensure_ascii=False))
            continue
        cells = flat(line)
        if not header:
            header = list(cells)
            print(*header, sep='\t')
        # A cell cannot hold what separates cells and lines.
        print(*(' '.join(str(cells[name]).split()) for name in header), sep='\t')


def rounded(value: Any) -> Any:
    """Rounds all floats in JSON to six significant digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f'{value:.6g}') if isinstance(value, float) else value


def flat(prediction: Prediction) -> dict[str, Any]:
    """Returns the cells of a table: {'a': {'b': 1}} becomes 'a.b'; lists are left out."""
    cells: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, dict):
            cells |= {f'{name}.{key}': part for key, part in value.items()}
        elif not isinstance(value, list):
            cells[name] = value
    return cells


def read_texts(file: str, column: str | None) -> Iterator[Text]:
    """Yields the texts of a file. Raises UserError if it cannot be read or lacks the column.

    Bytes that are not UTF-8 become lone surrogates, as on a command line.
    """
    suffix = Path(file.lower().removesuffix('.gz')).suffix
    named = suffix in ('.tsv', '.csv', '.jsonl')
    if column is not None and not named:
        raise UserError(f'--input={file}: --column expects a .tsv, .csv or .jsonl file (or .gz)')
    try:
        path = open_location(file) if in_bucket(file) else epath.Path(file).expanduser()
        with path.open('rb') as data:
            newline = '' if suffix == '.csv' else None  # a quoted cell may hold line ends
            unpacked = gzip.GzipFile(fileobj=data) if file.lower().endswith('.gz') else data
            lines = io.TextIOWrapper(unpacked, 'utf-8-sig', 'surrogateescape', newline=newline)
            if not named:
                for number, line in enumerate(lines, 1):
                    yield Text(f'text {number}', line.rstrip('\n'))
            elif suffix == '.jsonl':
                yield from json_texts(file, column, lines)
            else:
                yield from table_texts(file, column, lines, suffix)
    except (OSError, EOFError, zlib.error) as error:  # the last two from gzip
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'--input={file}: cannot be read ({reason})') from error


def table_texts(file: str, column: str | None, lines: Iterable[str], suffix: str) -> Iterator[Text]:
    """Yields one column of a table, which starts with a header line.

    In a .tsv file every cell that may be quoted counts as quoted, since texts are read one by one.
    Training reads the whole file first, and then takes all cells or none as quoted.
    """
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 128 KiB is an error
    tabs: dict[str, Any] = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE}
    rows = csv.reader(lines, **(tabs if suffix == '.tsv' else {'strict': True}))
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            place, line = f'{file}:{line}', rows.line_num + 1  # where the row starts
            if len(row) <= 1 and not ''.join(row).strip():
                continue
            if not header:
                header = [unquoted(name) if suffix == '.tsv' else name.strip() for name in row]
                index = header.index(require_column(file, column, header))
            elif len(row) != len(header):
                problem = f'{len(row)} column(s), expected {len(header)}: {brief.repr(header)}'
                yield Text(place, '', problem)
            else:
                yield Text(place, unquoted(row[index]) if suffix == '.tsv' else row[index])
    except csv.Error as error:
        raise UserError(f'{file}:{line}: {error}, expected balanced double quotes') from error


def unquoted(cell: str) -> str:
    """Returns a cell of a .tsv file without the quotes that spreadsheets put around some."""
    if re.fullmatch('"([^"]|"")*"', cell):
        cell = cell[1:-1].replace('""', '"')
    return cell.strip()


def json_texts(file: str, column: str | None, lines: Iterable[str]) -> Iterator[Text]:
    """Yields one key of the JSON objects, one per line."""
    name = ''
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f'{file}:{number}'
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Text(place, '', f'invalid JSON ({error}), expected an object')
            continue
        if not isinstance(record, dict):
            yield Text(place, '', f'{brief.repr(record)}, expected a JSON object')
            continue
        name = name or require_column(place, column, list(record))
        value = record.get(name)
        if isinstance(value, str):
            yield Text(place, value)
        else:
            yield Text(place, '', f'{name!r} is {brief.repr(value)}, expected some text')


def require_column(place: str, column: str | None, known: list[str]) -> str:
    """Returns the column to read. Raises UserError if none is named, or it does not exist."""
    if column is None:
        raise UserError(f'{place}: expected --column=NAME, one of {brief.repr(known)}')
    if known.count(column) > 1:
        raise UserError(f'{place}: column {column!r} occurs twice, expected once')
    if column not in known:
        raise UserError(f'{place}: --column={not_among(column, known)}')
    return column


def predictions(
    predictor: Predictor, params: Any, texts: Iterator[Text], skip: bool
) -> Iterator[Prediction]:
    """Yields what the model predicts on each text. Reads them as needed, in batches of one shape.

    Raises UserError for a text that cannot be predicted from; `skip` reports it and leaves it out.
    """
    apply = jax.jit(predictor.apply)
    encoded = encode_texts(predictor, texts, skip)
    size = 0
    running: tuple[list[str], Any] | None = None  # computed while the next batch is read
    while batch := list(itertools.islice(encoded, ROWS)):
        size = size or len(batch)  # of every batch: the last one is filled up
        filled = [row for _, row in batch + batch[:1] * (size - len(batch))]
        arrays = {name: np.concatenate([row[name] for row in filled]) for name in filled[0]}
        started = [text for text, _ in batch], apply(params, arrays)
        if running:
            yield from shown(predictor, *running)
        running = started
    if running:
        yield from shown(predictor, *running)


def shown(predictor: Predictor, texts: list[str], results: Any) -> Iterator[Prediction]:
    """Yields the predictions of a batch as JSON."""
    arrays = jax.device_get(results)
    for row, text in enumerate(texts):
        yield {'text': text, **predictor.show(arrays, row, text), **predictor.notes(text)}


def encode_texts(
    predictor: Predictor, texts: Iterator[Text], skip: bool
) -> Iterator[tuple[str, Row]]:
    """Yields each text with its encoding."""
    for place, text, problem in texts:
        report = f'{place}: {problem}' if problem else ''
        if any('\ud800' <= letter <= '\udfff' for letter in text):  # see read_texts
            report = f'{place}: {text!a} has bytes that are not UTF-8, expected UTF-8'
        if not report:
            try:
                yield text, predictor.encode([text])
                continue
            except KeyfoldError as error:
                report = str(error).replace('text 1', place, 1)
        if not skip:
            raise UserError(report)
        print(f'skipped: {report}', file=sys.stderr)


if __name__ == '__main__':
    run_tool(main)
