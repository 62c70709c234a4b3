"""What README.md and docs/ show is so: their Python runs, and their commands do."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests import runs

DOCUMENTS = [runs.ROOT / 'README.md', *sorted((runs.ROOT / 'docs').glob('*.md'))]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LISTING = re.compile(
    r'# (\S+\.py)\n'
)  # the first line of a block that is a file: tests/test_fork.py
COMMAND = re.compile(r'(\$ )?([A-Z_]+=\S+ )*(make|python3?|\.venv/bin/\w+|launch/\S+|sbatch) ')

# Commands that a test runs in its own way, by how they begin.
ELSEWHERE = {
    'make test': '.ci/run: make test',
    'make bench': 'tests/test_benchmarks.py: test_one_command',
    'python -m tools.compile_for': '.ci/run: compile-check',
    'make setup': '.ci/run: VENV=.venv-tpu ACCELERATOR=tpu',
    'make train CONFIG=configs/sst2.py': 'tests/test_sst2.py: configs/sst2.py',
    'python -m tools.exactness --config=configs/sst2.py': 'tests/test_processes.py: test_exactness',
    'make exactness': 'tests/test_fork.py: test_another_model',
    'python -m tools.sweep': 'tests/test_sweep.py: test_trained_here',
    'launch/tpu_vm.sh': 'tests/test_tpu_vm.py: test_dry_run_prints',
    'export PROJECT_ID=': 'tests/test_tpu_vm.py: PROJECT_ID',
    'sbatch': 'tests/test_slurm.py: test_job_equals_undisturbed_run',
    'JAX_NUM_CPU_DEVICES=4 sbatch': 'tests/test_slurm.py: runs.environment(devices',
    'make train WORKDIR=gs://': 'tests/test_remote_paths.py: test_run_in_a_bucket',
    'python -m tools.compare_runs gs://': 'tests/test_remote_paths.py: test_tools_read_a_run',
    'make train CONFIG=configs/addition.py': 'tests/test_seq2seq_runs.py: addition.py',  # seq2seq
    'python -m tools.exactness --config=configs/add': 'tests/test_seq2seq_runs.py',  # seq2seq
}
OTHERS = {'gcloud', 'ssh-add', 'docker', 'kubectl', 'git', 'tail', 'cat', '$EDITOR', 'pip'}
TAKES = {'--step=790': '--step=7'}  # in a run that is shorter

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


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of each fenced block."""
    for document in DOCUMENTS:
        text = document.read_text()
        for found in FENCE.finditer(text):
            if found[1] == language:
                line = text.count('\n', 0, found.start()) + 2
                yield f'{document.relative_to(runs.ROOT)}:{line}', found[2]


def commands() -> list[str]:
    """Each command once, in order, without its comment; docs/fork.md has a test of its own."""
    lines = []
    for where, text in blocks('sh'):
        if not where.startswith('docs/fork.md'):
            joined = text.replace('\\\n', ' ').splitlines()
            lines += [' '.join(re.sub(r'(^|\s)# .*', '', line).split()) for line in joined]
    shown = [line[2:] for _, text in blocks('') for line in text.splitlines() if line[:2] == '$ ']
    shown = [line for line in shown if not line.startswith('head')]  # of a file of the reader's
    return list(dict.fromkeys(filter(None, lines + [line.rstrip(' \\') for line in shown])))


def elsewhere(command: str) -> str:
    """The longest known beginning of a command, if there is one."""
    command = command.removeprefix('.venv/bin/')
    return max((known for known in ELSEWHERE if command.startswith(known)), key=len, default='')


PYTHON = {where: text for where, text in blocks('python') if not LISTING.match(text)}


@pytest.mark.parametrize('where', PYTHON)
def test_python_of_the_documents_runs(where: str) -> None:
    exec(compile(PYTHON[where], where, 'exec'), {'__name__': 'documents'})


def test_commands_stand_in_blocks_that_are_marked_as_such() -> None:
    """So that none is overlooked."""
    unmarked = [
        f'{where}: {line}'
        for where, text in blocks('')
        for line in text.splitlines()
        if COMMAND.match(line) and not line.startswith('$ ')
    ]
    assert not unmarked
    assert len(commands()) > 30


def test_commands_that_are_not_run_here_are_run_where_it_is_said() -> None:
    known = {elsewhere(command) for command in commands()} - {''}
    assert known == set(ELSEWHERE), 'no document has it any more'
    for command, place in ELSEWHERE.items():
        file, _, mark = place.partition(': ')
        assert mark in (runs.ROOT / file).read_text(), command


def test_targets_and_modules_that_are_spoken_of_exist() -> None:
    targets = re.findall(r'^([a-z-]+):', (runs.ROOT / 'Makefile').read_text(), re.MULTILINE)
    for document in DOCUMENTS:
        text = FENCE.sub('', document.read_text())
        for target in re.findall(r'`make ([a-z-]+)', text):
            assert target in targets, document
        for module in re.findall(r'`python -m ([\w.]+)', text):
            path = runs.ROOT / module.replace('.', '/')
            assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), document
        for link in re.findall(r'\]\(([^)#:]+)[)#]', document.read_text()):
            assert (document.parent / link).exists(), f'{document}: {link}'


@pytest.mark.launch
def test_all_other_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In a copy of the project whose configs/reviews.py is small, in the order of the documents."""
    project = runs.copied(tmp_path)
    with (project / 'configs' / 'reviews.py').open('a') as config:
        config.write(SMALL)
    ours = [
        command
        for command in commands()
        if not elsewhere(command) and shlex.split(command)[0] not in OTHERS
    ]
    assert len(ours) >= 10
    for command in ours:
        for shown, here in TAKES.items():
            command = command.replace(shown, here)
        printed = runs.shell(project, command)
        assert printed.strip() or '--out=' in command, command
    written = {'report.html', 'accuracy.png', 'exported', 'runs'}
    assert written <= {path.name for path in project.iterdir()}


def test_picture_of_the_keys_shows_the_keys_as_they_are(tmp_path: Path) -> None:
    from docs import pictures

    pictures.draw_keys(tmp_path / 'keys.png')
    now, then = (
        matplotlib.image.imread(folder / 'keys.png') for folder in (tmp_path, pictures.DOCS)
    )
    assert now.shape == then.shape
    assert np.mean(np.abs(now - then) > 0.2) < 0.01  # other masks differ in far more places


def test_pictures_are_small() -> None:
    pictures = [*(runs.ROOT / 'docs').glob('*.png')]
    assert len(pictures) == 2
    assert all(picture.stat().st_size < 60_000 for picture in pictures)
