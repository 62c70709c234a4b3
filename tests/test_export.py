"""The promises of tools/export.py: the model predicts the same, far from the project."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

import train
from tasks.classification import ModelConfig
from tests import runs
from tests.test_resume import small_config
from tests.test_tokenizer import TEXTS, files_config
from tests.test_transformer import SIZES
from tools import export, predict, saved_run

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]

ELSEWHERE = """
import importlib.util, json, sys
assert not any(importlib.util.find_spec(name) for name in ('tasks', 'tools', 'training', 'model'))
sys.path.insert(0, sys.argv[1])
from predict import load
predict = load(sys.argv[1])
texts = sys.argv[2:]
print(json.dumps([predict(texts), [predict([text])[0] for text in texts[:1]]]))
loaded = {name.split('.')[0] for name in sys.modules}
assert not loaded & {'flax', 'orbax', 'optax', 'grain', 'configs'}, loaded
facts = json.load(open(sys.argv[1] + '/run.json'))['task']
assert ('tokenizers' in loaded) == any(name.endswith('tokenizer') for name in facts)
"""


def exported(run: Path, out: Path, texts: list[str]) -> tuple[list[Any], list[Any]]:
    """Returns what the export predicts on all texts and on the first, in a separate process."""
    assert export.main([str(run), f'--out={out}']) == 0
    done = subprocess.run(
        [sys.executable, '-I', '-c', ELSEWHERE, str(out), *texts],
        cwd=out.parent,
        env=runs.environment(1),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    together, first = json.loads(done.stdout)
    return together, first


def predicted(run: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Returns what tools.predict predicts on them."""
    saved = saved_run.open_run(str(run))
    predictor = saved.predictor()
    given = (predict.Text(f'text {n}', text) for n, text in enumerate(texts, 1))
    found = predict.predictions(predictor, saved.params(predictor.init), given, predict.stop)
    return [{name: x for name, x in line.items() if name != 'text'} for line in found]


def test_exported_classifier_predicts_the_same_without_the_project(
    classifier_run: Trained, tmp_path: Path
) -> None:
    texts = ['i hated it', 'a', 'never seen: zyx <unk>', ' '.join(['wonderful'] * 60)]
    texts += ['it is wonderful .', 'the film is not bad at all !', 'é']
    together, first = exported(classifier_run[0], tmp_path / 'out', texts)
    expected = predicted(classifier_run[0], texts)
    assert len(together) == 7
    for found, right in zip([*together, *first], [*expected, expected[0]], strict=True):
        assert found['label'] == right['label']
        assert found['probabilities'] == pytest.approx(right['probabilities'], rel=1e-5)
        assert [word for word, _ in found['attention']] == [word for word, _ in right['attention']]
        weights = [[weight for _, weight in line['attention']] for line in (found, right)]
        assert weights[0] == pytest.approx(weights[1], rel=1e-5)
    assert len({line['probabilities']['positive'] for line in together}) > 4, 'all alike'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out']


@pytest.mark.parametrize(
    ('kind', 'affixes'), [('basic', (3, 2)), pytest.param('wordpiece', (), marks=pytest.mark.long)]
)
def test_exported_run_predicts_as_people_write_and_shows_their_words(
    tmp_path: Path, kind: str, affixes: tuple[int, ...]
) -> None:
    cells = [(text, 'pos' if 'o' in text[:9] else 'neg') for text in TEXTS]
    config = files_config(tmp_path, cells, tokenizer=kind, affixes=affixes, vocab_size=400)
    config.data.bucket_lengths = (42,)
    train.train(config, epath.Path(tmp_path / 'run'))
    texts = [TEXTS[0], 'The film was AWFUL!', 'zyx [sep] <eos>', ' '.join(['wonderful'] * 60)]
    texts.append(TEXTS[0].replace(' .', '.').replace(' ,', ',').upper())
    together, _ = exported(tmp_path / 'run', tmp_path / 'out', texts)
    expected = predicted(tmp_path / 'run', texts)
    for found, right in zip(together, expected, strict=True):
        assert found['probabilities'] == pytest.approx(right['probabilities'], rel=1e-5)
        shown = [[piece for piece, _ in line['attention']] for line in (found, right)]
        assert shown[0] == shown[1]
        assert '<unk>' not in shown[0]
    assert expected[-1]['probabilities'] == expected[0]['probabilities']
    if kind == 'basic':
        pieces = [piece for piece, _ in expected[1]['attention']]
        assert pieces == ['The', 'film', 'was', 'AWFUL', '!']


@pytest.mark.long
def test_exported_transformer_predicts_the_same_and_neither_shows_attention(tmp_path: Path) -> None:
    config = small_config()
    sizes = ModelConfig(encoder='transformer', **(SIZES | {'num_positions': 42}))
    given = dataclasses.replace(config, num_steps=2, model=sizes)
    given.data = dataclasses.replace(config.data, affixes=())
    train.train(given, epath.Path(tmp_path / 'run'))
    texts = ['i hated it', 'it is wonderful .', 'a']
    found, _ = exported(tmp_path / 'run', tmp_path / 'out', texts)
    for one, other in zip(found, predicted(tmp_path / 'run', texts), strict=True):
        assert set(one) == {'label', 'probabilities'}
        assert set(other) == {'label', 'probabilities', 'unknown', 'cut'}
        assert one['probabilities'] == pytest.approx(other['probabilities'], rel=1e-5)


def test_exported_run_predicts_all_labels_of_a_text(tmp_path: Path) -> None:
    multilabel = pytest.importorskip('tasks.multilabel')
    file, config = tmp_path / 'a.tsv', small_config()
    file.write_text('text\tlabels\n' + 'good food\tfood\nthe door\t\nslow\tservice,food\n' * 8)
    sizes = {'embedding_size': 8, 'hidden_size': 8}
    data = {'train': str(file), 'evaluation': str(file), 'min_frequency': 1}
    config.data = multilabel.DataConfig(**data, bucket_lengths=(8,))
    config.model = multilabel.ModelConfig(**sizes)
    train.train(dataclasses.replace(config, num_steps=2), epath.Path(tmp_path / 'run'))
    texts = ['good food', 'the door was slow']
    found, _ = exported(tmp_path / 'run', tmp_path / 'out', texts)
    for one, other in zip(found, predicted(tmp_path / 'run', texts), strict=True):
        assert one['probabilities'] == pytest.approx(other['probabilities'], rel=1e-5)
        assert one['labels'] == [name for name, p in one['probabilities'].items() if p > 0.5]


def test_jax_that_cannot_run_the_model_is_one_line(classifier_run: Trained, tmp_path: Path) -> None:
    """As one older than the version that exported it, which lacks some of its operations."""
    assert export.main([str(classifier_run[0]), f'--out={tmp_path / "out"}']) == 0
    older = (
        'import runpy, sys, jax\n'
        'def call(*_): raise jax.errors.JaxRuntimeError("no such operation\\n  in line 3")\n'
        'jax.export.Exported.call = call\n'
        'sys.argv[1:] = ["a text"]\n'
        f'runpy.run_path({str(tmp_path / "out" / "predict.py")!r}, run_name="__main__")'
    )
    done = subprocess.run(
        [sys.executable, '-c', f'import jax.export\n{older}'], capture_output=True, text=True
    )
    assert done.returncode == 2
    expected = f'error: jax {jax.__version__} cannot run the model (no such operation), which was '
    assert done.stderr.startswith(expected + f'exported with jax {jax.__version__}; ')
    assert done.stderr.count('\n') == 1


def test_help_of_an_exported_program_shows_how_it_is_called(tmp_path: Path) -> None:
    file = tmp_path / 'predict.py'
    file.write_text(export.program_text())
    shown = runs.printed([sys.executable, '-I', file, '--help'], tmp_path, runs.environment(1), 60)
    assert 'python predict.py "a text"' in shown
    assert len(shown.splitlines()) <= 25


def test_step_is_chosen_and_reported(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'
    assert export.main([str(classifier_run[0]), f'--out={out}', '--step=6']) == 0
    assert capsys.readouterr().out == f'wrote {out}: step 6 of {classifier_run[0]}\n'
    saved = json.loads((classifier_run[0] / 'checkpoints/6/run/metadata').read_text())
    assert json.loads((out / 'run.json').read_text()) == saved | {'jax': jax.__version__}


@pytest.mark.parametrize(
    ('run', 'out', 'expected'),
    [
        ('none', 'out', 'expected the workdir of a run, found no folder'),
        ('there', 'out', 'expected the workdir of a run, found no checkpoint'),
        ('none', 'there', 'exists already, expected a new folder'),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, out: str, expected: str
) -> None:
    (tmp_path / 'there').mkdir()
    with pytest.raises(SystemExit) as end:
        export.main([str(tmp_path / run), f'--out={tmp_path / out}'])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert [path.name for path in tmp_path.iterdir()] == ['there']


def test_folder_that_can_not_be_made_is_one_line(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        export.main([str(classifier_run[0]), f'--out={tmp_path / "no" / "out"}'])
    assert end.value.code == 2
    assert 'cannot be written (No such file or directory)' in capsys.readouterr().err
