"""docs/fork.md does what it says: its listings run, and what is not needed can be deleted."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from input_pipeline import reviews
from tests import runs
from tests.test_docs import FENCE, LISTING

pytestmark = pytest.mark.launch
PAGE = (runs.ROOT / 'docs' / 'fork.md').read_text()
SHORT = {name: value for name, value in runs.STEPS.items() if name != 'data.window_batches'}
ARGS = ' '.join(f'--config.{name}={value}' for name, value in (SHORT | {'num_steps': 6}).items())


def listings() -> dict[str, str]:
    """The files that the page shows, by path."""
    texts = [text for language, text in FENCE.findall(PAGE) if language == 'python']
    return {LISTING.match(text)[1]: text.split('\n', 1)[1] for text in texts}  # type: ignore


def commands(title: str) -> list[str]:
    """The blocks of commands below a headline."""
    part = PAGE.split(f'\n## {title}\n')[1].split('\n## ')[0]
    return [text for language, text in FENCE.findall(part) if language == 'sh']


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, with the files of the page."""
    copy = runs.copied(tmp_path)
    for path, text in listings().items():
        (copy / path).write_text(text)
    return copy


def shortened(block: str) -> str:
    """The commands, for a run of a few steps."""
    block = re.sub(r'ARGS="(.*)"$', rf'ARGS="\1 {ARGS}"', block, flags=re.MULTILINE)
    return re.sub(r'^(make train [^"\n]*)$', rf'\1 ARGS="{ARGS}"', block, flags=re.MULTILINE)


def test_listings_are_short_and_as_lint_wants_them(project: Path) -> None:
    for path, text in listings().items():
        assert len(text.splitlines()) <= (20 if path.startswith('configs/') else 70)
    paths = ' '.join(listings())
    runs.shell(project, f'ruff check {paths}; mypy {paths}')


def test_own_texts_need_one_config(project: Path) -> None:
    (project / 'my').mkdir()
    train, evaluation = reviews.make_reviews(120, 40)
    for name, (texts, labels) in (('train', train), ('dev', evaluation)):
        rows = [f'{text}\t{label}\n' for text, label in zip(texts, labels, strict=True)]
        (project / 'my' / f'{name}.tsv').write_text('text\tlabel\n' + ''.join(rows))
    (project / 'my' / 'texts.txt').write_text('a good book .\n\nnot good .\n')
    (block,) = commands('My own texts')
    printed = runs.shell(project, shortened(block))
    assert 'skipped: text 2' in printed
    assert len((project / 'predictions.jsonl').read_text().splitlines()) == 2


class AgNewsSubset(tfds.core.GeneratorBasedBuilder):
    """Sixty articles under the name, and with the features and splits, of the real data set."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        topics = ['World', 'Sports', 'Business', 'Sci/Tech']
        features = {
            'label': tfds.features.ClassLabel(names=topics),
            'title': tfds.features.Text(),
            'description': tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, object]]]:
        del dl_manager
        return {'train': self._generate_examples(60), 'test': self._generate_examples(20)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, object]]:
        for row in range(count):
            yield row, {'label': row % 4, 'title': f'topic {row % 4}', 'description': 'it is so'}


def test_another_data_set_needs_one_config(project: Path, tmp_path: Path) -> None:
    AgNewsSubset(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    (block,) = commands('Another data set of TFDS')
    printed = runs.shell(project, shortened(block), TFDS_DATA_DIR=str(tmp_path))
    assert '60 training and 20 evaluation examples, 4 classes' in printed
    assert '"step": 6' in printed


def test_another_model_needs_one_file_and_one_line_and_is_exact(project: Path) -> None:
    before = (project / 'tasks' / 'classification.py').read_text().splitlines()
    (block,) = commands('Another model')
    small = f'{ARGS} --config.data.num_train=200 --config.data.num_eval=40'
    printed = runs.shell(project, shortened(block).replace(ARGS, small))
    after = (project / 'tasks' / 'classification.py').read_text().splitlines()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    assert re.findall(r'^ +(\d) .* the same bits$', printed, re.MULTILINE) == ['1', '2']
    runs.shell(project, 'mypy ; grep -rqa self_attention_1 runs/transformer/checkpoints')
    told = runs.shell(project, 'python -m tools.predict runs/transformer --text "a good film"')
    assert len(json.loads(told)['attention']) == 3


# seq2seq: from here to the end (docs/fork.md)


def test_what_is_not_needed_can_be_deleted(tmp_path: Path) -> None:
    """Lint and the tests of the rest stay green; every test file can still be imported."""
    project = runs.copied(tmp_path)
    seq2seq, others = commands('What you do not need')
    lint = 'ruff format --check --quiet . ; ruff check --quiet . ; mypy ; '
    tests = 'test_architecture test_docs test_help test_pipeline test_text_files'
    files = ' '.join(f'tests/{name}.py' for name in tests.split()) + " -k 'not help_of'"
    runs.shell(
        project,
        f"{seq2seq}\n{lint} python -m pytest -q -m 'not slow' {files}",
    )
    left = subprocess.run(
        [
            'grep',
            '-rlE',
            '--include=*.py',
            r'seq2seq|addition\.py|Pairs?(Config|Dataset|Split)',
            '.',
        ],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert not left.stdout
    runs.shell(project, f'{others}\n{lint} python -m pytest -q --collect-only tests')
