"""`make fork` makes a project of one's own: renamed, with a config, in one commit or not at all."""

import os
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from input_pipeline import reviews
from tests import runs
from tests.test_checks import table
from tools import fork

Forked = Callable[..., tuple[int, str]]
LONGEST = 'a-project-with-the-longest-nam'  # 30 characters: no line may become too long
PAGE = (runs.ROOT / 'docs' / 'fork.md').read_text()
NEWS = '3,"Wall St. rises {0}","Stocks, up"\n2,"Reds win","They did, {0}-1"\n'


def git(project: Path, *arguments: str) -> str:
    """Returns what git prints."""
    return runs.printed(['git', *arguments], project, dict(os.environ), 60)


def identify(project: Path, name: str) -> None:
    """Says who commits."""
    git(project, 'config', 'user.name', name)
    git(project, 'config', 'user.email', 'a@example.org')


def committed(project: Path) -> Path:
    """Makes a repository of a copy of the project, with some texts in my/."""
    (project / 'my').mkdir(exist_ok=True)
    (project / 'my' / 'news.csv').write_text(''.join(map(NEWS.format, range(40))))
    split, _ = reviews.make_reviews(120, 40)
    table(project / 'my' / 'train.tsv', zip(*split, strict=True))
    git(project, 'init', '--quiet')
    identify(project, 'A')
    git(project, 'add', '--all')
    git(project, 'commit', '--quiet', '--message=Start')
    return project


@pytest.fixture(scope='module')
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a repository that no test may change."""
    return committed(runs.copied(tmp_path_factory.mktemp('template')))


@pytest.fixture
def forked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """(project, flag, ...) -> exit code and errors of the tool, by default without checks."""

    def run(project: Path, *flags: str) -> tuple[int, str]:
        monkeypatch.chdir(project)
        capsys.readouterr()
        try:
            code = fork.main(['--check=', *flags])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capsys.readouterr().err

    return run


def test_every_part_that_can_be_dropped_has_a_name_and_files() -> None:
    parts = fork.parts(PAGE)
    assert {'seq2seq', 'multilabel', 'slurm', 'kubernetes', 'tpu', 'sweep', 'export'} <= set(parts)
    lines = re.findall(r'^rm .*$', PAGE, re.MULTILINE)
    patterns = [pattern for found in parts.values() for pattern in found]
    assert len(patterns) == sum(len(line.partition('#')[0].split()) - 2 for line in lines)
    for name, found in parts.items():  # those of a part that was deleted are all gone
        there = [any(runs.ROOT.glob(pattern)) for pattern in found]
        assert all(there) or not any(there), name


def test_project_is_renamed_configured_and_trimmed_in_one_commit(
    tmp_path: Path, forked: Forked
) -> None:
    project = committed(runs.copied(tmp_path))
    columns = '--columns=class,title,body', '--text_features=title,body', '--label_feature=class'
    (project / 'notes.txt').write_text('not tracked')
    flags = f'--name={LONGEST}', '--data=my/news.csv', '--drop=sweep,slurm', *columns
    kept = git(project, 'ls-files', '*seq2seq*', 'launch/k8s')
    assert forked(project, *flags) == (0, '')
    assert git(project, 'rev-list', '--count', 'HEAD') == '2\n'
    assert git(project, 'status', '--porcelain') == '?? notes.txt\n'
    assert len(git(project, 'worktree', 'list').splitlines()) == 1

    config = project / 'configs' / 'a_project_with_the_longest_nam.py'
    assert len(config.read_text().partition('def ')[2].splitlines()) <= 20
    options = "columns=('class', 'title', 'body'), text_features=('title', 'body'), label_feature='"
    assert options in ' '.join(config.read_text().split())
    assert 'Returns 178 epochs of 72 texts.' in config.read_text()
    pyproject = tomllib.loads((project / 'pyproject.toml').read_text())
    assert pyproject['project']['name'] == LONGEST
    assert f"'{LONGEST}'" in (project / 'runtime' / 'backend.py').read_text()
    left = git(project, 'grep', '-liE', 'keyfold|make fork|tools.fork|make_fork')
    assert (project / 'README.md').read_text().startswith('# AProjectWithTheLongestNam')
    assert left.split() == ['CHANGELOG.md']
    gone = ('tools/fork.py', 'tests/test_make_fork.py', 'tools/sweep.py', 'launch/slurm.sbatch')
    assert not any((project / path).exists() for path in gone)
    assert git(project, 'ls-files', '*seq2seq*', 'launch/k8s') == kept
    runs.shell(project, 'ruff format --check . ; ruff check .')
    assert 'fork' not in runs.shell(project, 'make help')


@pytest.mark.parametrize(
    ('flags', 'problem'),
    [
        ('--name=My_Task', 'NAME=My_Task: expected at most 30 small letters, digits and hyphens'),
        ('--name=', 'NAME=: expected at most 30'),
        (f'--name={LONGEST}e', 'expected at most 30'),
        ('--name=keyfold', 'NAME=keyfold: expected a new name'),
        ('--name=reviews', 'NAME=reviews: expected a new name, but configs/reviews.py exists'),
        ('--drop=slrm', "--drop: 'slrm' is not among"),
        ('--data=', 'DATA=: expected a file of texts'),
        ('--data=my/nothing.tsv', 'my/nothing.tsv: no such file'),
        ('--data=my/news.csv', "my/news.csv:1: column 'text' is not among"),
        ('--evaluation=my/nothing.tsv', 'my/nothing.tsv: no such file'),
    ],
)
def test_refusal_is_one_line_and_changes_nothing(
    template: Path, forked: Forked, flags: str, problem: str
) -> None:
    before = git(template, 'rev-parse', 'HEAD')
    code, errors = forked(template, '--name=mytask', '--data=my/train.tsv', flags)
    assert (code, len(errors.splitlines())) == (2, 1), errors
    assert problem in errors
    assert git(template, 'rev-parse', 'HEAD') == before
    assert not git(template, 'status', '--porcelain')


@pytest.mark.parametrize('fault', ['changed', 'no repository', 'no name', 'failing check'])
def test_fault_of_the_checkout_changes_nothing(
    tmp_path: Path, template: Path, forked: Forked, fault: str
) -> None:
    project = tmp_path / 'project'
    git(tmp_path, 'clone', '--quiet', str(template), 'project')
    identify(project, '' if fault == 'no name' else 'A')
    (project / 'my').symlink_to(template / 'my')
    flags, problem, code = '--check=', '', 2
    if fault == 'changed':
        (project / 'train.py').write_text('')
        problem = 'train.py: differs from the last commit; commit or stash it first'
    elif fault == 'no repository':
        (project / '.git').rename(tmp_path / 'moved')
        problem = 'git'
    elif fault == 'no name':
        problem = 'git var'
    else:
        flags, problem, code = '--check=nothing', 'nothing was changed', 1
    before = {path: path.read_bytes() for path in project.glob('*/*.py')}
    found, errors = forked(project, '--name=mytask', '--data=my/train.tsv', flags)
    assert (found, len(errors.splitlines())) == (code, 1)
    assert problem in errors
    assert {path: path.read_bytes() for path in project.glob('*/*.py')} == before
    if fault != 'no repository':
        assert git(project, 'rev-list', '--count', 'HEAD') == '1\n'
        assert len(git(project, 'worktree', 'list').splitlines()) == 1


@pytest.mark.long
def test_fork_passes_its_checks_trains_and_resumes_an_old_run(tmp_path: Path) -> None:
    """By `make fork` without the second task, and then without the rest, by rm alone."""
    project = committed(runs.copied(tmp_path))

    def train(config: str, workdir: str, steps: int) -> str:
        small = runs.SMALL['configs/reviews.py'] if 'reviews' in config else runs.STEPS
        options = small | {'num_shards': 2, 'optimizer.decay_steps': 12, 'num_steps': steps}
        flags = shlex.join(f'--config.{name}={value}' for name, value in options.items())
        return runs.shell(project, f'python train.py --config={config} --workdir={workdir} {flags}')

    train('configs/reviews.py', 'runs/old', 6)
    lines = re.findall(r'^rm .*$', PAGE, re.MULTILINE)
    task = [line for line in lines if line.endswith(' # seq2seq')]
    patterns = [pattern for line in task for pattern in line.partition('#')[0].split()[2:]]
    gone = [path.stem for pattern in patterns for path in project.glob(pattern)]
    printed = runs.shell(
        project, 'make fork NAME=my-task DATA=my/train.tsv ARGS="--drop=seq2seq" 2>&1'
    )
    assert re.search(r'\d+ passed', printed)
    assert git(project, 'log', '--format=%s').splitlines()[1:] == ['Start']
    assert not git(project, 'status', '--porcelain')
    left = [
        f'{path.relative_to(project)}: {line.strip()}'
        for path in project.rglob('*.py')
        if '.venv' not in path.parts
        for line in path.read_text().splitlines()
        for name in gone
        if re.search(rf'\b(tasks|model|input_pipeline|configs|tests)[./]{name}\b', line)
        or re.search(rf'\bfrom \w+ import (.*\b)?{name}\b', line)
    ]
    assert gone
    assert not left
    assert 'resumed after step 6' in train('configs/reviews.py', 'runs/old', 12)
    assert 'finished at step 6' in train('configs/my_task.py', 'runs/my-task', 6)

    runs.shell(project, '\n'.join(lines))
    runs.shell(project, 'ruff format --check --quiet . ; ruff check --quiet . ; mypy')
    runs.shell(project, 'make test-fast')
