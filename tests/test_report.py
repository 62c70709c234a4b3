"""The promises of tools/report.py and tools/plot.py: a page that is whole by itself, and honest."""

import collections
import csv
import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

import train
from input_pipeline import reviews
from runtime import ledger
from tasks.classification import DataConfig
from tests.test_resume import small_config
from tools import curves, plot, report

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]
HOSTILE = '<script>alert("1")</script> &amp; \'</td>'
KNOWN_TAGS = {
    *('html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'section', 'p', 'mark'),
    *('table', 'tr', 'th', 'td'),
    *('svg', 'g', 'path', 'defs', 'clippath', 'rect', 'text', 'use'),
}


class Page(HTMLParser):
    """The texts of a page: of table cells by section, and all that loads something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.sections: dict[str, list[list[str]]] = collections.defaultdict(list)
        self.words: dict[str, str] = collections.defaultdict(str)  # all the text of a section
        self._inside, self._section = '', ''
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or '' for name, v in attrs if name.split(':')[-1] in ('src', 'href')]
        if tag == 'h2':
            self._section = ''
        if tag == 'tr':
            self.sections[self._section].append([])
        if tag in ('td', 'th'):
            self.sections[self._section][-1].append('')
        if tag in ('h2', 'td', 'th'):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ''

    def handle_data(self, data: str) -> None:
        if self._inside == 'h2':
            self._section += data
        elif self._inside:
            self.sections[self._section][-1][-1] += data
        self.words[self._section] += data


def page_of(tmp_path: Path, *runs: Path) -> Page:
    """The page that the command writes."""
    out = tmp_path / 'report.html'
    assert report.main([*map(str, runs), f'--out={out}']) == 0
    page = Page(out.read_text())
    assert page.tags <= KNOWN_TAGS
    assert all(link.startswith('#') for link in page.links), 'loads something'
    assert not list(tmp_path.glob('*.partial'))
    return page


def test_page_of_a_classifier_has_the_facts_and_counts_as_evaluation_did(
    classifier_run: Trained, tmp_path: Path
) -> None:
    run, summary = classifier_run
    page = page_of(tmp_path, run)
    facts = dict(row for row in page.sections['Facts'] if len(row) == 2)
    assert facts['steps'] == '12 of 12'
    assert facts['root key'] == summary['root_key']
    assert facts['state fingerprint'] == summary['state_fingerprint']
    assert facts['shards'] == str(summary['num_shards'])
    metrics = dict(page.sections['Final metrics'][1:])
    assert metrics == {name: f'{value:.4f}' for name, value in summary['eval'].items()}
    settings = {name: row for name, *row in page.sections['Settings that are not the defaults']}
    assert settings['data.bucket_lengths'] == ['[8, 16, 24, 32, 48]', '[20, 42]']
    assert settings['optimizer.learning_rate'] == ['0.001', '0.003']
    assert 'optimizer.clip_norm' not in settings
    *modules, (_, total) = page.sections['Parameters'][1:]
    structure = json.loads((run / 'checkpoints/12/run/metadata').read_text())['manifest'][
        'structure'
    ]
    shapes = [json.loads(x[7:]) for name, x in structure.items() if name.startswith('.params')]
    assert int(total.replace(',', '')) == sum(int(np.prod(shape)) for shape in shapes)
    assert sum(int(size.replace(',', '')) for _, size in modules) == int(total.replace(',', ''))
    assert 'gradient norm' in page.words['Learning curves']

    confusion = np.array([row[1:] for row in page.sections['Confusion matrix'][1:]], int)
    data = small_config().data
    _, (_, labels) = reviews.make_reviews(data.num_train, data.num_eval)
    assert confusion.sum(axis=1).tolist() == np.bincount(labels).tolist()
    right = round(summary['eval']['accuracy'] * 70)
    assert np.trace(confusion) == right
    assert f'{70 - right} of 70 examples are wrong' in page.words['Worst mistakes']
    _, *mistakes = page.sections['Worst mistakes']
    losses = [float(loss) for loss, *_ in mistakes]
    assert losses == sorted(losses, reverse=True)
    assert len(mistakes) == min(report.SHOWN, 70 - right)
    assert all(said.split()[0] != true for _, true, said, _ in mistakes)


def test_several_runs_share_the_figure_and_a_table_with_mean_and_spread(
    classifier_run: Trained, tmp_path: Path
) -> None:
    run, summary = classifier_run
    other, unfinished = tmp_path / '_a $x^2$ <b>', tmp_path / 'unfinished'
    for copy in (other, unfinished):
        shutil.copytree(run, copy)
    accuracy = summary['eval']['accuracy']
    changed = summary | {'eval': {'loss': 0.5, 'accuracy': accuracy + 0.25}}
    (other / 'summary.json').write_text(json.dumps(changed))
    for folder in ('tensorboard', 'ledger'):
        shutil.rmtree(unfinished / folder)
    (unfinished / 'summary.json').unlink()
    page = page_of(tmp_path, run, other, unfinished)
    row = next(row for row in page.sections['Final metrics'] if row[0] == 'accuracy')
    values = [f'{accuracy:.4f}', f'{accuracy + 0.25:.4f}']
    assert row[1:] == [f'{accuracy + 0.125:.4f}', ' .. '.join(values), *values, 'none yet']
    assert str(other) in page.words['Learning curves']
    assert str(unfinished) not in page.words['Learning curves']
    assert page.sections['Facts'][1] == ['steps', *2 * ['12 of 12'], '12 of 12, not finished']


def test_texts_of_the_data_stay_text_and_lost_data_is_told(tmp_path: Path) -> None:
    train_file, dev = tmp_path / 'train.csv', tmp_path / 'dev.csv'
    for file in (train_file, dev):
        with file.open('w') as opened:
            rows = csv.writer(opened)
            rows.writerow(('text', 'label'))
            rows.writerows((f'{HOSTILE} {n}', label) for n in range(8) for label in ('<b>', "'"))
    data = DataConfig(
        source='files', train=str(train_file), evaluation=str(dev), min_frequency=1,
        bucket_lengths=(20,), window_batches=2,
    )  # fmt: skip
    config = dataclasses.replace(small_config(), num_steps=2, data=data)
    train.train(config, epath.Path(tmp_path / 'run'))
    page = page_of(tmp_path, tmp_path / 'run')
    assert page.sections['Confusion matrix'][0] == ['', "said '", 'said <b>']
    (_, _, _, example), *_ = page.sections['Worst mistakes'][1:]
    assert example.startswith(HOSTILE)

    dev.write_text(dev.read_text().replace('alert', 'prompt'))
    changed = page_of(tmp_path, tmp_path / 'run')
    assert (
        'not what the run was trained on: evaluation_data' in changed.words['Evaluation examples']
    )
    dev.unlink()
    lost = page_of(tmp_path, tmp_path / 'run')
    assert 'can not be shown' in lost.words['Evaluation examples']
    assert lost.sections['Facts'] == page.sections['Facts']


def test_curves_are_those_of_ledger_and_summary(classifier_run: Trained, tmp_path: Path) -> None:
    run, summary = classifier_run
    found = curves.read(epath.Path(run))
    rows = ledger.read(epath.Path(run) / 'ledger')
    steps, losses = found['step/loss'].T
    assert steps.tolist() == list(range(1, 13))
    assert losses.tolist() == (rows['loss'].astype(float) / rows['weight']).tolist()
    interval = rows[8:12]
    mean = interval['loss'].sum(dtype=float) / interval['weight'].sum(dtype=float)
    assert found['train/loss'][-1].tolist() == [12, np.float32(mean)]
    for name, value in summary['eval'].items():
        assert found[f'evaluation/{name}'].tolist()[-1] == [12, np.float32(value)]

    (file,) = (run / 'tensorboard').iterdir()
    cut = tmp_path / 'tensorboard' / file.name  # as a crash leaves it
    cut.parent.mkdir()
    cut.write_bytes(file.read_bytes()[:-3])
    left = curves.read(epath.Path(tmp_path))
    assert (
        sum(map(len, left.values()))
        == sum(len(curve) for name, curve in found.items() if not name.startswith('step/')) - 1
    )


def test_plot_draws_a_metric_of_several_runs(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, runs = tmp_path / 'curve.png', [str(classifier_run[0]), str(tmp_path / 'no_metrics')]
    shutil.copytree(classifier_run[0] / 'ledger', Path(runs[1]) / 'ledger')
    assert plot.main([*runs, '--metric=loss', f'--out={out}']) == 0
    both = out.read_bytes()
    assert both.startswith(b'\x89PNG')
    assert plot.main([runs[0], f'--out={out}']) == 0
    assert out.read_bytes() != both
    out.unlink()
    with pytest.raises(SystemExit) as end:
        plot.main([*runs, '--metric=accuracy', f'--out={out}'])
    assert end.value.code == 2
    assert f"{runs[1]}: --metric='accuracy' is not among" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ('make', 'out', 'told'),
    [
        ('none', 'page', 'expected the workdir of a run, found no folder'),
        ('empty', 'page', 'expected the workdir of a run, found no checkpoint'),
        ('run', 'no/page', 'page: can not be written (No such file or directory)'),
        ('run', '', 'can not be written (Is a directory)'),
    ],
)
def test_bad_input_is_one_line(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, make: str, out: str, told: str,
) -> None:  # fmt: skip
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'run').symlink_to(classifier_run[0])
    monkeypatch.setattr(report, 'sections', lambda _: [])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path / make), f'--out={tmp_path / out}'])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert sorted(tmp_path.iterdir()) == before
