"""Fuzzed rows, labels and options are refused in one line, reported, or mean what they say.

Each case is a good table in a random format, with at most one thing wrong. What is wrong decides
what has to happen, so nothing meaningless can pass in silence, and nothing good is refused. Set
FUZZED=5000 for more cases.
"""

import csv
import decimal
import fractions
import functools
import gzip
import io
import itertools
import json
import os
import pathlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import reviews, schema
from configs.schema import Config, options, to_dict
from errors import UserError
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from tasks.task import Task

CASES = int(os.environ.get('FUZZED', '300'))
Rows = list[list[Any]]  # text, label

CLASSES: list[list[Any]] = [
    ['pos', 'neg'],
    ['0', '1'],
    ['-1', '1'],
    ['1', '2', '3'],
    ['-2', '-1', '0', '1', '2'],
    ['True', 'False'],
    ['0.5', '1.5', '2.5'],
    ['❤', '😡', '1/2'],
    ['c', 'c++', 'none', 'very good'],
    ['+', '-', '.'],
]
JSON_CLASSES: list[list[Any]] = [[True, False], [0, 1, 2], [-1, 1], [0.5, 1.5], [1.0, 2.0]]
RESPELLED: list[Callable[[str], str]] = [
    str.swapcase,
    lambda label: f'{label[:1]}\u200b{label[1:]}',
    lambda label: f'\ufeff{label}',
    lambda label: f'{label}\u00ad',
    lambda label: f'{label}\ufe0f',
    lambda label: f"'{label}'",
    lambda label: f'\u201c{label}\u201d',
    lambda label: f'{label};',
    lambda label: ''.join(chr(ord(c) + 0xFEE0) if '!' <= c <= '~' else c for c in label),
    lambda label: f'{float(label):.3f}' if is_number(label) else label.swapcase(),
    lambda label: f'+0{label}' if label.isdigit() else f'{label}\u3164',
]
MISSING = [
    '',
    ' ',
    'nan',
    'NA',
    'n/a',
    '#N/A',
    'NULL',
    'inf',
    '\u200b',
    '\u2800\u3164',
    'n\u00adan',
]
EMPTY = ['', '  ', '\u200b', '\u3164\u00a0', '\u2800']


def is_number(label: str) -> bool:
    """Returns whether a label is a number."""
    return bool(re.fullmatch(r'-?\d+(\.\d+)?', label))


class Fault(NamedTuple):
    """What is wrong with a table, and what has to follow."""

    apply: Callable[[random.Random, Rows, Rows], None]  # changes training or evaluation rows
    refused: str = ''  # the error has this in it
    skipped: bool = False  # bad_rows='skip' leaves one row out instead
    warned: str = ''  # a warning has this in it


def put(index: int, value: Callable[[random.Random, Any], Any]) -> Callable[..., None]:
    """Returns a fault of one cell of a random training row."""

    def apply(draw: random.Random, train: Rows, _: Rows) -> None:
        row = draw.choice(train)
        row[index] = value(draw, row[index])

    return apply


def respell(draw: random.Random, label: Any) -> str:
    """Spells a label in another way."""
    text = label if isinstance(label, str) else json.dumps(label)
    spelled = [respelled(text) for respelled in RESPELLED]
    return draw.choice([other for other in spelled if other.strip() != text])


def append(train_row: list[Any], evaluation_row: list[Any] | None = None) -> Callable[..., None]:
    """Returns a fault of one more row in each split."""

    def apply(_: random.Random, train: Rows, evaluation: Rows) -> None:
        train.append(list(train_row))
        evaluation += [list(evaluation_row)] if evaluation_row else []

    return apply


def relabel(label: Callable[[int], Any]) -> Callable[..., None]:
    """Returns a fault of all training labels."""

    def apply(_: random.Random, train: Rows, __: Rows) -> None:
        for number, row in enumerate(train):
            row[1] = label(number)

    return apply


def retext(text: Callable[[int], str], which: int) -> Callable[..., None]:
    """Returns a fault of all texts of a split."""

    def apply(_: random.Random, *splits: Rows) -> None:
        for number, row in enumerate(splits[which]):
            row[0] = text(number)

    return apply


def copy_row(change: Callable[[Any], Any]) -> Callable[..., None]:
    """Returns a fault of a training row that is also an evaluation row."""

    def apply(draw: random.Random, train: Rows, evaluation: Rows) -> None:
        text, label = draw.choice(train)
        evaluation.append([text, change(label)])

    return apply


def conflict(_: random.Random, train: Rows, __: Rows) -> None:
    """Gives one text two labels."""
    other = next(label for _, label in train if label != train[0][1])
    train.append([train[0][0], other])


FAULTS = {
    'none': Fault(lambda *_: None),
    'spelling': Fault(put(1, respell), 'expected one spelling of a label'),
    'missing': Fault(put(1, lambda draw, _: draw.choice(MISSING)), 'missing label', True),
    'empty': Fault(put(0, lambda draw, _: draw.choice(EMPTY)), 'expected some text', True),
    'header': Fault(append(['text', 'label']), 'the header line again', True),
    'swapped header': Fault(append(['LABEL', 'Text']), 'the header line again', True),
    'rare class': Fault(append(['film film', 'rare']), warned='1 of '),
    'unknown label': Fault(append(['film', 'x'], ['film', 'y']), "label 'y' is not among"),
    'one label': Fault(relabel(lambda _: 'same'), 'expected two or more'),
    'number per row': Fault(relabel(str), 'another column, or an amount'),
    'word per row': Fault(relabel('id{}'.format), 'another column, or an amount'),
    'measurement': Fault(relabel(lambda n: f'{n % 25 / 7:.3f}'), 'another column, or an amount'),
    'rare words': Fault(retext('w{}'.format, 0), 'config.data.min_frequency = 3: no '),
    'other words': Fault(retext('x{} y'.format, 1), warned='of the evaluation tokens are unknown'),
    'shared text': Fault(copy_row(lambda label: label), warned='in the training split too'),
    'two labels': Fault(conflict, warned='training texts have more than one label'),
}


def good_rows(draw: random.Random, classes: list[Any], start: int) -> Rows:
    """Returns five rows or more of each class, with texts that no other start gives."""
    words = [
        'film',
        'plot',
        'a "good" film',
        "it's",
        'so; so,',
        '片',
        'ÉTÉ',
        'tab\there',
        '5" disk',
    ]
    count = len(classes) * draw.randint(25, 40)
    return [
        [f'{draw.choice(words)} {draw.choice(words)} film {start + n} x', classes[n % len(classes)]]
        for n in range(count)
    ]


def written(draw: random.Random, folder: Path, name: str, rows: Rows, form: dict[str, Any]) -> str:
    """Writes rows as a file of a format, and returns its path."""
    suffix, delimiter, header = form['suffix'], form['delimiter'], form['header']
    if suffix == '.jsonl':
        shown = [
            json.dumps({'text': text, 'id': 7, 'label': label}, ensure_ascii=draw.random() < 0.5)
            for text, label in rows
        ]
        contents = '\n'.join(shown)
    else:
        out = io.StringIO()
        table = csv.writer(
            out,
            delimiter=delimiter,
            quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
            lineterminator=form['end'],
        )
        table.writerows([['text', 'label'], *rows] if header else rows)
        contents = out.getvalue()
    data = draw.choice([b'', b'\xef\xbb\xbf']) + contents.encode()
    path = folder / f'{name}{suffix}{form["packed"]}'
    path.write_bytes(gzip.compress(data) if form['packed'] else data)
    return str(path)


def fuzzed_case(seed: int, folder: Path) -> tuple[str, str, Task | None, str, int]:
    """Makes the task of a random table. Returns fault, bad_rows, task, error, training rows."""
    draw = random.Random(seed)
    name = draw.choice(list(FAULTS))
    suffix = draw.choice(['.tsv', '.csv', '.jsonl'] if 'header' not in name else ['.tsv', '.csv'])
    form = {
        'suffix': suffix,
        'delimiter': draw.choice([';', '|', ',']) if suffix == '.csv' else '\t',
        'header': suffix != '.jsonl' and draw.random() < 0.7,
        'end': draw.choice(['\n', '\r\n']),
        'packed': draw.choice(['', '', '.gz']),
    }
    classes = draw.choice(CLASSES + JSON_CLASSES if suffix == '.jsonl' else CLASSES)
    train, evaluation = (good_rows(draw, classes, start) for start in (0, 1000))
    FAULTS[name].apply(draw, train, evaluation)
    draw.shuffle(train)
    paths = [
        written(draw, folder, part, rows, form)
        for part, rows in (('train', train), ('dev', evaluation))
    ]
    data = DataConfig(
        source='files',
        train=paths[0],
        evaluation=paths[1],
        bad_rows=draw.choice(['stop', 'skip']),
        delimiter=form['delimiter'] if suffix == '.csv' else '',
        columns=() if form['header'] or suffix == '.jsonl' else ('text', 'label'),
    )
    try:
        task = classification.make_task(Config(data=data, model=ModelConfig()))
    except UserError as error:
        return name, data.bad_rows, None, str(error), len(train)
    return name, data.bad_rows, task, '', len(train)


def test_fuzzed_rows_are_refused_reported_or_read_as_they_are(tmp_path: Path) -> None:
    for seed in range(CASES):
        name, bad_rows, task, error, count = fuzzed_case(seed, tmp_path)
        fault, where = FAULTS[name], (seed, name, bad_rows, error)
        skips = fault.skipped and bad_rows == 'skip'
        if fault.refused and not skips:
            assert fault.refused in error, where
            assert len(error.splitlines()) == 1, where
            assert len(error) <= 400, where
            continue
        assert task, where
        assert len(task.train) == count - skips, where
        assert ('1 bad rows skipped' in task.summary) == skips, where
        assert ('skipped_rows.txt' in task.files) == skips, where
        warnings = [
            line for line in task.warnings if 'tokens are unknown' not in line or fault.warned
        ]
        assert bool(warnings) == bool(fault.warned), (where, task.warnings)
        assert any(fault.warned in line for line in task.warnings) or not fault.warned, where


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**70, -(2**70), 0.5, 2.0, -0.0, 1e300, 1e999, 1 + 0j),
    *('', ' ', '0', 'nan', '3e-3', 'adamw', 'files', '\0', '\ud800', 'x' * 5000, 'a\nb', b'x', ';'),
    *((), [], (1,), [3, 4], (4, 3), (3.0, 2.0), ('a',), ['a', 'b'], ('a', 1), (None,), ((3,),)),
    *({}, {'a': 1}, {3}, frozenset(), range(3, 9), object(), type, len, Config, ..., [[]], (True,)),
    *(np.int64(3), np.float32(0.5), np.float64('nan'), np.bool_(1), np.array([3, 4]), np.array(3)),
    *(np.str_('files'), pathlib.Path('a/b'), itertools.count(), fractions.Fraction(4, 2)),
    *(decimal.Decimal(3), float('nan'), NotImplemented),
    *('\0.tsv', '\ud800.csv', '/\0/*.tsv', '\ud800*.csv', '~nobody/a.tsv', f'{"x" * 5000}.jsonl'),
    *('.csv', '*', '**', '/*.tsv', '//.gz', 'a/../*.csv', '10%', '100%', '10%:', '10%:x.tsv'),
]


def problem_of(action: Callable[[], object]) -> str:
    """Returns the message of the UserError that an action raises, or ''."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ''


def test_fuzzed_options_are_refused_in_one_line_or_have_the_type_of_their_default(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)
    form = {'suffix': '.tsv', 'delimiter': '\t', 'header': True, 'end': '\n', 'packed': ''}
    file = written(draw, tmp_path, 'a', good_rows(draw, ['a', 'b'], 0), form)
    names = [name for name, _, _ in options(reviews.get_config())]
    defaults = to_dict(reviews.get_config())
    for _ in range(CASES):
        config: Any = reviews.get_config()
        config.data = DataConfig(source='files', train=file, evaluation=file)
        # Options of the data are read at once, and so are drawn more often.
        chosen = {
            draw.choice([draw.choice(names), f'data.{draw.choice(list(vars(config.data)))}']): value
            for value in draw.choices(ODD, k=draw.randint(1, 2))
        }
        for name, value in chosen.items():
            section, _, field = name.rpartition('.')
            setattr(getattr(config, section) if section else config, field, value)
        if problem := problem_of(functools.partial(schema.check, config)):
            assert any(problem.startswith(f'config.{name}') for name in (*chosen, 'data.name'))
            assert '\n' not in problem
            continue
        values = to_dict(config)
        assert json.loads(json.dumps(values)) == values, chosen
        assert {n: type(v) for n, v in values.items()} == {n: type(v) for n, v in defaults.items()}
        if config.data.source == 'files':
            problem_of(functools.partial(classification.make_task, config))
