"""docs/quickstart.ipynb runs from top to bottom, and its outputs are what its words say."""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from unittest import mock

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests import runs

pytestmark = pytest.mark.long
NOTEBOOK = runs.ROOT / 'docs' / 'quickstart.ipynb'
CELLS = json.loads(NOTEBOOK.read_text())['cells']
SECONDS = 300  # for a command


def source(kind: str) -> list[str]:
    """Returns the texts of the notebook's cells of a kind."""
    return [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == kind]


def shell(command: str) -> None:
    """Runs a command as a line that begins with ! does, and prints what it prints."""
    print(runs.printed(['bash', '-c', command], Path(), dict(os.environ), SECONDS))


def execute(cell: str, names: dict[str, object]) -> str:
    """Executes a cell; returns what it prints. Any command that fails raises."""
    magic, _, script = cell.partition('\n')
    if magic == '%%bash':
        cell = f'shell({script!r})'
    cell = re.sub(r'(?m)^( *)!(.*)$', lambda line: f'{line[1]}shell({line[2]!r})', cell)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(cell, NOTEBOOK.name, 'exec'), names)
    return printed.getvalue()


def test_notebook_trains_kills_resumes_compares_and_shows_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = runs.copied(tmp_path)
    monkeypatch.chdir(project)
    mpl.use('agg')
    monkeypatch.setattr(plt, 'show', lambda: plt.savefig('shown.png'))
    with mock.patch.dict(os.environ, runs.environment(1)):
        names: dict[str, object] = {'shell': shell}
        printed = [execute(cell, names) for cell in source('code')]
    plt.close('all')
    (project / 'printed').write_text('\n'.join(printed))
    undisturbed, killed, resumed, compared, fingerprints, masks = printed[2:8]
    assert 'step' in undisturbed
    assert set(killed.split()) <= {'0', '20', '40', '60', '80', '100'}
    assert re.search(r'resumed after step [1-9]\d+', resumed)
    assert 'The same run, bit for bit: 120 steps' in compared
    assert len({line.split()[-1] for line in fingerprints.splitlines()}) == 1
    assert masks.strip().endswith(': equal')
    assert np.ptp(plt.imread('shown.png')) > 0.5  # a picture, not a blank one


def test_notebook_is_clean_and_its_links_lead_somewhere() -> None:
    """Outputs would show one machine, and change with every run."""
    assert not any(cell.get('outputs') or cell.get('execution_count') for cell in CELLS)
    links = re.findall(r'\]\((\S+?)\)', '\n'.join(source('markdown')))
    assert links
    assert all((NOTEBOOK.parent / link).exists() for link in links)
