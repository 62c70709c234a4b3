"""The documents: links lead somewhere, commands and Python run, the code is read in an hour."""

import fnmatch
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests import runs

README = runs.ROOT / 'README.md'
DOCUMENTS = [README, runs.ROOT / 'SECURITY.md', *sorted((runs.ROOT / 'docs').glob('*.md'))]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LISTING = re.compile(r'# (\S+\.py)\n')  # the first line of a block that is a whole file
COMMAND = re.compile(r'(\$ )?([A-Z_]+=\S+ )*(make|python3?|\.venv/bin/\w+|launch/\S+|sbatch) ')
MOST_WORDS = 14_000  # of the reading path: an hour at 238 words a minute

# Pages whose commands a test of their own runs, beside those with a tests/test_PAGE_docs.py.
OWN_TEST = {'fork.md', 'new_task.md'}

# Commands that another test runs in its own way, by how they begin, and where.
ELSEWHERE = {
    'make test': '.ci/run: make test',
    'make bench': 'tests/test_benchmarks.py: benchmarks',
    'make setup': '.ci/run: make',
    'make train CONFIG=configs/sst2.py': 'tests/test_sst2.py: configs/sst2.py',
    'python -m tools.compile_for': '.ci/run: compile-check',
    '.venv-tpu/bin/python -m tools.compile_for': '.ci/run: compile-check',
    'python -m tools.exactness --config=configs/sst2.py': 'tests/test_processes.py: test_exactness',
    'python -m tools.sweep': 'tests/test_sweep.py: test_trained_here',
    'launch/': 'tests/test_docs.py: test_launchers_accept',
    'export PROJECT_ID=': 'tests/test_docs.py: test_launchers_accept',
    'make image-check': 'tests/test_image.py: test_check_builds',
    'sbatch': 'tests/test_slurm.py: test_job_equals_undisturbed_run',
    'JAX_NUM_CPU_DEVICES=4 sbatch': 'tests/test_slurm.py: runs.environment(devices',
    'make train WORKDIR=gs://': 'tests/test_remote_paths.py: test_run_in_a_bucket',
    'python -m tools.compare_runs gs://': 'tests/test_remote_paths.py: test_tools_read_a_run',
}
OTHERS = {'gcloud', 'ssh-add', 'docker', 'kubectl', 'git', 'tail', 'cat', '$EDITOR'}

# configs/reviews.py as the commands train it here, and what its shorter run changes in them.
SMALL = """

whole = get_config


def get_config() -> Config:
    config = whole()
    config.num_steps, config.batch_size, config.log_every = 8, 16, 4
    config.eval_every = config.checkpoint_every = 4
    config.data.num_train, config.data.num_eval = 200, 60
    config.data.bucket_lengths, config.data.window_batches = (20, 42), 4
    config.model.embedding_size = config.model.hidden_size = 8
    return config
"""
SHORTER = ((r'--step=\d+', '--step=7'), (r'checkpoints/\d+', 'checkpoints/8'),
           (r'--profile=\d+:\d+', '--profile=2:4'))  # fmt: skip


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of each fenced block in a language."""
    for document in DOCUMENTS:
        text = document.read_text()
        for found in FENCE.finditer(text):
            if found[1] == language:
                line = text.count('\n', 0, found.start()) + 2
                yield f'{document.relative_to(runs.ROOT)}:{line}', found[2]


def prose(document: Path) -> str:
    """Returns a document without its fenced blocks."""
    return FENCE.sub('', document.read_text())


def has_own_test(page: Path) -> bool:
    """Returns whether another test runs a page's commands."""
    return page.name in OWN_TEST or (runs.ROOT / f'tests/test_{page.stem}_docs.py').exists()


def commands() -> list[str]:
    """Returns each command once, in order, without comments."""
    lines: list[str] = []
    for where, text in blocks('sh'):
        if not has_own_test(Path(where.partition(':')[0])):
            lines += without_comments(text)
    shown = [line[2:] for _, text in blocks('') for line in text.splitlines() if line[:2] == '$ ']
    shown = [line for line in shown if not line.startswith('head')]  # shows a file of the reader's
    return list(dict.fromkeys(lines + [line.rstrip(' \\') for line in shown]))


def without_comments(block: str) -> list[str]:
    """Returns the commands of a block, one a line."""
    joined = block.replace('\\\n', ' ').splitlines()
    lines = [' '.join(re.sub(r'(^|\s)# .*', '', line).split()) for line in joined]
    return [line for line in lines if line]


def elsewhere(command: str) -> str:
    """Returns the longest known beginning of a command, or ''."""
    command = command.removeprefix('.venv/bin/')
    return max((known for known in ELSEWHERE if command.startswith(known)), key=len, default='')


def removable(path: Path) -> bool:
    """Returns whether docs/fork.md offers to delete a file, or a folder above it."""
    name = str(path.resolve().relative_to(runs.ROOT))
    page = (runs.ROOT / 'docs' / 'fork.md').read_text()
    patterns = re.findall(r'^rm -rf ([^#]+)', page, re.MULTILINE)
    alone = re.findall(r'`(docs/\S+)` can go too', page)  # with the last of several
    return any(
        fnmatch.fnmatch(name, pattern) or name.startswith(f'{pattern}/')
        for pattern in (*' '.join(patterns).split(), *alone)
    )


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r'^#+ (.+)$', prose(document), re.MULTILINE)
    return {
        re.sub(r'[^\w\- ]', '', heading).strip().lower().replace(' ', '-') for heading in headings
    }


def reading_path() -> list[Path]:
    """Returns the files in the README's section whose heading has the word 'hour'."""
    sections = re.split(r'(?m)^#+ ', README.read_text())
    (section,) = (text for text in sections if 'hour' in text.partition('\n')[0])
    return [runs.ROOT / name for name in re.findall(r'[\w./-]+\.(?:py|md)', section)]


def test_the_reading_path_takes_an_hour_and_starts_with_the_story_of_a_run() -> None:
    path = reading_path()
    assert path[0] == runs.ROOT / 'train.py'
    assert len(path) == len(set(path)) > 10
    words = {str(file.relative_to(runs.ROOT)): len(file.read_text().split()) for file in path}
    assert sum(words.values()) <= MOST_WORDS, words


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r'\]\(([^)]+)\)', prose(document)):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = document.parent / name if name else document
        assert target.exists() or removable(target), link
        if anchor and target.exists():
            assert anchor in anchors(target), link


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_files_targets_and_modules_that_a_page_names_exist(document: Path) -> None:
    folders = {path.name for path in runs.ROOT.iterdir() if path.is_dir()} - {'runs'}
    targets = re.findall(r'^([a-z-]+):', (runs.ROOT / 'Makefile').read_text(), re.MULTILINE)
    for code in re.findall(r'`([^`\n]+)`', prose(document)):
        for name in re.findall(
            r'(?<![\w/.])(?:[\w.-]+/)*[\w.-]+\.(?:py|md|sh|sbatch|yaml)\b', code
        ):
            if '/' not in name or name.partition('/')[0] in folders:
                path = runs.ROOT / name
                assert path.exists() or removable(path), name
        for target in re.findall(r'^make ([a-z-]+)', code):
            assert target in targets, code
    for module in re.findall(r'python -m ([\w.]+)', document.read_text()):
        path = runs.ROOT / module.replace('.', '/')
        found = path.with_suffix('.py').exists() or (path / '__main__.py').exists()
        assert found or removable(path.with_suffix('.py')), module


PYTHON = {where: text for where, text in blocks('python') if not LISTING.match(text)}


@pytest.mark.parametrize('where', PYTHON)
def test_python_of_the_documents_runs_and_prints_what_its_comments_say(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PYTHON[where]
    exec(compile(text, where, 'exec'), {'__name__': 'documents'})
    comments = [line.rpartition('# ')[2].split() for line in text.splitlines() if '# ' in line]
    for line in capsys.readouterr().out.splitlines():
        assert line.split() in comments


def test_commands_are_in_blocks_marked_as_sh() -> None:
    unmarked = [
        f'{where}: {line}'
        for where, text in blocks('')
        for line in text.splitlines()
        if COMMAND.match(line) and not line.startswith('$ ')
    ]
    assert not unmarked


def test_commands_that_are_not_run_here_are_run_elsewhere() -> None:
    for command, place in ELSEWHERE.items():
        file, _, mark = place.partition(': ')
        path = runs.ROOT / file
        if path.exists() or not removable(path):
            assert mark in path.read_text(), command


@pytest.mark.skipif(not (runs.ROOT / '.git').exists(), reason='launchers pack a git checkout')
def test_launchers_accept_the_commands_of_their_page_in_a_dry_run() -> None:
    for where, text in blocks('sh'):
        lines = [line for line in without_comments(text) if line.startswith(('export ', 'launch/'))]
        scripts = {line.split()[0] for line in lines} - {'export'}
        if scripts and all((runs.ROOT / script).exists() for script in scripts):
            printed = runs.printed(
                ['bash', '-ec', '\n'.join(lines)], runs.ROOT, os.environ | {'DRY_RUN': '1'}, 60
            )
            assert 'gcloud ' in printed, where


@pytest.mark.long
def test_all_other_commands_run_as_they_are(tmp_path: Path) -> None:
    """In a copy of the project whose configs/reviews.py is small, in the order of the documents."""
    project = runs.copied(tmp_path)
    with (project / 'configs' / 'reviews.py').open('a') as config:
        config.write(SMALL)
    ours = [
        command
        for command in commands()
        if not elsewhere(command) and shlex.split(command)[0] not in OTHERS
    ]
    assert ours[0] == 'make train'
    for command in ours:
        for shown, here in SHORTER:
            command = re.sub(shown, here, command)
        module = re.search(r'python -m ([\w.]+)', command)
        file = project / f'{module[1].replace(".", "/")}.py' if module else project
        if file.exists():
            printed = runs.shell(project, command)
            silent = command.startswith(('cp ', 'rm ')) or '--out=' in command or '>' in command
            assert printed.strip() or silent, command


def test_picture_of_the_keys_shows_the_keys_as_they_are(tmp_path: Path) -> None:
    from docs import pictures

    pictures.draw_keys(tmp_path / 'keys.png')
    now, then = (
        matplotlib.image.imread(folder / 'keys.png') for folder in (tmp_path, pictures.DOCS)
    )
    assert now.shape == then.shape
    assert np.mean(np.abs(now - then) > 0.2) < 0.01  # other masks differ in far more places
