"""Predicts on new texts, from a checkpoint alone.

    python -m tools.predict RUN --text "..." [--text "..."]
    python -m tools.predict RUN --input FILE [--format jsonl|tsv] > predictions

Writes a line per text, in order, while it reads: for a classifier the label, the probability of
each label and the attention on each word; for sequence to sequence the decoded text. Of FILE.tsv,
FILE.csv and FILE.jsonl (also .gz) it reads the columns that the run was trained on. A .txt file, or
one without a suffix, has a text on each line. A text that cannot be predicted from stops it with
exit code 2, or is skipped.
"""

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

from configs.schema import DataConfig
from errors import RunError, UserError
from input_pipeline import text_files
from input_pipeline.examples import brief, not_among
from input_pipeline.text_files import Records, Report
from runtime.storage import in_bucket, open_location
from tasks.task import Predictor
from tools import saved_run
from tools.arguments import Arguments, one_line_errors, run_tool

ROWS = 256  # of a batch
NOT_TEXT = re.compile('[\0\ud800-\udfff]')  # bytes that are not UTF-8 become lone surrogates
NAMED, LINES = ('.tsv', '.csv', '.jsonl'), ('.txt', '')  # files with named columns, and without


class Text(NamedTuple):
    """A text to predict on."""

    place: str  # 'text 3', or 'dev.tsv:17'
    text: str


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
    add(
        '--column', metavar='NAME', action='append',
        help='column or key to read instead of those of the run; several are joined as in training',
    )  # fmt: skip
    add(
        '--format', choices=('jsonl', 'tsv'), default='jsonl', help='of the output (default: jsonl)'
    )
    add('--bad_lines', choices=('stop', 'skip'), default='stop', help='(default: stop)')
    saved_run.add_step_argument(parser)
    given = parser.parse_args(argv)
    if (given.text is None) == (given.input is None):
        raise UserError('expected --text or --input, one of them')
    bad = skip if given.bad_lines == 'skip' else stop
    run = saved_run.open_run(given.run, given.step)
    predictor = run.predictor()
    if given.input is None:
        texts = iter([Text(f'text {n}', text) for n, text in enumerate(given.text, 1)])
    else:
        texts = read_texts(given.input, given.column, predictor, run.config.data, bad)
        first = list(itertools.islice(texts, 1))  # a mistake is reported before the model is read
        if not first:
            raise UserError(f'--input={given.input}: empty, expected one or more texts')
        texts = itertools.chain(first, texts)
    params = run.params(predictor.init)
    print_all(predictions(predictor, params, texts, bad), given.format)
    return 0


def stop(problem: str) -> None:
    """Ends the predictions at a bad text."""
    raise UserError(problem)


def skip(problem: str) -> None:
    """Reports a bad text, which is left out."""
    print(f'skipped: {problem}', file=sys.stderr)


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
    """Returns the cells of a table: {'a': {'b': 1}} becomes 'a.b'; attention is left out."""
    cells: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, dict):
            cells |= {f'{name}.{key}': part for key, part in value.items()}
        elif name != 'attention':
            cells[name] = ','.join(value) if isinstance(value, list) else value
    return cells


def read_texts(
    file: str, columns: Sequence[str] | None, predictor: Predictor, data: DataConfig, bad: Report
) -> Iterator[Text]:
    """Yields the texts of a file, each from `columns` or else from those that the run has read.

    `bad` gets the problem of each row that has none. Raises UserError if the file cannot be read,
    or has no such column.
    """
    suffix = Path(file.lower().removesuffix('.gz')).suffix
    if suffix not in (*NAMED, *LINES):
        raise UserError(
            f'--input={file}: suffix {suffix!r}, expected {", ".join(NAMED)}, or .txt with a text '
            'on each line (or .gz of these)'
        )
    if columns and suffix in LINES:
        raise UserError(f'--input={file}: --column expects a .tsv, .csv or .jsonl file (or .gz)')
    names = columns or predictor.features
    try:
        path = open_location(file) if in_bucket(file) else epath.Path(file).expanduser()
        with path.open('rb') as stored:
            newline = {'.csv': '', '.jsonl': '\n'}.get(suffix)  # a quoted cell may hold line ends
            unpacked = gzip.GzipFile(fileobj=stored) if file.lower().endswith('.gz') else stored
            lines = io.TextIOWrapper(unpacked, 'utf-8-sig', 'surrogateescape', newline=newline)
            if suffix in LINES:
                for number, line in enumerate(lines, 1):
                    yield Text(f'{file}:{number}', line.rstrip('\n'))
                return
            if suffix == '.jsonl':
                records = text_files.json_objects(file, lines, names, bad)
            else:
                delimiter = data.delimiter or (',' if suffix == '.csv' else '\t')
                records = table_records(file, lines, names, data.columns, delimiter, bad)
            for place, values in records:
                try:
                    parts = list(map(text_files.cell_text, itertools.repeat(place), names, values))
                except UserError as error:
                    bad(str(error))
                else:
                    yield Text(place, predictor.join(parts) if any(parts) else '')
    except (OSError, EOFError, zlib.error) as error:  # the last two from gzip
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'--input={file}: cannot be read ({reason})') from error


def table_records(
    file: str, lines: Iterable[str], names: Sequence[str], columns: Sequence[str], delimiter: str,
    bad: Report,
) -> Records:  # fmt: skip
    """Yields the columns `names` of a table.

    Its first line is the header, unless it lacks one of them and `columns` says what it has. With
    tabs, every cell that may be quoted counts as quoted, since rows are read one by one. Training
    reads the whole file first, and then takes all cells or none as quoted.
    """
    rows = iter(text_files.split_rows(file, lines, delimiter, quoted=delimiter != '\t'))
    if delimiter == '\t':
        rows = ((line, list(map(unquoted, row))) for line, row in rows)
    for line, first in itertools.islice(rows, 1):
        cells = [cell.strip() for cell in first]
        header = [] if not columns or set(names) <= set(cells) else columns
        if missing := [name for name in names if name not in (header or cells)]:
            problem = not_among(missing[0], header or cells)
            raise UserError(f'{file}:{line}: column {problem}; name one with --column')
        table = itertools.chain([(line, first)], rows)
        yield from text_files.table_rows(file, table, names, header, bad)


def unquoted(cell: str) -> str:
    """Returns a cell of a .tsv file without the quotes that spreadsheets put around some."""
    return cell[1:-1].replace('""', '"') if re.fullmatch('"([^"]|"")*"', cell) else cell


def predictions(
    predictor: Predictor, params: Any, texts: Iterator[Text], bad: Report
) -> Iterator[Prediction]:
    """Yields what the model predicts on each text. Reads them as needed, in batches of one shape.

    `bad` gets the problem of each text that cannot be predicted from. Raises UserError if no text
    is left.
    """
    apply = jax.jit(predictor.apply)
    encoded = encode_texts(predictor, texts, bad)
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
    if not running:
        raise UserError('no text to predict on is left, expected one or more')
    yield from shown(predictor, *running)


def shown(predictor: Predictor, texts: list[str], results: Any) -> Iterator[Prediction]:
    """Yields the predictions of a batch as JSON."""
    arrays = jax.device_get(results)
    for row, text in enumerate(texts):
        yield {'text': text, **predictor.show(arrays, row, text), **predictor.notes(text)}


def encode_texts(
    predictor: Predictor, texts: Iterator[Text], bad: Report
) -> Iterator[tuple[str, Row]]:
    """Yields each text with its encoding."""
    for place, text in texts:
        if NOT_TEXT.search(text):
            bad(f'{place}: {brief.repr(text)} has NUL or bytes that are not UTF-8, expected UTF-8')
            continue
        try:
            yield text, predictor.encode([text])
        except RunError as error:
            bad(str(error).replace('text 1', place, 1))


if __name__ == '__main__':
    run_tool(main)
