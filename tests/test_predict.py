"""The promises of tools/predict.py: a checkpoint is all it needs, and it agrees with evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from input_pipeline import reviews
from tests.test_resume import small_config
from tools import predict

pytestmark = pytest.mark.slow


def predicted(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    """What the command prints."""
    capsys.readouterr()
    assert predict.main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_labels_of_the_evaluation_split_are_right_as_often_as_evaluation_said(
    classifier_run: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, summary = classifier_run
    monkeypatch.setattr(predict, 'ROWS', 16)  # several batches, the last one partial
    data = small_config().data
    _, (texts, labels) = reviews.make_reviews(data.num_train, data.num_eval)
    (tmp_path / 'texts').write_text('\n'.join(texts) + '\n')
    monkeypatch.chdir(run.parent)  # a path that is relative to where one is
    found = predicted(capsys, run.name, '--input', str(tmp_path / 'texts'))
    assert [line['text'] for line in found] == texts
    right = [
        line['label'] == reviews.LABEL_NAMES[label]
        for line, label in zip(found, labels, strict=True)
    ]
    assert sum(right) == round(summary['eval']['accuracy'] * len(labels))
    for line in found:
        assert sum(line['probabilities'].values()) == pytest.approx(1)
        assert max(line['probabilities'], key=line['probabilities'].get) == line['label']
        assert len(line['attention']) == min(len(line['text'].split()), 40)
        assert 0 < sum(weight for _, weight in line['attention']) < 1  # the marks have the rest


@pytest.mark.parametrize(
    ('flags', 'told'),
    [
        (['--text=a', '--input=b'], 'expected --text or --input'),
        ([], 'expected --text or --input'),
        (['--input=none.txt'], '--input=none.txt: can not be read'),
        (['--text=a', '--rate=3'], 'unrecognized arguments: --rate=3'),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as end:
        predict.main([str(tmp_path), *flags])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        predict.main([str(tmp_path), '--text=a'])
    assert end.value.code == 2
    assert 'found no checkpoint' in capsys.readouterr().err


def test_bad_lines_are_named_and_stop_it_or_are_skipped(
    classifier_run: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, file = str(classifier_run[0]), tmp_path / 'lines'
    file.write_bytes(b'\xef\xbb\xbfgood\r\n \t\nna\xc3\xafve\x0cfilm\na \xff b\nlast')
    with pytest.raises(SystemExit) as end:
        predict.main([run, '--input', str(file)])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ('', 'error: text 2: expected some text\n')
    assert predict.main([run, '--input', str(file), '--bad_lines=skip']) == 0
    told = capsys.readouterr()
    texts = [json.loads(line)['text'] for line in told.out.splitlines()]
    assert texts == ['good', 'naïve\x0cfilm', 'last']
    assert told.err.splitlines() == [
        'skipped: text 2: expected some text',
        "skipped: text 4, 'a \\udcff b': bytes that are not UTF-8, expected UTF-8",
    ]
