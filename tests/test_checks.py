"""Nothing meaningless passes in silence: bad data is refused, odd data is reported."""

import dataclasses
import gzip
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from etils import epath

import train
from configs.schema import Config
from errors import UserError
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from tasks.task import Task
from tests.test_resume import small_config

Cells = list[tuple[str, str]]  # text, label
GOOD: Cells = [('good film', 'pos'), ('bad film', 'neg')] * 50


def table(path: Path, cells: Iterable[tuple[str, object]]) -> str:
    """Writes texts and labels as a table, and returns its path."""
    path.write_text('text\tlabel\n' + ''.join(f'{text}\t{label}\n' for text, label in cells))
    return str(path)


def make_task(folder: Path, train: Cells, evaluation: Cells = GOOD, /, **options: Any) -> Task:
    """Makes the task that a run on these texts would have."""
    paths = {
        'train': table(folder / 'train.tsv', train),
        'evaluation': table(folder / 'dev.tsv', evaluation),
    }
    data = DataConfig(**({'source': 'files'} | paths | options))
    return classification.make_task(Config(data=data, model=ModelConfig()))


def refusal(folder: Path, train: Cells, /, **options: Any) -> str:
    """Returns the one line that the texts are refused with, without the folder."""
    with pytest.raises(UserError) as caught:
        make_task(folder, train, **options)
    (message,) = str(caught.value).splitlines()
    assert len(message) <= 400
    return message.replace(f'{folder}/', '')


INVISIBLE = ['\u200b', '\u2800', '\u3164', 'n\u200ban']

# Labels


@pytest.mark.parametrize(
    ('first', 'second'),
    [
        ('Pos', 'pos'),
        ('very good', 'very  good'),
        ('pos', 'p\u200bos'),  # a zero-width space
        ('pos', 'pos\ufeff.'[:-1]),
        ('caf\u00e9', 'cafe\u0301'),  # composed and decomposed
        ('ﬁne', 'fine'),
        ('a\u00a0b', 'a b'),
        ('1', '1.0'),
        ('7', '007'),
        ('100', '1e2'),
        ('True', 'true'),
        ('pos', "'pos'"),
        ('pos', '“pos”'),
        ('pos', 'pos.'),
        ('pos', 'pos ;'),
        ('❤', '❤\ufe0f'),
        ('a b', 'a\u3164b'),
        ('\uff50os', 'POS'),
        ('1.', '+1'),
        ('1', '\uff11'),
        ('٣', '3.0'),
        ('x' * 5000, 'X' * 5000),
        ('true', '1'),
        ('0.0', 'False'),
    ],
)
def test_two_spellings_of_a_label_are_refused_with_both_lines(
    tmp_path: Path, first: str, second: str
) -> None:
    message = refusal(tmp_path, [('a', first), ('b', 'other'), ('c', first), ('d', second)])
    assert message.startswith('train.tsv:5: label ')
    assert 'but train.tsv:2 has ' in message
    assert message.endswith('expected one spelling of a label')


def test_labels_that_differ_by_more_than_spelling_are_classes(tmp_path: Path) -> None:
    names = [
        '1',
        '-2',
        '1.5',
        '10',
        '1_0',
        'a',
        'á',
        '+',
        '-',
        'c',
        'c++',
        '❤',
        '1/2',
        '.',
        ',',
        ':)',
        ';)',
        '99999999999999999',
    ]
    names += ['99999999999999998', '1e999999', '1e999998']
    task = make_task(tmp_path, [(f'w w w {n}', n) for n in names] * 2, [('w', 'a')])
    assert task.resume_facts['label_names'] == sorted(names)


@pytest.mark.parametrize(
    'label',
    [
        'nan',
        'NaN',
        '-nan',
        'NA',
        'n/a',
        '#N/A',
        '<NA>',
        'null',
        'inf',
        '-Infinity',
        '"NA"',
        '',
        *INVISIBLE,
    ],
)
def test_missing_labels_are_refused_with_their_line(tmp_path: Path, label: str) -> None:
    for spelled in (label, f' {label}\u00a0'):
        cells = [*GOOD, ('x', spelled)]
        assert refusal(tmp_path, cells).startswith("train.tsv:102: 'label' is ")
    task = make_task(tmp_path, cells, bad_rows='skip')
    assert task.resume_facts['label_names'] == ['neg', 'pos']


@pytest.mark.parametrize(
    ('labels', 'missing'),
    [
        (['0', '1', '-1'], ['-1']),
        (['0', '1', '2', '-1'], ['-1']),
        (['0.0', '1.0', '-1.0'], ['-1.0']),
        (['0', '1', '-1', 'nan'], ['-1', 'nan']),
        (['-1', '1'], []),
        (['-2', '-1', '0', '1', '2'], []),
        (['-1', '-0.5', '0', '0.5'], []),
        (['-1', 'a', 'b'], []),
        (['-1', '0', 'neutral'], []),
    ],
)
def test_minus_one_is_a_missing_label_only_beside_numbers_from_zero(
    tmp_path: Path, labels: list[str], missing: list[str]
) -> None:
    classes = sorted(set(labels) - set(missing))
    cells = [(f'film {name}', name) for name in labels] * 5
    task = make_task(tmp_path, cells, [('film', classes[0])], bad_rows='skip')
    assert sorted(task.resume_facts['label_names']) == classes
    if missing:
        line = 2 + labels.index(missing[0])
        assert refusal(tmp_path, cells).startswith(f"train.tsv:{line}: 'label' is '{missing[0]}'")


@pytest.mark.parametrize(
    'target',
    [str, '{:x}.'.format, lambda n: f'{n / 7:.3f}', lambda n: f'id {n}', lambda n: n % 30 / 7],
)
def test_an_amount_is_not_taken_for_classes(tmp_path: Path, target: Any) -> None:
    cells = [(f'a b c {n}', str(target(n))) for n in range(60)]
    assert 'rows, expected classes; is this another column' in refusal(tmp_path, cells)
    few = [(f'a b c {n}', str(n % 30)) for n in range(90)]
    assert len(make_task(tmp_path, few, few).resume_facts['label_names']) == 30
    halves = [(f'a b c {n}', str(n % 20 / 2)) for n in range(90)]  # stars, for instance
    names = make_task(tmp_path, halves, halves).resume_facts['label_names']
    assert names == [str(n / 2) for n in range(20)]


def test_classes_are_counted_and_rare_ones_reported(tmp_path: Path) -> None:
    task = make_task(tmp_path, [*GOOD, *[('a poor film', 'bad')] * 4])
    assert "3 classes {'bad': 4, 'neg': 50, 'pos': 50}" in task.summary
    (warning,) = (line for line in task.warnings if 'classes' in line)
    assert warning.startswith('1 of 3 classes have fewer than 5 rows or under 1% of the')
    assert "{'bad': 4}" in warning
    many = [*GOOD * 10, *[('a poor film', 'bad')] * 9]  # under 1%
    assert any("{'bad': 9}" in line for line in make_task(tmp_path, many).warnings)
    assert not any('classes' in line for line in make_task(tmp_path, GOOD).warnings)


def test_an_accuracy_that_one_answer_reaches_is_doubted(tmp_path: Path) -> None:
    doubts = make_task(tmp_path, GOOD, [*GOOD[:8], ('film', 'neg'), ('a film', 'neg')]).doubts
    assert not list(doubts({'accuracy': 0.61}))
    for accuracy in (0.0, 0.5, 0.6):
        assert list(doubts({'accuracy': accuracy})) == [
            f"accuracy {accuracy:.1%} is no better than answering 'neg' to every text, which is "
            'right for 60.0% of the evaluation examples'
        ]
    assert list(make_task(tmp_path, GOOD, [('film', 'pos')] * 9).doubts({'accuracy': 1.0}))


# Texts


def test_a_label_that_is_read_as_text_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD, text_features=('text', 'label')).startswith(
        "config.data.text_features: 'label' is the label; expected"
    )


def test_texts_in_both_splits_and_texts_with_two_labels_are_counted(tmp_path: Path) -> None:
    train = [*GOOD, ('good film', 'neg')]
    warnings = make_task(tmp_path, train, [('good film', 'pos'), ('new film', 'neg')]).warnings
    assert "1 of 2 evaluation examples are in the training split too, such as 'good film'" in str(
        warnings
    )
    assert "1 training texts have more than one label, such as 'good film'" in str(warnings)
    assert not make_task(tmp_path, GOOD, [('film', 'pos'), ('good bad', 'neg')]).warnings


def test_unknown_words_of_both_splits_are_reported(tmp_path: Path) -> None:
    train = [*GOOD, ('a b c d e', 'pos')]
    task = make_task(tmp_path, train, [('GOOD FILM , film', 'pos')] * 9, tokenizer='words')
    assert '2.4% of training and 75.0% of evaluation tokens unknown' in task.summary
    assert [line for line in task.warnings if 'unknown' in line] == [
        '75% of the evaluation tokens are unknown to the vocabulary: do both splits have one '
        'language, case and spacing? (config.data.min_frequency, .tokenizer)'
    ]


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    cells = [(f'word{n} other{n}', 'neg' if n % 2 else 'pos') for n in range(40)]
    assert refusal(tmp_path, cells).startswith(
        'config.data.min_frequency = 3: no token occurs that'
    )
    assert make_task(tmp_path, cells, cells, min_frequency=1)
    assert make_task(tmp_path, cells, cells, affixes=(3, 2))  # 'wor' and 'oth' are known


def test_prediction_notes_unknown_words_and_cut_texts() -> None:
    config = dataclasses.replace(small_config(), data=DataConfig(bucket_lengths=(8,)))
    facts = {'vocabulary': ['film', 'good'], 'label_names': ['neg', 'pos'], 'affixes': []}
    notes = classification.make_predictor(config, facts).notes
    assert notes('a good film') == {'unknown': pytest.approx(1 / 3), 'cut': False}
    assert notes('good ' * 6) == {'unknown': 0.0, 'cut': False}
    assert notes('good ' * 7) == {'unknown': 0.0, 'cut': True}


# Files


def test_a_second_header_line_is_refused_or_skipped(tmp_path: Path) -> None:
    cells = [*GOOD, ('text', 'label'), *GOOD]
    assert refusal(tmp_path, cells).startswith('train.tsv:102: the header line again')
    for row in (('Text', 'Label'), ('label', 'text')):
        assert 'train.tsv:102: the header' in refusal(tmp_path, [*GOOD, row])
    task = make_task(tmp_path, cells, bad_rows='skip')
    assert task.summary.startswith('200 training and 100 evaluation examples, 1 bad rows skipped')


def test_bad_rows_are_skipped_and_listed_if_asked_for(tmp_path: Path) -> None:
    cells = [*GOOD, ('', 'pos'), ('x', ''), ('a\tb', 'pos'), ('x', 'nan'), ('\u200b', 'neg')]
    assert refusal(tmp_path, cells).startswith('train.tsv:104: 3 column(s), expected 2')
    assert refusal(tmp_path, cells[:102]).startswith("train.tsv:102: 'text' is empty")
    task = make_task(tmp_path, cells, bad_rows='skip')
    assert task.summary.startswith('100 training and 100 evaluation examples, 5 bad rows skipped')
    listed = task.files['skipped_rows.txt'].splitlines()
    lines = [line.replace(f'{tmp_path}/train.tsv:', '').partition(':')[0] for line in listed]
    assert sorted(lines) == ['102', '103', '104', '105', '106']
    assert 'skipped_rows.txt' not in make_task(tmp_path, GOOD, bad_rows='skip').files
    lines = ['{"text": "good film", "label": "pos"}', '{', '[]', '{"text": "a"}']
    (tmp_path / 'a.jsonl').write_text('\n'.join([*lines * 3, lines[0].replace('pos', 'neg')]))
    task = make_task(tmp_path, GOOD, train=str(tmp_path / 'a.jsonl'), bad_rows='skip')
    assert task.summary.startswith('4 training and 100 evaluation examples, 9 bad rows skipped')


def test_a_file_of_bad_rows_alone_shows_the_first_problem(tmp_path: Path) -> None:
    message = refusal(tmp_path, [('', 'pos'), ('', 'neg')], bad_rows='skip')
    assert message.startswith('train.tsv: no usable row; the first problem: train.tsv:2: ')


def test_columns_of_a_file_without_a_header_are_named_by_the_config(tmp_path: Path) -> None:
    file = tmp_path / 'a.csv'
    file.write_text('"3","Shares rise","Stocks, ""up"""\n"1","Vote","Polls open"\n' * 9)
    options: dict[str, Any] = {'train': str(file), 'evaluation': str(file)}
    options |= {'text_features': ('title', 'body'), 'label_feature': 'class'}
    message = refusal(tmp_path, GOOD, **options)
    assert message.startswith("a.csv:1: column 'title' is not among ['3', 'Shares rise'")
    assert 'without a header line set config.data.columns' in message
    options['columns'] = ('class', 'title', 'body')
    task = make_task(tmp_path, GOOD, **options)
    assert len(task.train) == 18
    assert task.resume_facts['label_names'] == ['1', '3']
    options['columns'] = ('class', 'title')
    assert refusal(tmp_path, GOOD, **options).startswith("config.data.columns: column 'body' is")
    options['columns'] = ('class', 'title', 'body', 'more')
    assert 'a.csv:1: 3 column(s), expected 4' in refusal(tmp_path, GOOD, **options)


@pytest.mark.parametrize('suffix', ['.tsv', '.csv', '.jsonl'])
def test_gzip_files_are_read_as_their_contents(tmp_path: Path, suffix: str) -> None:
    row = '{"text": "%s", "label": "%s"}' if suffix == '.jsonl' else '%s,%s'
    lines = [] if suffix == '.jsonl' else ['text,label']
    text = '\n'.join([*lines, *(row % cells for cells in GOOD)])
    text = text.replace(',', '\t') if suffix == '.tsv' else text
    plain, packed = tmp_path / f'a{suffix}', tmp_path / f'b{suffix}.gz'
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    tasks = [make_task(tmp_path, GOOD, train=str(path)) for path in (plain, packed)]
    assert tasks[0].resume_facts == tasks[1].resume_facts
    whole = packed.read_bytes()
    for problem, contents in {
        'Compressed file ended': whole[: len(whole) // 2],
        'Error -3 while': whole[:10] + b'\xff' * 20,
        'CRC check failed': whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        'Not a gzipped file': b'plain',
    }.items():
        packed.write_bytes(contents)
        message = refusal(tmp_path, GOOD, train=str(packed))
        assert message.startswith(f'b{suffix}.gz: cannot be read ({problem}')


def test_several_files_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name, cells in (('b', GOOD[:3]), ('a', GOOD[3:]), ('c', [('a', 'neg')] * 2)):
        table(tmp_path / f'part-{name}.tsv', cells)
    one = make_task(tmp_path, [*GOOD[3:], *GOOD[:3], *[('a', 'neg')] * 2])
    pattern = str(tmp_path / 'part-*.tsv')
    assert make_task(tmp_path, GOOD, train=pattern).resume_facts == one.resume_facts
    table(tmp_path / 'part-c.tsv', [('a', 'neg'), ('a', '')])
    assert refusal(tmp_path, GOOD, train=pattern).startswith("part-c.tsv:3: 'label' is ''")
    for empty in ('', 'text\tlabel\n'):
        (tmp_path / 'part-c.tsv').write_text(empty)
        assert refusal(tmp_path, GOOD, train=pattern).startswith(
            'part-c.tsv: no examples, expected'
        )
        skipped = make_task(tmp_path, GOOD, train=pattern, bad_rows='skip')
        assert 'part-c.tsv: no examples' in skipped.files['skipped_rows.txt']
    for folder in ('x', 'y'):
        (tmp_path / folder).mkdir()
        table(tmp_path / folder / 'train.tsv', GOOD)
    twice = make_task(tmp_path, GOOD, train=str(tmp_path / '*' / 'train.tsv'))
    assert twice.resume_facts == make_task(tmp_path, GOOD * 2).resume_facts
    absent = str(tmp_path / 'port-*.tsv')
    assert refusal(tmp_path, GOOD, train=absent) == 'config.data.train: port-*.tsv: no such files'


QUOTED = '"she said ""hi"" and left"\t"pos"\nplain words\tpos\n"a tab\tinside"\tneg\n'


def quoted_texts(folder: Path, contents: str) -> list[str]:
    """Reads the texts of a .tsv file without its header line."""
    file = folder / 'q.tsv'
    file.write_text(f'text\tlabel\n{contents}')
    data = DataConfig(source='files', train=str(file), evaluation=str(file))
    return classification.read_texts(data)[0].texts


def test_quoted_cells_of_a_tsv_file_are_read_as_spreadsheets_write_them(tmp_path: Path) -> None:
    assert quoted_texts(tmp_path, QUOTED) == [
        'she said "hi" and left',
        'plain words',
        'a tab\tinside',
    ]
    assert quoted_texts(tmp_path, '"two\nlines"\tpos\n"x"\tneg\n') == ['two\nlines', 'x']


def test_quotes_of_sentences_in_a_tsv_file_stay(tmp_path: Path) -> None:
    contents = '"Brilliant", said everyone.\tpos\n"Bad\tneg\n5" disk\tneg\n'
    assert quoted_texts(tmp_path, contents) == ['"Brilliant", said everyone.', '"Bad', '5" disk']


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        (f'{QUOTED}"Good", he said\tpos\n', "q.tsv:5: '\t' expected after '\"'"),
        ('a\tpos\n"b\tneg\nc"\tpos\nd\tneg\n', 'q.tsv:3: a double quote that closes on a later'),
    ],
)
def test_quotes_that_can_be_read_in_two_ways_are_refused(
    tmp_path: Path, contents: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        quoted_texts(tmp_path, contents)
    assert message in str(caught.value)


@pytest.mark.slow
def test_warnings_are_logged_at_both_ends_and_files_may_move_but_not_change_before_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: int, train_cells: Cells, name: str) -> Any:
        data = DataConfig(
            source='files',
            train=table(tmp_path / name, train_cells),
            evaluation=table(tmp_path / f'eval_{name}', GOOD[:1]),  # of one class
            bucket_lengths=(8,),
        )
        config = dataclasses.replace(small_config(), num_steps=steps, data=data)
        config.optimizer.decay_steps = 8
        return train.train(config, epath.Path(tmp_path / 'run'))

    with caplog.at_level(logging.WARNING):
        run(2, GOOD, 'a.tsv')
    shared = [m for m in caplog.messages if 'examples are in the training split too' in m]
    assert len(shared) == 2  # at the start, and beside the result
    assert [m for m in caplog.messages if 'is no better than answering' in m]
    assert run(4, GOOD, 'b.tsv')['step'] == 4
    with pytest.raises(UserError, match=r'training_data: .* -> '):
        run(6, [*GOOD, ('a good film', 'neg')], 'b.tsv')
