"""The tools do for sequence to sequence what they do for the classifier."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from etils import epath

import train
from tasks import seq2seq
from tests import runs
from tests.test_export import exported
from tests.test_export import predicted as predictions
from tests.test_predict import predicted
from tests.test_report import page_of
from tests.test_seq2seq import small_config
from tools import predict, report

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope='module')
def addition_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The workdir and the summary of a small encoder-decoder, for tests that only read it."""
    run = tmp_path_factory.mktemp('addition')
    return run, train.train(small_config(), epath.Path(run))


def test_sums_are_decoded_as_in_evaluation(
    addition_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = addition_run
    _, pairs, _ = seq2seq.read_pairs(small_config().data)
    (tmp_path / 'sums').write_text('\n'.join(source for source, _ in pairs))
    unfinished = run / 'checkpoints' / '99.orbax-checkpoint-tmp'  # of a run that is at work
    unfinished.mkdir()
    found = predicted(capsys, str(run), '--input', str(tmp_path / 'sums'))
    unfinished.rmdir()  # it is still there
    right = [line['prediction'] == target for line, (_, target) in zip(found, pairs, strict=True)]
    assert sum(right) == round(summary['eval']['exact_match'] * len(right))


def test_sums_that_can_not_be_read_are_bad_lines(
    addition_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = str(addition_run[0]), tmp_path / 'lines'
    file.write_text('1+2\n\n12+x\n1234567+1\n3+4\n')
    with pytest.raises(SystemExit) as end:
        predict.main([run, '--input', str(file)])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {file}:2, '': expected some text\n"
    assert predict.main([run, '--input', str(file), '--bad_lines=skip']) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)['text'] for line in printed.out.splitlines()] == ['1+2', '3+4']
    assert [line.partition(',')[0] for line in printed.err.splitlines()] == [
        f'skipped: {file}:{line}' for line in (2, 3, 4)
    ]


def test_exported_encoder_decoder_decodes_the_same_without_the_project(
    addition_run: Trained, tmp_path: Path
) -> None:
    texts = ['1+2', '76+192', '5+5', '12+345', '9+99', '10+10', '99+999']
    together, first = exported(addition_run[0], tmp_path / 'out', texts)
    expected = predictions(addition_run[0], texts)
    assert together == expected
    assert first == expected[:1]
    for text, problem in (('1+x', 'not in the vocabulary'), ('12345+678', 'needs a width of 10')):
        done = subprocess.run(
            [sys.executable, '-I', tmp_path / 'out' / 'predict.py', text],
            env=runs.environment(1),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert problem in line


@pytest.mark.parametrize('kind', [pytest.param('words', marks=pytest.mark.long), 'bpe'])
def test_exported_encoder_decoder_cuts_and_splits_texts_as_in_training(
    tmp_path: Path, kind: str
) -> None:
    pairs = [(f'The film {n} is GOOD .', f'Der Film {n} ist gut.') for n in range(40)]
    lines = ['source\ttarget', *('\t'.join(pair) for pair in pairs)]
    (tmp_path / 'pairs.tsv').write_text('\n'.join(lines))
    file = str(tmp_path / 'pairs.tsv')
    config, run = small_config(), tmp_path / 'run'
    config.data = seq2seq.DataConfig(
        source='files', train=file, evaluation=file, tokenizer=kind, vocab_size=300,
        bucket_lengths=(5,), too_long='cut', min_frequency=2,
    )  # fmt: skip
    train.train(dataclasses.replace(config, num_steps=2), epath.Path(run))
    texts = ['The film 7 is GOOD .', 'good ' * 30, 'Zyx']
    together, first = exported(run, tmp_path / 'out', texts)
    expected = [{'prediction': line['prediction']} for line in predictions(run, texts)]
    assert together == expected
    assert first == expected[:1]


def test_page_of_an_encoder_decoder_has_its_worst_pairs(
    addition_run: Trained, tmp_path: Path
) -> None:
    page = page_of(tmp_path, addition_run[0])
    wrong = round((1 - addition_run[1]['eval']['exact_match']) * 70)
    assert f'{wrong} of 70 examples are wrong' in page.words['Worst mistakes']
    (_, *mistakes) = page.sections['Worst mistakes']
    assert len(mistakes) == report.SHOWN
    losses = [float(loss) for loss, *_ in mistakes]
    assert losses == sorted(losses, reverse=True)
    for _, said, pair in mistakes:
        source, _, target = pair.partition(' -> ')
        assert sum(map(int, source.strip("'").split('+'))) == int(target.strip("'"))
        assert said != target
    assert 'Confusion matrix' not in page.sections
