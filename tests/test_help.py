"""Every program says in short what it takes, and one page has every field of a config."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

from configs.schema import Config, options
from runtime.command_line import Arguments
from tests import runs
from tools import knob_table

PROGRAMS = sorted(
    f'{file.parent.name}.{file.stem}'
    for folder in ('tools', 'launch')
    for file in (runs.ROOT / folder).glob('*.py')
    if "__name__ == '__main__'" in file.read_text()
)
WITH_FLAGS = {'tools.exactness', 'tools.compile_for'}  # of absl, which has one set in a process
SCRIPTS = [['-m', name] for name in sorted(WITH_FLAGS)] + [['train.py']]


@pytest.mark.parametrize('name', sorted(set(PROGRAMS) - WITH_FLAGS - {'tools.predict_exported'}))
def test_help_of_a_tool_shows_how_it_is_called_and_every_argument(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Arguments] = []
    print_help = Arguments.print_help
    monkeypatch.setattr(
        Arguments, 'print_help', lambda self: (shown.append(self), print_help(self))
    )
    program: Any = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        program.main(['--help'])
    assert not end.value.code
    told = capsys.readouterr().out
    assert f'python -m {name}' in told
    assert len(told.splitlines()) <= 35
    (parser,) = shown
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize('command', [*SCRIPTS, ['tools/predict_exported.py']], ids=str)
def test_help_of_a_program_shows_its_own_flags_and_no_others(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, '--help'], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done
    assert not done.stderr
    assert len(done.stdout.splitlines()) <= 25
    assert f'python {" ".join(command)}'.replace('tools/predict_exported', 'predict') in done.stdout
    if command == ['train.py']:
        lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:4] == '  --']
        own = ['config', 'workdir', 'allow_changes', 'stop_timeout', 'profile', 'join_timeout']
        assert [flag for flag, _ in lines] == [f'--{name}' for name in own]
        assert 'docs/config.md' in done.stdout


def test_page_of_config_fields_is_what_configs_declares() -> None:
    page = (runs.ROOT / 'docs' / 'config.md').read_text()
    assert page == '\n'.join(knob_table.page()) + '\n', 'out of date: make docs'
    rows = [line.split(' | ') for line in page.splitlines() if line.startswith('| `')]
    written = {(row[0], row[2], row[-1]) for row in rows}
    configs = [Config()]
    for config in configs:
        for name, default, field in options(config):
            free = 'free |' if field.metadata['free'] else ' |'
            assert (f'| `{name}`', f'`{default!r}`', free) in written
