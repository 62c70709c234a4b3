"""The promises of tools/report.py and tools/plot.py: a page that is whole by itself, and honest."""

import collections
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from etils import epath

import train
from errors import UserError
from input_pipeline import reviews
from runtime import ledger
from runtime.run_record import seal
from tasks.classification import DataConfig
from tests.test_resume import small_config
from tools import curves, plot, report

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]
HOSTILE = '<script>alert("1")</script> &amp; \'</td>'
KNOWN_TAGS = {
    *('html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'section', 'p', 'mark'),
    *('table', 'tr', 'th', 'td', 'div'),
    *('svg', 'g', 'path', 'defs', 'clippath', 'rect', 'text', 'use'),
}


class Page(HTMLParser):
    """Collects the texts of a page, of table cells by section, and everything that it loads."""

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


def page_of(tmp_path: Path, *runs: Path | str) -> Page:
    """Returns the page that the command writes."""
    out = tmp_path / 'report.html'
    assert report.main([*map(str, runs), f'--out={out}']) == 0
    text = out.read_text()
    assert 'name="viewport" content="width=device-width' in text
    assert '@media (max-width: 45rem)' in text
    page = Page(text)
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
    record = json.loads((run / 'checkpoints/12/run/metadata').read_text())
    assert facts['steps'] == '12 of 12'
    assert facts['root key'] == summary['root_key']
    assert facts['state fingerprint'] == summary['state_fingerprint'][:16]
    assert facts['shards'] == str(summary['num_shards'])
    assert re.fullmatch(r'20\d\d-\d\d-\d\d \d\d:\d\d UTC', facts['date of the checkpoint'])
    assert facts['data'] == 'source reviews, num_train 200, num_eval 70'
    assert facts['training data (SHA-256)'] == record['task']['training_data'][:16]
    assert facts['code'].startswith(record['manifest']['code']['commit'][:12])
    evaluations = dict(curves.read(epath.Path(run))['evaluation/accuracy'].tolist())
    best = max(evaluations, key=lambda step: evaluations[step])
    assert facts['best evaluation'] == f'step {best:.0f}, accuracy {evaluations[best]:.4f}'
    head, (_, *values) = page.sections['Final metrics']
    assert head == ['run', 'step', *summary['eval']]
    assert values == ['12', *(f'{value:.4f}' for value in summary['eval'].values())]
    settings = dict(page.sections['Settings other than the defaults'])
    assert settings['data.bucket_lengths (default [8, 16, 32, 64, 128])'] == '[42]'
    assert settings['optimizer.learning_rate (default 0.002)'] == '0.003'
    assert not any('optimizer.clip_norm' in name for name in settings)
    *modules, (_, total) = page.sections['Parameters'][1:]
    structure = json.loads((run / 'checkpoints/12/run/metadata').read_text())['manifest'][
        'structure'
    ]
    shapes = [json.loads(x[7:]) for name, x in structure.items() if name.startswith('.params')]
    assert int(total.replace(',', '')) == sum(int(np.prod(shape)) for shape in shapes)
    assert sum(int(size.replace(',', '')) for _, size in modules) == int(total.replace(',', ''))
    assert 'gradient norm' in page.words['Learning curves']

    head, *rows = page.sections['Confusion matrix']
    assert head == ['true / predicted', *reviews.LABEL_NAMES, 'recall']
    confusion = np.array([row[1:-1] for row in rows], int)
    recalls = np.diag(confusion) / confusion.sum(axis=1)
    assert [row[-1] for row in rows] == [f'{recall:.1%}' for recall in recalls]
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
    assert 'The darker a word, the more attention' in page.words['Worst mistakes']
    originals = set(reviews.make_reviews(data.num_train, data.num_eval)[1][0])
    assert {text for *_, text in mistakes} <= originals, 'not the words of the data'


def test_sweep_is_grouped_by_its_settings_and_only_seeds_are_averaged(
    classifier_run: Trained, tmp_path: Path
) -> None:
    """Six runs: copies of one whose records and summaries say other settings and metrics."""
    run, summary = classifier_run
    runs = []
    for number, (rate, seed) in enumerate(itertools.product((0.003, 0.01), (0, 1, 2))):
        copy = tmp_path / 'sweep' / f'$x^2$ <b> {rate}_{seed}'
        shutil.copytree(run, copy)
        file = copy / 'checkpoints/12/run/metadata'
        record = json.loads(file.read_text())
        record['config'] |= {'optimizer.learning_rate': rate, 'seed': seed}
        file.write_text(json.dumps(seal(record)))
        changed = summary | {'eval': {'loss': 0.5, 'accuracy': number / 10}}
        (copy / 'summary.json').write_text(json.dumps(changed))
        runs.append(copy)
    shutil.rmtree(runs[5] / 'ledger')
    (runs[5] / 'metrics.csv').unlink()
    (runs[5] / 'summary.json').unlink()
    page = page_of(tmp_path, *runs)
    head, *rows = page.sections['Final metrics']
    assert head == ['run', 'seed', 'optimizer.learning_rate', 'step', 'loss', 'accuracy']
    assert [row[0] for row in rows] == [run.name for run in runs]
    assert rows[4][1:] == ['1', '0.01', '12', '0.5000', '0.4000']
    assert rows[5][1:] == ['2', '0.01', '12', 'none yet', 'none yet']
    assert page.sections['Mean over seeds'] == [
        ['optimizer.learning_rate', 'seeds', 'loss', 'accuracy'],
        ['0.003', '3', '0.5000 ± 0.0000', '0.1000 ± 0.1000'],
        ['0.01', '2', '0.5000 ± 0.0000', '0.3500 ± 0.0707'],
    ]
    assert runs[4].name in page.words['Learning curves']
    assert runs[5].name not in page.words['Learning curves']
    _, *shared = [row for row in page.sections['Facts'] if len(row) == 2]
    assert dict(shared)['shards'] == str(summary['num_shards']), 'the same in all runs'
    head, *rows = [row for row in page.sections['Facts'] if len(row) != 2]
    assert [row[0] for row in rows] == [run.name for run in runs]
    steps = [row[head.index('steps')] for row in rows]
    assert steps == [*5 * ['12 of 12'], '12 of 12, not finished']
    assert 'Mean over seeds' not in page_of(tmp_path, runs[0], runs[3]).sections


def test_earlier_step_of_a_finished_run_is_not_called_unfinished(
    classifier_run: Trained, tmp_path: Path
) -> None:
    out = tmp_path / 'report.html'
    assert report.main([str(classifier_run[0]), '--step=6', f'--out={out}']) == 0
    page = Page(out.read_text())
    assert dict(page.sections['Facts'])['steps'] == '6 of 12'
    curve = curves.read(epath.Path(classifier_run[0]))['evaluation/accuracy']
    (shown,) = page.sections['Final metrics'][1:]
    assert f'{dict(curve)[6]:.4f}' in shown


def test_labels_of_a_text_are_shown_with_their_probabilities() -> None:
    shown = {'labels': ['a', 'b'], 'probabilities': {'a': 0.75, 'b': 0.5, 'c': 0.1}}
    assert report.mistake_cells(shown, 'text') == ['a (75.0%), b (50.0%)', 'text']
    assert report.mistake_cells(shown | {'labels': []}, 'text')[0] == 'none'


def test_texts_of_the_data_stay_text_and_lost_data_is_reported(tmp_path: Path) -> None:
    train_file, dev = tmp_path / 'train.csv', tmp_path / 'dev.csv'
    for file in (train_file, dev):
        with file.open('w') as opened:
            rows = csv.writer(opened)
            rows.writerow(('text', 'label'))
            rows.writerows((f'{HOSTILE} {n}', label) for n in range(8) for label in ('<b>', "'"))
    data = DataConfig(
        source='files', train=str(train_file), evaluation=str(dev), min_frequency=1,
        bucket_lengths=(20,), window_batches=2, tokenizer='words',
    )  # fmt: skip
    config = dataclasses.replace(small_config(), num_steps=2, data=data)
    train.train(config, epath.Path(tmp_path / 'run'))
    page = page_of(tmp_path, tmp_path / 'run')
    assert page.sections['Confusion matrix'][0] == ['true / predicted', "'", '<b>', 'recall']
    (_, _, _, example), *_ = page.sections['Worst mistakes'][1:]
    assert example.startswith(HOSTILE)

    dev.write_text(dev.read_text().replace('alert', 'prompt'))
    changed = page_of(tmp_path, tmp_path / 'run')
    assert 'what the run was trained on: evaluation_data' in changed.words['Evaluation examples']
    dev.unlink()
    lost = page_of(tmp_path, tmp_path / 'run')
    assert 'cannot be shown' in lost.words['Evaluation examples']
    facts = [dict(found.sections['Facts']) for found in (lost, page)]
    assert facts[0]['best evaluation'].startswith('step 2, accuracy')
    assert facts[0] == facts[1]

    # A record that holds it gives the best evaluation, and --step=best, without the data.
    file = tmp_path / 'run/checkpoints/2/run/metadata'
    record = json.loads(file.read_text())
    record['manifest']['best_metric'] = 'accuracy'
    file.write_text(json.dumps(seal(record)))
    best = page_of(tmp_path, tmp_path / 'run', '--step=best')
    assert dict(best.sections['Facts'])['best evaluation'].startswith('step 2, accuracy')


def test_curves_are_those_of_ledger_and_summary(classifier_run: Trained, tmp_path: Path) -> None:
    run, summary = classifier_run
    found = curves.read(epath.Path(run))
    rows = ledger.read(epath.Path(run) / 'ledger')
    steps, losses = found['step/loss'].T
    assert steps.tolist() == list(range(1, 13))
    assert losses.tolist() == (rows['loss'].astype(float) / rows['weight']).tolist()
    interval = rows[8:12]
    mean = interval['loss'].sum(dtype=float) / interval['weight'].sum(dtype=float)
    assert found['train/loss'][-1].tolist() == [12, mean]
    for name, value in summary['eval'].items():
        assert found[f'evaluation/{name}'].tolist()[-1] == [12, value]

    damaged = tmp_path / 'metrics.csv'
    damaged.write_bytes((run / 'metrics.csv').read_bytes() + b'13')
    with pytest.raises(UserError, match=r'metrics\.csv: damaged'):
        curves.read(epath.Path(tmp_path))


def test_plot_draws_a_metric_of_several_runs_in_the_format_of_the_name(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = 'a run with a name so long that a legend of it would be wider than the picture itself'
    runs = [str(classifier_run[0]), str(tmp_path / name)]
    shutil.copytree(classifier_run[0] / 'ledger', Path(runs[1]) / 'ledger')
    begins = {'png': b'\x89PNG', 'pdf': b'%PDF', 'svg': b'<?xml'}
    for kind, magic in begins.items():
        out = tmp_path / f'curve.{kind}'
        assert plot.main([*runs, '--metric=loss', f'--out={out}']) == 0
        assert out.read_bytes().startswith(magic)
        assert capsys.readouterr().out == f'wrote {out}\n'
    for flags, expected in (
        ([f'--out={tmp_path / "curve.jpg"}'], 'expected a name that ends in .png, .pdf or .svg'),
        (
            ['--metric=accuracy', f'--out={tmp_path / "other.png"}'],
            f"{runs[1]}: --metric='accuracy'",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            plot.main([*runs, *flags])
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
    assert len(list(tmp_path.glob('*.*'))) == len(begins)


def test_special_file_is_written_and_not_replaced(tmp_path: Path) -> None:
    """A report to /dev/stdout must not become a file of that name."""
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    curves.write(str(pipe), b'page')
    assert os.read(reader, 9) == b'page'
    os.close(reader)
    assert pipe.is_fifo()


def test_no_legend_is_cut_off(classifier_run: Trained) -> None:
    curve = curves.read(epath.Path(classifier_run[0]))
    long = {f'a run with quite a long name, number {n}: ' + 80 * 'x': curve for n in range(7)}
    with curves.drawing(long, 'loss') as figure:
        before = figure.get_size_inches()[0] * 150
        pixels = np.asarray(PIL.Image.open(io.BytesIO(curves.image(figure, 'png'))).convert('L'))
    assert pixels.shape[1] > before, 'the names are too short for this test'
    assert (pixels[:, :8] == 255).all(), 'cut off on the left'
    assert (pixels[:, -8:] == 255).all(), 'cut off on the right'


@pytest.mark.parametrize(
    ('make', 'out', 'expected'),
    [
        ('none', 'page', 'expected the workdir of a run, found no folder'),
        ('empty', 'page', 'expected the workdir of a run, found no checkpoint'),
        ('run', 'no/page', 'page: cannot be written (No such file or directory)'),
        ('run', '', 'cannot be written (Is a directory)'),
    ],
)
def test_bad_input_is_one_line(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, make: str, out: str, expected: str,
) -> None:  # fmt: skip
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'run').symlink_to(classifier_run[0])
    monkeypatch.setattr(report, 'sections', lambda _: [])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path / make), f'--out={tmp_path / out}'])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert sorted(tmp_path.iterdir()) == before
