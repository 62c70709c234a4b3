"""docs/fork.md and docs/new_task.md do what they say: listings run, and files can be deleted."""

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from input_pipeline import reviews
from tests import runs
from tests.test_docs import FENCE, LISTING

pytestmark = pytest.mark.long
FORK, NEW_TASK = ((runs.ROOT / 'docs' / f'{name}.md').read_text() for name in ('fork', 'new_task'))
SHORT = {name: value for name, value in runs.STEPS.items() if name != 'data.window_batches'}
SHORT |= {'num_steps': 6}


def flags(options: dict[str, object]) -> str:
    """Returns overrides as a command line."""
    return ' '.join(shlex.quote(f'--config.{name}={value}') for name, value in options.items())


def listings(page: str) -> dict[str, str]:
    """Returns the files that a page shows, by path."""
    texts = [text for language, text in FENCE.findall(page) if language == 'python']
    return {found[1]: text.split('\n', 1)[1] for text in texts if (found := LISTING.match(text))}


def commands(title: str) -> list[str]:
    """Returns the blocks of commands below a headline of docs/fork.md."""
    part = FORK.split(f'\n## {title}\n')[1].split('\n## ')[0]
    return [text for language, text in FENCE.findall(part) if language == 'sh']


def shortened(block: str, options: dict[str, object]) -> str:
    """Returns commands whose training and exactness take the options of a short run."""
    short = flags(options)
    block = re.sub(r'ARGS="(.*)"$', rf'ARGS="\1 {short}"', block, flags=re.MULTILINE)
    return re.sub(r'^(make train [^"\n]*)$', rf'\1 ARGS="{short}"', block, flags=re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Makes a copy of the project with the files of both pages and some texts in my/."""
    copy = runs.copied(tmp_path)
    for path, text in (listings(FORK) | listings(NEW_TASK)).items():
        (copy / path).write_text(text)
    (copy / 'my').mkdir(exist_ok=True)
    train, evaluation = reviews.make_reviews(120, 40)
    for name, (texts, labels) in (('train', train), ('dev', evaluation)):
        rows = [f'{text}\t{label}\n' for text, label in zip(texts, labels, strict=True)]
        (copy / 'my' / f'{name}.tsv').write_text('text\tlabel\n' + ''.join(rows))
    return copy


def test_listings_pass_lint_and_types(project: Path) -> None:
    paths = ' '.join(listings(FORK) | listings(NEW_TASK))
    runs.shell(project, f'ruff check {paths}; mypy')


def test_own_texts_need_one_config(project: Path) -> None:
    (project / 'my' / 'texts.txt').write_text('a good book .\n\nnot good .\n')
    (block,) = commands('I have texts and labels')
    printed = runs.shell(project, shortened(block, SHORT))
    assert 'skipped: my/texts.txt:2' in printed
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
    (block,) = commands('I want a data set of TFDS')
    printed = runs.shell(project, shortened(block, SHORT), TFDS_DATA_DIR=str(tmp_path))
    assert '60 training and 20 evaluation examples, 4 classes' in printed
    assert 'finished at step 6' in printed


def test_another_model_needs_one_file_and_one_line_and_is_exact(project: Path) -> None:
    before = (project / 'tasks' / 'classification.py').read_text().splitlines()
    (block,) = commands('I have a model')
    printed = runs.shell(
        project, shortened(block, SHORT | {'data.num_train': 200, 'data.num_eval': 40})
    )
    after = (project / 'tasks' / 'classification.py').read_text().splitlines()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    assert re.findall(r'^ +(\d) .* the same bits$', printed, re.MULTILINE) == ['1', '2']
    runs.shell(project, 'mypy ; grep -rqa averaged runs/averaging/checkpoints')
    predicted = runs.shell(project, 'python -m tools.predict runs/averaging --text "a good film"')
    assert set(json.loads(predicted)['probabilities']) == {'negative', 'positive'}


def test_a_third_task_needs_new_files_only_and_keeps_every_promise(project: Path) -> None:
    """Trains, predicts and compares layouts as the page says; then kills, moves and resumes."""
    assert set(listings(NEW_TASK)) == {'tasks/bytes.py', 'configs/bytes.py'}
    assert not any((runs.ROOT / path).exists() for path in listings(NEW_TASK))
    short = {'num_steps': 12, 'batch_size': 16, 'checkpoint_every': 2, 'model.hidden_size': 8}
    short |= {
        'cpu_threads': 4,
        'data.bucket_lengths': '(64,256)',
        'data.window_batches': 4,
        'eval_batch_size': 64,
    }
    block = '\n'.join(text for language, text in FENCE.findall(NEW_TASK) if language == 'sh')
    printed = runs.shell(project, shortened(block, short))
    assert '"bits_per_byte": ' in printed
    assert re.findall(r'^ +(\d) .* the same bits$', printed, re.MULTILINE) == ['1', '2']

    command = f'train.py --config=configs/bytes.py --workdir=runs/killed {flags(short)}'
    python = str(project / '.venv' / 'bin' / 'python')
    killed = subprocess.Popen([python, *shlex.split(command)], cwd=project, env=runs.environment(1))
    limit = time.monotonic() + 300
    while not (project / 'runs' / 'killed' / 'checkpoints' / '4').exists():
        assert killed.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert not (project / 'runs' / 'killed' / 'summary.json').exists()
    resumed = runs.shell(project, f'export JAX_NUM_CPU_DEVICES=4; python {command}')
    assert 'resumed after step' in resumed
    same = runs.shell(project, 'python -m tools.compare_runs runs/bytes runs/killed')
    assert 'The same run, bit for bit: 12 steps' in same


def test_what_is_not_needed_can_be_deleted(tmp_path: Path) -> None:
    """With rm alone: lint and fast tests stay green, and an old run of what is left resumes."""
    project = runs.copied(tmp_path)
    blocks = commands('I do not need all of this')
    lines = [line for block in blocks for line in block.splitlines()]
    assert lines
    assert all(line.startswith('rm ') for line in lines)

    def train(steps: int) -> str:
        small = runs.SMALL['configs/reviews.py'] | {'optimizer.decay_steps': 12}
        options = flags(small | {'num_steps': steps})
        return runs.shell(
            project, f'python train.py --config=configs/reviews.py --workdir=runs/old {options}'
        )

    train(6)
    task, others = blocks
    gone = [path.stem for line in task.splitlines() for path in globbed(project, line)]
    runs.shell(project, task)
    left = [
        f'{path.relative_to(project)}: {line.strip()}'
        for path in project.rglob('*.py')
        if '.venv' not in path.parts
        for line in path.read_text().splitlines()
        for name in gone
        if re.search(rf'\b(tasks|model|input_pipeline|configs|tests)[./]{name}\b', line)
        or re.search(rf'\bfrom \w+ import (.*\b)?{name}\b', line)
    ]
    assert not left
    lint = 'ruff format --check --quiet . ; ruff check --quiet . ; mypy'
    runs.shell(project, lint)
    check_fast_tests(project)
    assert 'resumed after step 6' in train(12)

    runs.shell(project, f'{others}\n{lint}')
    runs.shell(project, 'python -m pytest -q --collect-only tests')
    runs.shell(project, "python -m pytest -q -m 'not long' tests/test_docs.py")


def globbed(project: Path, line: str) -> list[Path]:
    """Returns the files that an rm command names."""
    return [path for pattern in line.split()[1:] for path in project.glob(pattern)]


def check_fast_tests(project: Path) -> None:
    """Runs the fast tests of a copy of the project."""
    done = subprocess.run(
        [project / '.venv' / 'bin' / 'python', '-m', 'pytest', '-q', '-m', 'not slow and not long'],
        cwd=project,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout
