"""The promises of input_pipeline/text_files.py."""

import csv
import dataclasses
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from errors import UserError
from tasks.classification import SEPARATOR, DataConfig, LabelledSplit, read_texts

GOOD = {
    '.tsv': 'sentence\tlabel\ngood film\tpos\nbad film\tneg\n',
    '.csv': 'sentence,label\ngood film,pos\nbad film,neg\n',
    '.jsonl': (
        '{"sentence": "good film", "label": "pos"}\n{"sentence": "bad film", "label": "neg"}\n'
    ),
}


class TextDataset(NamedTuple):
    """What a run reads: texts and label indices of two splits, and the labels' names."""

    train: LabelledSplit
    evaluation: LabelledSplit
    label_names: tuple[str, ...]


def read_files(train: Path, evaluation: Path, *text_features: str) -> TextDataset:
    """Reads two files as a run does."""
    data = DataConfig(
        source='files', train=str(train), evaluation=str(evaluation), text_features=text_features
    )
    return TextDataset(*read_texts(data))


def read(
    folder: Path, suffix: str, train: str | bytes, evaluation: str | bytes = b''
) -> TextDataset:
    """Reads `train` and `evaluation` (by default `train` again) as files of one format."""
    paths = [folder / f'train{suffix}', folder / f'eval{suffix}']
    for path, contents in zip(paths, [train, evaluation or train], strict=True):
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return read_files(*paths, 'sentence')


def refusal(folder: Path, suffix: str, train: str | bytes, evaluation: str | bytes = b'') -> str:
    """Returns the error that reading raises, without the folder of its file."""
    with pytest.raises(UserError) as caught:
        read(folder, suffix, train, evaluation)
    (message,) = str(caught.value).splitlines()
    return message.removeprefix(f'{folder}{os.sep}')


@pytest.mark.parametrize('suffix', GOOD)
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    dataset = read(tmp_path, suffix, GOOD[suffix])
    assert dataset.label_names == ('neg', 'pos')
    for texts, labels, *_ in (dataset.train, dataset.evaluation):
        assert texts == ['good film', 'bad film']
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, [1, 0])


@pytest.mark.parametrize('suffix', GOOD)
@pytest.mark.parametrize(
    'change',
    [
        lambda text: b'\xef\xbb\xbf' + text.encode(),
        lambda text: text.replace('\n', '\r\n').encode(),
        lambda text: ('\n  \n' + text.replace('\n', '\n\n') + ' \n').encode(),
        lambda text: text.rstrip('\n').encode(),
        lambda text: text.replace('label', ' label ', text[0] != '{').encode(),
    ],
    ids=['byte order mark', 'carriage returns', 'blank lines', 'no last line end', 'spaced header'],
)
def test_harmless_variants_of_a_file_change_nothing(
    tmp_path: Path, suffix: str, change: Callable[[str], bytes]
) -> None:
    dataset = read(tmp_path, suffix, change(GOOD[suffix]))
    assert dataset.train[0] == ['good film', 'bad film']
    assert dataset.label_names == ('neg', 'pos')


def test_suffix_counts_in_either_case(tmp_path: Path) -> None:
    assert read(tmp_path, '.TSV', GOOD['.tsv']).label_names == ('neg', 'pos')


def test_lone_double_quote_in_tsv_is_an_ordinary_character(tmp_path: Path) -> None:
    dataset = read(tmp_path, '.tsv', 'sentence\tlabel\n"a film\t1\na 5" disk\t0\n')
    assert dataset.train[0] == ['"a film', 'a 5" disk']


def test_csv_quotes_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    dataset = read(tmp_path, '.csv', 'sentence,label\n"a, ""b""\n\nc",1\nd,0\n')
    assert dataset.train[0] == ['a, "b"\n\nc', 'd']


@pytest.mark.parametrize('suffix', GOOD)
def test_line_separators_of_unicode_stay_inside_a_text(tmp_path: Path, suffix: str) -> None:
    dataset = read(tmp_path, suffix, GOOD[suffix].replace('good ', 'good\u2028\x85'))
    assert dataset.train[0][0] == 'good\u2028\x85film'


@pytest.mark.parametrize('suffix', GOOD)
def test_very_long_texts_are_read_whole(tmp_path: Path, suffix: str) -> None:
    long = 'word ' * 100_000 + 'end'
    limit = csv.field_size_limit(131_072)
    try:
        dataset = read(tmp_path, suffix, GOOD[suffix].replace('good', long))
    finally:
        csv.field_size_limit(limit)
    assert dataset.train[0][0] == f'{long} film'


def test_integer_labels_sort_as_numbers_and_others_as_text(tmp_path: Path) -> None:
    numbers = read(tmp_path, '.tsv', 'sentence\tlabel\na\t10\nb\t9\nc\t-2\n')
    assert numbers.label_names == ('-2', '9', '10')
    np.testing.assert_array_equal(numbers.train[1], [2, 1, 0])
    with pytest.raises(UserError, match=r"train.tsv:3: label '01', but .*train.tsv:2 has '1'"):
        read(tmp_path, '.tsv', 'sentence\tlabel\na\t1\nb\t01\nc\t001\nd\t0001\n')
    mixed = read(tmp_path, '.tsv', 'sentence\tlabel\na\t10\nb\t9\nc\tx\n')
    assert mixed.label_names == ('10', '9', 'x')


@pytest.mark.parametrize(
    ('labels', 'names'),
    [
        ((10, 9, '9', 9), ('9', '10')),
        ((True, False, 'true'), ('false', 'true')),
        ((1.5, -0.5, 10.0, '1.5'), ('-0.5', '1.5', '10.0')),
    ],
)
def test_json_labels_may_be_numbers_and_truth_values(
    tmp_path: Path, labels: tuple[object, ...], names: tuple[str, ...]
) -> None:
    lines = [json.dumps({'sentence': 'a', 'label': label}) for label in labels]
    dataset = read(tmp_path, '.jsonl', '\n'.join(lines))
    assert dataset.label_names == names
    found = [names[label] for label in dataset.train[1]]
    assert found == [label if isinstance(label, str) else json.dumps(label) for label in labels]


def test_json_labels_that_mix_truth_values_and_numbers_are_refused(tmp_path: Path) -> None:
    lines = [json.dumps({'sentence': 'a', 'label': label}) for label in (True, False, -1, 2, 1)]
    assert read(tmp_path, '.jsonl', '\n'.join(lines[:4])).label_names == (
        '-1',
        '2',
        'false',
        'true',
    )
    message = refusal(tmp_path, '.jsonl', '\n'.join(lines))
    assert message.startswith("train.jsonl:5: label '1', but ")
    assert "train.jsonl:1 has 'true'" in message


def test_json_values_are_found_inside_other_objects(tmp_path: Path) -> None:
    records = [
        {'review': {'body': {'text': ' good film '}}, 'meta': {'stars': 5}},
        {
            'review': {'body.text': 'bad film', 'body': {'text': ''}},
            'meta.stars': 1,
            'meta': 5,
        },  # a name with a dot comes first
    ]
    path = tmp_path / 'a.jsonl'
    path.write_text('\n'.join(map(json.dumps, records)))
    options = {'source': 'files', 'train': str(path), 'evaluation': str(path)}
    data = DataConfig(**options, text_features=('review.body.text',), label_feature='meta.stars')
    dataset = TextDataset(*read_texts(data))
    assert dataset.train.texts == ['good film', 'bad film']
    assert dataset.label_names == ('1', '5')
    for name, problem in {
        'review.bdy.text': f"{path}:1, in 'review': key 'bdy.text' is not among ['body']",
        'revew.body': f"{path}:1: key 'revew.body' is not among ['review', 'meta']",
        'meta.stars.low': f"{path}:1, in 'meta': key 'stars.low' is not among ['stars']; did",
        'review': f"{path}:1: 'review' is {{'body': {{'text': ",
    }.items():
        with pytest.raises(UserError) as caught:
            read_texts(DataConfig(**options, text_features=(name,), label_feature='meta.stars'))
        assert str(caught.value).startswith(problem)


def test_json_values_are_found_inside_lists_as_label_studio_nests_them(tmp_path: Path) -> None:
    path = tmp_path / 'a.jsonl'
    choices = {'good film': ['pos'], 'bad film': ['neg'], 'no answer': []}
    lines = [
        {'data': {'text': text}, 'annotations': [{'result': [{'value': {'choices': answer}}]}]}
        for text, answer in choices.items()
    ]
    path.write_text('\n'.join(map(json.dumps, lines)))
    data = DataConfig(
        source='files',
        train=str(path),
        evaluation=str(path),
        text_features=('data.text',),
        label_feature='annotations.0.result.0.value.choices.0',
    )
    with pytest.raises(UserError, match=r"a\.jsonl:3, .* in 'choices': key '0' is not among \[\]"):
        read_texts(data)
    dataset = TextDataset(*read_texts(dataclasses.replace(data, bad_rows='skip')))
    assert dataset.train.texts == ['good film', 'bad film']
    assert dataset.label_names == ('neg', 'pos')


@pytest.mark.parametrize('delimiter', [';', '|', ' ', '~', '\u00a6'])
@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.csv.gz'])
def test_tables_may_have_another_delimiter(tmp_path: Path, suffix: str, delimiter: str) -> None:
    rows = [['sentence', 'label'], ['so, so; | "good"\tfilm', 'pos'], ['bad', 'neg']]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    path = tmp_path / f'a{suffix}'
    contents = text.getvalue().encode()
    path.write_bytes(gzip.compress(contents) if suffix.endswith('.gz') else contents)
    options = {'source': 'files', 'train': str(path), 'evaluation': str(path)}
    data = DataConfig(**options, text_features=('sentence',), delimiter=delimiter)
    assert read_texts(data)[0].texts == [rows[1][0], 'bad']
    with pytest.raises(UserError, match=r'config\.data.*\.delimiter'):
        read_texts(dataclasses.replace(data, delimiter=''))


def test_label_indices_come_from_the_training_file(tmp_path: Path) -> None:
    dataset = read(tmp_path, '.tsv', GOOD['.tsv'], 'sentence\tlabel\na\tpos\n')
    np.testing.assert_array_equal(dataset.evaluation[1], [1])


def test_text_features_are_joined_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / 'pairs.tsv'
    path.write_text('label\tpremise\tid\thypothesis\n0\t a \t7\tb\n1\tc\t8\td\n')
    dataset = read_files(path, path, 'premise', 'hypothesis')
    assert dataset.train[0] == [f'a{SEPARATOR}b', f'c{SEPARATOR}d']


@pytest.mark.parametrize('blank', ['', ' ', '\u200b', '\u3164'])
def test_row_needs_some_text_in_one_of_its_features(tmp_path: Path, blank: str) -> None:
    path = tmp_path / 'pairs.tsv'
    path.write_text(f'title\tbody\tlabel\na\t{blank}\t1\n{blank}\tb\t0\n')
    texts = read_files(path, path, 'title', 'body').train.texts
    assert texts == [f'a{SEPARATOR}{blank.strip()}', f'{blank.strip()}{SEPARATOR}b']
    with pytest.raises(UserError, match=r"pairs.tsv:2: 'body' is empty"):
        read_files(path, path, 'body')
    with path.open('a') as file:
        file.write(f'{blank}\t{blank}\t0\n')
    with pytest.raises(UserError, match=r"pairs.tsv:4: 'title' and 'body' is empty"):
        read_files(path, path, 'title', 'body')


def test_files_of_two_formats_can_be_combined(tmp_path: Path) -> None:
    train, evaluation = tmp_path / 'train.csv', tmp_path / 'eval.jsonl'
    train.write_text(GOOD['.csv'])
    evaluation.write_text(GOOD['.jsonl'])
    dataset = read_files(train, evaluation, 'sentence')
    assert dataset.train[0] == dataset.evaluation[0]


HEADER = 'sentence\tlabel\n'


@pytest.mark.parametrize(
    ('suffix', 'contents', 'message'),
    [
        ('.tsv', '', 'train.tsv: no examples'),
        ('.jsonl', '\n', 'train.jsonl: no examples'),
        ('.csv', 'sentence,label\n', 'train.csv: no examples'),
        ('.tsv', 'sentense\tlabel\n', "train.tsv:1: column 'sentence' is not among ['sentense'"),
        ('.tsv', 'sentense\tlabel\n', "; did you mean 'sentense'?"),
        ('.csv', '\nsentence,label,label\n', "train.csv:2: column 'label' occurs twice"),
        ('.tsv', f'{HEADER}a\t0\nb\n', 'train.tsv:3: 1 column(s), expected 2: '),
        ('.tsv', f'{HEADER}a\t0\nb\t1\t2\n', "train.tsv:3: 3 column(s), expected 2: ['sentence'"),
        ('.csv', 'sentence,label\n"a\nb",0\nc\n', 'train.csv:4: 1 column(s), expected 2'),
        ('.csv', 'sentence,label\na,0\n"b,1\nc,0\n', 'train.csv:3: unexpected end of data'),
        ('.csv', 'sentence,label\n"a"b,0\n', "train.csv:2: ',' expected after"),
        ('.tsv', f'{HEADER}a\t \n', "train.tsv:2: 'label' is '', which marks a missing label"),
        ('.tsv', f'{HEADER} \t1\n', "train.tsv:2: 'sentence' is empty, expected some text"),
        ('.tsv', f'{HEADER}a\t1\nb\t1\n', "train.tsv: only label '1', expected two or more"),
        (
            '.tsv',
            b'\xef\xbb\xbfsentence\tlabel\na\t\xff\n',
            'train.tsv:2: bytes that are not UTF-8',
        ),
        ('.tsv', f'{HEADER}a\0b\t1\n', 'train.tsv:2: a NUL byte'),
        ('.jsonl', '\n{"sentence"\n', 'train.jsonl:2: invalid JSON (Expecting'),
        ('.jsonl', '[' * 100_000, 'train.jsonl:1: invalid JSON'),
        ('.jsonl', '[' * 900 + ']' * 900, 'train.jsonl:1: [[[[[['),
        ('.jsonl', '{"label": ' + '1' * 5000 + '}', 'train.jsonl:1: invalid JSON'),
        ('.jsonl', '{"label": 1, "label": 2}', 'train.jsonl:1: invalid JSON (one of the keys'),
        ('.jsonl', '["a", 1]\n', "train.jsonl:1: ['a', 1], expected a JSON object"),
        ('.jsonl', '{"label": 1}\n', "train.jsonl:1: key 'sentence' is not among ['label']"),
        ('.jsonl', '{"sentence": 5, "label": 1}\n', "train.jsonl:1: 'sentence' is 5, expected"),
        ('.jsonl', r'{"sentence": "\ud800", "label": 1}', r"train.jsonl:1: 'sentence' is '\ud800'"),
        ('.jsonl', r'{"sentence": "a", "label": "\u0000"}', r"train.jsonl:1: 'label' is '\x00'"),
    ],
)
def test_refusal_names_file_line_and_finding(
    tmp_path: Path, suffix: str, contents: str | bytes, message: str
) -> None:
    assert message in refusal(tmp_path, suffix, contents)


def test_wrong_suffix_is_refused_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, '.txt', '')
    expected = "train.txt: suffix '.txt', expected .tsv, .csv or .jsonl"
    assert str(caught.value) == f'config.data.train: {tmp_path}/{expected}'


@pytest.mark.parametrize('label', ['null', '[1]', '{}', 'NaN', '-Infinity', '1e999', '""'])
def test_json_label_that_is_none_is_refused(tmp_path: Path, label: str) -> None:
    message = refusal(tmp_path, '.jsonl', f'{{"sentence": "a", "label": {label}}}')
    assert message.startswith("train.jsonl:1: 'label' is ")


def test_unknown_evaluation_label_names_line_and_known_labels(tmp_path: Path) -> None:
    message = refusal(tmp_path, '.tsv', GOOD['.tsv'], f'{HEADER}a\tpos\nb\tposs\n')
    assert message == "eval.tsv:3: label 'poss' is not among ['neg', 'pos']; did you mean 'pos'?"


def test_faulty_values_are_shown_in_brief(tmp_path: Path) -> None:
    many = ''.join(f'a\tlabel {index}\n' for index in range(5000))
    assert len(refusal(tmp_path, '.tsv', HEADER + many, f'{HEADER}a\t{"b" * 5000}\n')) < 500


@pytest.mark.parametrize(
    ('name', 'reason'), [('absent.tsv', 'no such file'), ('a.tsv', 'cannot be read (Is a dir')]
)
def test_unreadable_path_is_named_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / 'a.tsv').mkdir()
    path = tmp_path / name
    with pytest.raises(UserError) as caught:
        read_files(path, path, 'sentence')
    assert str(caught.value).startswith(f'{path}: {reason}')


def test_file_without_permission_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> bytes:  # Rather than chmod, which does not bind the superuser.
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(type(epath.Path(tmp_path)), 'read_bytes', deny)
    assert refusal(tmp_path, '.tsv', GOOD['.tsv']).startswith(
        'train.tsv: cannot be read (Permission'
    )


# Mostly bytes that mean something in one of the formats, so that many files get past the header.
WORDS = rb'sentence label , " { } [ a 1 \ud800 {"sentence": "label":'.split()
MARKS = [b'\t', b'\n', b'\r', b' ', b'\0', b'\xff', b'\xef\xbb\xbf', b'\xe2\x80\xa8']
fragments = st.lists(st.sampled_from(WORDS + MARKS), max_size=20).map(b''.join)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    suffix=st.sampled_from(list(GOOD)),
    start=st.booleans(),
    contents=st.one_of(st.binary(max_size=60), fragments),
)
@example(suffix='.csv', start=True, contents=b'a\rb,1\r"c\r\nd",2')
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path: Path, suffix: str, start: bool, contents: bytes
) -> None:
    if start:
        contents = GOOD[suffix].encode() + contents
    try:
        dataset = read(tmp_path, suffix, contents)
    except UserError as error:
        message = str(error)
    else:
        assert len(dataset.train[0]) == len(dataset.train[1]) > 1
        return
    assert len(message.splitlines()) == 1
