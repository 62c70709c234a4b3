"""Makes the template a project of your own, in one commit.

    python -m tools.fork --name=mytask --data=my/train.tsv [--drop=seq2seq,slurm]

`make fork NAME=mytask DATA=my/train.tsv [ARGS=--drop=seq2seq]` sets up first, then calls it.
Renames the project (package, cache folder, image, jobs), writes configs/mytask.py for the texts in
DATA, deletes this tool and what --drop names, and commits if lint and fast tests pass. All of it
happens in a temporary checkout: if something is refused or fails, your files stay as they are.

Exit code 0: committed, 1: lint or a test failed, 2: bad input.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs import schema
from configs.schema import Config
from errors import UserError
from input_pipeline.examples import brief, not_among
from tasks.classification import DataConfig, ModelConfig, make_task
from tools.arguments import Arguments, one_line_errors, run_tool

TEMPLATE = 'keyfold'
NAME = re.compile(r'[a-z]([a-z0-9-]{0,28}[a-z0-9])?')  # as images, jobs and TPU slices are named
LONGEST = 256  # tokens of a text that are read
EPOCHS = 5
# This tool: its files, and what else mentions it, by file.
OWN = ('tools/fork.py', 'tests/test_make_fork.py')
MENTIONS = {
    'Makefile': r'\.PHONY: fork\n(?:.+\n)+\n',
    'README.md': r'`make fork .*\n',
    'docs/fork.md': r'.*#in-one-command.*\n|## In one command\n(?:(?!## ).*\n)+',
}
CONFIG = '''"""Classifies the texts in {file}.

Command:  make train CONFIG={path}
"""

from configs.schema import Config
from tasks.classification import DataConfig, ModelConfig


def get_config() -> Config:
    """Returns {epochs:.0f} epochs of {rows:,} texts."""
    return Config(
        num_steps={steps}, num_shards=2,
        data=DataConfig(
            source='files', train={data.train!r}, evaluation={data.evaluation!r}, {columns}
            bucket_lengths={widths}
        ),
        model=ModelConfig(),
    )
'''


def git(*arguments: str | Path, folder: Path | None = None) -> str:
    """Returns what git prints. Raises UserError with its own words if it fails."""
    done = subprocess.run(['git', *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'git {arguments[0]}: {done.stderr}')
    return done.stdout


def parts(page: str) -> dict[str, list[str]]:
    """Returns the patterns of files that docs/fork.md offers to delete, by the part's name."""
    found: dict[str, list[str]] = {}
    for patterns, part in re.findall(r'^rm -rf (.+?) +# (\S+)$', page, re.MULTILINE):
        found.setdefault(part, []).extend(patterns.split())
    return found


def config_text(data: DataConfig, path: str) -> str:
    """Returns a config for the texts that `data` names. Raises UserError if they cannot be used."""
    config = Config(data=data, model=ModelConfig())
    schema.check(config)
    lengths = make_task(config).train.lengths
    widths = {8 * -(-int(np.quantile(lengths, q)) // 8) for q in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
    columns = [
        f'{name}={getattr(data, name)!r},'
        for name in ('columns', 'text_features', 'label_feature')
        if getattr(data, name) != getattr(DataConfig(), name)
    ]
    steps = max(200, EPOCHS * len(lengths) // config.batch_size)
    return CONFIG.format(
        data=data,
        file=brief.repr(Path(data.train).name).strip("'"),
        path=path,
        epochs=steps * config.batch_size / len(lengths),
        rows=len(lengths),
        steps=steps,
        columns=' '.join(columns),
        widths=tuple(sorted(widths)),
    )


def change(copy: Path, name: str, patterns: Sequence[str]) -> None:
    """Renames the project in a checkout, and deletes from it what is not wanted."""
    git('rm', '-rq', '--ignore-unmatch', '--', *OWN, *patterns, folder=copy)
    for file, mention in MENTIONS.items():
        text = (copy / file).read_text()
        (copy / file).write_text(re.sub(f'(?m)^(?:{mention})', '', text))
    title, constant = name.title().replace('-', ''), name.upper().replace('-', '_')
    spellings = {TEMPLATE: name, TEMPLATE.title(): title, TEMPLATE.upper(): constant}
    for file in git('grep', '-lIFi', TEMPLATE, '--', ':!CHANGELOG.md', folder=copy).splitlines():
        text = (copy / file).read_text()
        for old, new in spellings.items():
            text = text.replace(old, new)
        (copy / file).write_text(text)


def passes(copy: Path, targets: Sequence[str]) -> bool:
    """Returns whether make's targets pass in a checkout, with the .venv of this process."""
    venv = copy / '.venv'
    venv.symlink_to(sys.prefix)
    # The checkout's requirements are newer than the set-up, but the same.
    ready = [f'--old-file=.venv/{file.name}' for file in venv.glob('ready-*')]
    environment = {key: value for key, value in os.environ.items() if key != 'MAKEFLAGS'}
    done = subprocess.run(['make', *ready, *targets], cwd=copy, env=environment)
    return done.returncode == 0


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Forks the project in the current folder; returns the exit code."""
    parser = Arguments(__doc__)
    add = parser.add_argument
    add('--name', required=True, help='of the project and of its config')
    add('--data', required=True, metavar='FILE', help='texts with labels: .tsv, .csv or .jsonl')
    add('--evaluation', default='10%', help='another file, or a share of the texts (default: 10%%)')
    add('--columns', default='', metavar='A,B,..', help='names, if the table has no header line')
    add('--text_features', default='text', metavar='A,B,..', help='columns to read')
    add('--label_feature', default='label', metavar='A', help='column with the class')
    add('--drop', default='', metavar='A,B,..', help='what to delete: see docs/fork.md')
    add('--check', default='lint test-fast', metavar='TARGETS', help='what make runs before')
    given = parser.parse_args(argv)
    name, offered = given.name, parts(Path('docs/fork.md').read_text())
    path = f'configs/{name.replace("-", "_")}.py'
    if not NAME.fullmatch(name):
        raise UserError(
            f'NAME={name}: expected at most 30 small letters, digits and hyphens, a letter first'
        )
    if name == TEMPLATE or Path(path).exists():
        raise UserError(f'NAME={name}: expected a new name, but {path} exists')
    if not given.data:
        raise UserError('DATA=: expected a file of texts and labels (.tsv, .csv or .jsonl)')
    drop = [part for part in given.drop.split(',') if part]
    for part in drop:
        if part not in offered:
            raise UserError(f'--drop: {not_among(part, offered)}')
    git('var', 'GIT_AUTHOR_IDENT')
    if changed := git('status', '--porcelain', '--untracked-files=no').splitlines():
        raise UserError(f'{changed[0][3:]}: differs from the last commit; commit or stash it first')
    data = DataConfig(
        source='files',
        train=given.data,
        evaluation=given.evaluation,
        columns=tuple(filter(None, given.columns.split(','))),
        text_features=tuple(given.text_features.split(',')),
        label_feature=given.label_feature,
        bucket_lengths=(LONGEST,),
    )
    text = config_text(data, path)

    folder = Path(tempfile.mkdtemp())
    copy = folder / name
    try:
        git('worktree', 'add', '--detach', '--quiet', copy)
        change(copy, name, [pattern for part in drop for pattern in offered[part]])
        (copy / path).write_text(text)
        subprocess.run(
            [sys.executable, '-m', 'ruff', 'format', '--quiet', '.'], cwd=copy, check=True
        )
        targets = given.check.split()
        if targets and not passes(copy, targets):
            print('error: the checks above failed, so nothing was changed', file=sys.stderr)
            return 1
        git('add', '--all', folder=copy)
        git('commit', '--quiet', f'--message=Make the template the project {name}', folder=copy)
        git('merge', '--ff-only', '--quiet', git('rev-parse', 'HEAD', folder=copy).strip())
    finally:
        shutil.rmtree(folder)
        git('worktree', 'prune')
    print(git('show', '--shortstat', '--format=%h %s').strip())
    print(f'Next: make train CONFIG={path}')
    return 0


if __name__ == '__main__':
    run_tool(main)
