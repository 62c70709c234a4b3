"""docs/fork.md and docs/new_task.md do what they say: their listings and commands run."""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.numpy
import tensorflow_datasets as tfds

from input_pipeline import reviews
from input_pipeline.tokenizer import trained
from tests import runs
from tests.test_checks import table
from tests.test_docs import FENCE, LISTING
from tests.test_warm_start import random_bert

pytestmark = pytest.mark.long
FORK, NEW_TASK = ((runs.ROOT / 'docs' / f'{name}.md').read_text() for name in ('fork', 'new_task'))
SHORT = {name: value for name, value in runs.STEPS.items() if name != 'data.window_batches'}
SHORT |= {'num_steps': 6}
CHINESE = [('房间很干净。', 'positive'), ('服务很差。早餐也不好。', 'negative')]


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
    """Makes a copy of the project with the files of both pages, and an empty my/."""
    copy = runs.copied(tmp_path)
    for path, text in (listings(FORK) | listings(NEW_TASK)).items():
        (copy / path).write_text(text)
    (copy / 'my').mkdir(exist_ok=True)
    return copy


def shown(title: str) -> list[str]:
    """Returns the lines that `head` prints below a headline of docs/fork.md."""
    part = FORK.split(f'\n## {title}\n')[1].split('\n## ')[0]
    block = next(text for _, text in FENCE.findall(part) if text.startswith('$ head '))
    return block.splitlines()[1:]


def test_listings_pass_lint_types_and_the_tests_of_the_tree(project: Path) -> None:
    paths = ' '.join(listings(FORK) | listings(NEW_TASK))
    runs.shell(project, f'ruff check {paths}; ruff format --check {paths}; mypy')
    runs.shell(project, 'python -m pytest -q -p no:xdist tests/test_architecture.py')


def test_configs_of_ones_own_data_have_at_most_20_lines() -> None:
    for path, text in listings(FORK).items():
        if path.startswith('configs/'):
            assert len(text.partition('def ')[2].splitlines()) <= 20, path


def test_a_csv_without_a_header_line_needs_one_config(project: Path) -> None:
    title = 'I have a CSV without a header line'
    rows = '\n'.join(shown(title) * 40) + '\n'
    (project / 'my' / 'news.csv').write_text(rows)
    # A report shows mistakes.
    mistaken = re.sub('(?m)^"([34])"', lambda label: f'"{7 - int(label[1])}"', rows)
    (project / 'my' / 'news_dev.csv').write_text(mistaken)
    printed = runs.shell(project, shortened(commands(title)[0], SHORT))
    assert "80 training and 80 evaluation examples, 2 classes {'3': 40, '4': 40}" in printed
    assert ' 0.0% of training and 0.0% of evaluation tokens unknown' in printed
    predicted = json.loads(next(line for line in printed.splitlines() if line[:1] == '{'))
    words = [word for word, _ in predicted['attention']]
    assert words[:4] == ['Oil', 'prices', 'soar', '[sep]']
    report = (project / 'report.html').read_text()
    assert re.search('Bears|Rovers', report)
    assert '&lt;unk' not in report


def test_chinese_texts_need_one_config(project: Path) -> None:
    rows = [f'{row}。{text}\t{label}\n' for row in range(60) for text, label in CHINESE]
    (project / 'my' / 'hotels.tsv').write_text(''.join(rows))
    (block,) = commands('I have Chinese texts')
    printed = runs.shell(project, shortened(block, SHORT))
    assert ' 2 classes ' in printed
    predicted = json.loads(printed.splitlines()[-1])
    text = re.findall('--text "(.*)"', block)[0]
    assert ''.join(word for word, _ in predicted['attention']) == text


def test_a_labelling_tools_file_needs_one_config(project: Path) -> None:
    title = 'I have a JSONL file from a labelling tool'
    (line,) = shown(title)
    (texts, labels), _ = reviews.make_reviews(120, 40)
    record = json.loads(line)
    rows = []
    for text, label in [('nobody has read this', None), *zip(texts, labels, strict=True)]:
        record['data']['text'] = text
        answers = [] if label is None else [{'value': {'choices': [reviews.LABEL_NAMES[label]]}}]
        record['annotations'] = [{'result': answers}]
        rows.append(json.dumps(record))
    (project / 'my' / 'labelled.jsonl').write_text('\n'.join(rows))
    (project / 'my' / 'texts.txt').write_text('a good book .\n\nnot good .\n')
    printed = runs.shell(project, shortened(commands(title)[0], SHORT))
    assert ' 1 bad rows skipped' in printed
    assert 'skipped: my/texts.txt:2' in printed
    assert len((project / 'predictions.jsonl').read_text().splitlines()) == 2


def test_a_pretrained_encoder_needs_one_config(project: Path) -> None:
    """With a tiny BERT in place of MiniLM."""
    rows = shown('I have a CSV without a header line') * 40
    for name in ('news', 'news_dev'):
        (project / 'my' / f'{name}.csv').write_text('\n'.join(rows) + '\n')
    tokenizer = trained('basic', rows, 1, 300)
    (project / 'my' / 'tokenizer.json').write_text(tokenizer)
    words = len(json.loads(tokenizer)['model']['vocab'])
    safetensors.numpy.save_file(random_bert(words), project / 'my' / 'model.safetensors')
    tiny = {'num_layers': 2, 'num_heads': 4, 'num_positions': 24, 'hidden_size': 16}
    short = SHORT | {f'model.{name}': size for name, size in tiny.items()}
    short |= {'init.weights': 'my/model.safetensors', 'data.tokenizer': 'my/tokenizer.json'}
    setup, train = commands('I have a pretrained encoder')[0].splitlines()
    assert setup == 'make setup EXTRAS=pretrained'
    printed = runs.shell(project, shortened(train, short | {'data.bucket_lengths': '(24,)'}))
    assert 'not used: pooler.dense.weight; started anew: logits/bias, logits/kernel' in printed
    assert 'finished at step 6' in printed


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
    (block,) = commands('I have a data set of TFDS')
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
    for name, split in zip(('train', 'dev'), reviews.make_reviews(120, 40), strict=True):
        table(project / 'my' / f'{name}.tsv', zip(*split, strict=True))
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
