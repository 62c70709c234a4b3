"""The promises of tools/predict.py: a checkpoint is all it needs, and it agrees with evaluation."""

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import UserError
from input_pipeline import reviews
from tasks import classification
from tasks.classification import DataConfig
from tests import runs
from tests.test_resume import small_config
from tools import predict
from tools.predict import Text

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]
TEXTS = ['it is wonderful .', 'i hated it', 'a "quoted" word, and a comma']


def predicted(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    """Returns what the command prints."""
    capsys.readouterr()
    assert predict.main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Returns the one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        predict.main(argv)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    return line


def test_labels_of_the_evaluation_split_are_right_as_often_as_evaluation_said(
    classifier_run: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, summary = classifier_run
    monkeypatch.setattr(predict, 'ROWS', 16)  # several batches, the last one partial
    data = small_config().data
    _, (texts, labels) = reviews.make_reviews(data.num_train, data.num_eval)
    (tmp_path / 'texts').write_text('\n'.join(texts) + '\n')
    monkeypatch.chdir(run.parent)  # a relative path
    found = predicted(capsys, run.name, '--input', str(tmp_path / 'texts'))
    assert [line['text'] for line in found] == texts
    right = [
        line['label'] == reviews.LABEL_NAMES[label]
        for line, label in zip(found, labels, strict=True)
    ]
    assert sum(right) == round(summary['eval']['accuracy'] * len(labels))
    for line in found:
        assert sum(line['probabilities'].values()) == pytest.approx(1, abs=2e-6)
        assert max(line['probabilities'], key=line['probabilities'].get) == line['label']
        assert len(line['attention']) == min(len(line['text'].split()), 40)
        assert 0 < sum(weight for _, weight in line['attention']) < 1  # the marks have the rest


def test_columns_of_every_format_give_the_predictions_of_the_texts(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(classifier_run[0])
    expected = predicted(capsys, run, *(f'--text={text}' for text in TEXTS))
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    contents = {
        'a.tsv': 'label\ttext\n' + ''.join(f'x\t{text}\n' for text in TEXTS),
        'a.csv': 'label,text\r\n' + ''.join(f'x,{text}\r\n' for text in quoted),
        'quoted.tsv': '"label"\t"text"\n' + ''.join(f'"x"\t{text}\n' for text in quoted),
        'a.jsonl': '\n'.join(json.dumps({'label': 1, 'text': text}) for text in TEXTS),
        'a.CSV.gz': 'label,text\n' + ''.join(f'x,{text}\n' for text in quoted),
    }
    for name, content in contents.items():
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
        file = str(tmp_path / name)
        assert predicted(capsys, run, f'--input={file}') == expected
        wrong = refused(capsys, run, f'--input={file}', '--column=texts')
        assert f"{file}:1: {'key' if 'json' in name else 'column'} 'texts' is not among" in wrong
        assert "did you mean 'text'?" in wrong


def test_tsv_has_a_column_for_each_probability(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = str(classifier_run[0]), 'one\ttab and\na line'
    (expected,) = predicted(capsys, run, '--text', text)
    assert predict.main([run, '--text', text, '--format=tsv']) == 0
    header, row = (line.split('\t') for line in capsys.readouterr().out.splitlines())
    probabilities = ['probabilities.negative', 'probabilities.positive']
    assert header == ['text', 'label', *probabilities, 'unknown', 'cut']
    numbers = list(map(str, expected['probabilities'].values()))
    notes = [str(expected['unknown']), str(expected['cut'])]
    assert row == ['one tab and a line', expected['label'], *numbers, *notes]


def test_unknown_words_and_a_cut_text_are_reported_with_the_prediction(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ['the film is zyx', 'the film is the', 'the ' * 40, 'the ' * 41]
    found = predicted(capsys, str(classifier_run[0]), *(f'--text={text}' for text in texts))
    assert [line['unknown'] for line in found] == [0.25, 0, 0, 0]
    assert [line['cut'] for line in found] == [False, False, False, True]


def test_texts_are_read_only_as_far_as_predictions_are_taken(
    classifier_run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, 'ROWS', 4)
    read: list[int] = []

    def endless() -> Iterator[Text]:
        for number in itertools.count(1):
            read.append(number)
            yield Text(f'text {number}', 'good')

    run = predict.saved_run.open_run(str(classifier_run[0]))
    predictor = run.predictor()
    params = run.params(predictor.init)
    found = predict.predictions(predictor, params, endless(), predict.stop)
    assert len(list(itertools.islice(found, 9))) == 9
    assert len(read) <= 9 + 2 * 4


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_full_disk_behind_the_output_is_one_line(classifier_run: Trained) -> None:
    command = [sys.executable, '-m', 'tools.predict', str(classifier_run[0]), '--text=a']
    with Path('/dev/full').open('w') as full:
        done = subprocess.run(
            command, cwd=runs.ROOT, env=runs.environment(1), stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    expected = b'error: standard output: cannot be written (No space left on device)\n'
    assert done.stderr == expected


def test_closed_pipe_ends_it_quietly(classifier_run: Trained, tmp_path: Path) -> None:
    file = tmp_path / 'many'
    file.write_text('na\u00efve\n' * 5000)
    command = [sys.executable, '-m', 'tools.predict', str(classifier_run[0]), f'--input={file}']
    with subprocess.Popen(
        command,
        cwd=runs.ROOT,
        env=runs.environment(1, PYTHONIOENCODING='ascii'),  # output is UTF-8 all the same
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding='utf-8',
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())['text'] == 'na\u00efve'
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 141


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        (['--text=a', '--input=b'], 'expected --text or --input'),
        ([], 'expected --text or --input'),
        (['--input=none.txt'], '--input=none.txt: cannot be read'),
        (
            ['--input=none.txt', '--column=a'],
            '--column expects a .tsv, .csv or .jsonl file (or .gz)',
        ),
        (['--input=a.xlsx'], "suffix '.xlsx', expected .tsv, .csv, .jsonl, or .txt"),
        (['--input=/dev/null'], '--input=/dev/null: empty, expected one or more texts'),
        (['--text=a', '--rate=3'], 'unrecognized arguments: --rate=3'),
        (['--text=a', '--step=last'], "--step: 'last': expected a step, or best"),
    ],
)
def test_bad_arguments_are_one_line(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in refused(capsys, str(classifier_run[0]), *flags)


def test_damaged_gzip_is_refused(classifier_run: Trained, tmp_path: Path) -> None:
    predictor = predict.saved_run.open_run(str(classifier_run[0])).predictor()
    file = tmp_path / 'a.tsv.gz'
    for content in (b'text\n', gzip.compress(b'text\ngood\n')[:-9]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f'--input={file}: cannot be read'):
            list(predict.read_texts(str(file), None, predictor, DataConfig(), predict.stop))


def test_folder_without_a_run_or_the_step_is_refused(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 'found no checkpoint' in refused(capsys, str(tmp_path), '--text=a')
    wrong = refused(capsys, str(classifier_run[0]), '--text=a', '--step=7')
    assert wrong.endswith('has checkpoints of steps 6, 12')


def test_bad_lines_are_named_and_stop_it_or_are_skipped(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = str(classifier_run[0]), tmp_path / 'lines'
    file.write_bytes(b'\xef\xbb\xbfgood\r\n \t\nna\xc3\xafve\x0cfilm\na \xff b\nlast')
    assert refused(capsys, run, '--input', str(file)) == f'error: {file}:2: expected some text'
    assert predict.main([run, '--input', str(file), '--bad_lines=skip']) == 0
    printed = capsys.readouterr()
    texts = [json.loads(line)['text'] for line in printed.out.splitlines()]
    assert texts == ['good', 'naïve\x0cfilm', 'last']
    assert printed.err.splitlines() == [
        f'skipped: {file}:2: expected some text',
        f"skipped: {file}:4: 'a \\udcff b' has NUL or bytes that are not UTF-8, expected UTF-8",
    ]


def test_bad_rows_are_named_by_their_line(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(classifier_run[0])
    contents = {
        'a.csv': 'n,text\n1,"two\nlines"\n1,2,3\n\n1,\n1,good\nn,text\n',
        'a.jsonl': '{"text": "good"}\n{"text": 3}\n[]\n{"text"\n{"other": ""}\n{"text": "good"}',
    }
    bad = {'a.csv': [4, 6, 8], 'a.jsonl': [2, 3, 4, 5]}
    for name, content in contents.items():
        file = tmp_path / name
        file.write_text(content)
        flags = [run, f'--input={file}', '--column=text']
        assert refused(capsys, *flags).startswith(f'error: {file}:{bad[name][0]}: ')
        assert predict.main([*flags, '--bad_lines=skip']) == 0
        printed = capsys.readouterr()
        places = [line.split(': ')[1] for line in printed.err.splitlines()]
        assert places == [f'{file}:{line}' for line in bad[name]]
        assert len(printed.out.splitlines()) == 2


def test_columns_of_the_run_are_read_and_joined_as_training_joined_them(
    classifier_run: Trained, tmp_path: Path
) -> None:
    saved = predict.saved_run.open_run(str(classifier_run[0]))
    data = dataclasses.replace(
        saved.config.data,
        text_features=('title', 'inner.body'),  # type: ignore[call-arg]
        columns=('label', 'title', 'inner.body'),
    )
    config = dataclasses.replace(saved.config, data=data)
    predictor = classification.make_predictor(config, saved.record['task'])
    rows = [('x', 'a', 'b'), ('x', '', 'c, d'), ('x', ' ', '')]
    header = data.columns
    contents = {
        'a.csv': ''.join(f'{a},{b},"{c}"\n' for a, b, c in (header, *rows)),
        'b.csv': ''.join(f'{a},{b},"{c}"\n' for a, b, c in rows),  # as data.columns has it
        'c.csv': ''.join(f'"{c}",{b}\n' for _, b, c in (header, *rows)),  # other columns
        'a.tsv': ''.join('\t'.join(row) + '\n' for row in rows),
        'a.jsonl': ''.join(
            json.dumps({'title': b, 'inner': {'body': c}}) + '\n' for _, b, c in rows
        ),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        file = str(tmp_path / name)
        found = list(predict.read_texts(file, None, predictor, data, pytest.fail))
        assert [text for _, text in found] == ['a [sep] b', ' [sep] c, d', ''], name
    file = str(tmp_path / 'a.csv')
    (chosen, *_) = predict.read_texts(file, ['inner.body'], predictor, data, pytest.fail)
    assert chosen.text == 'b'


def test_words_are_those_of_the_text_also_where_the_model_does_not_know_them(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = predicted(capsys, str(classifier_run[0]), '--text=The FILM is zyx')
    assert [word for word, _ in line['attention']] == ['The', 'FILM', 'is', 'zyx']
