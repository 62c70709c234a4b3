"""Every program explains briefly how to call it, and train.py lists every option of a config."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

from configs.schema import options
from tests import runs
from tools.arguments import Arguments

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
    output = capsys.readouterr().out
    assert f'python -m {name}' in output
    assert len(output.splitlines()) <= 35
    (parser,) = shown
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize('command', SCRIPTS, ids=str)
def test_help_of_a_program_shows_its_own_flags_and_no_others(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, '--help'], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done
    assert not done.stderr
    assert len(done.stdout.splitlines()) <= 25
    assert f'python {" ".join(command)}' in done.stdout
    if command == ['train.py']:
        lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:4] == '  --']
        own = ['config', 'workdir', 'allow_changes', 'stop_timeout', 'profile', 'join_timeout']
        assert [flag for flag, _ in lines] == [*(f'--{x}' for x in own), '--config.FIELD=VALUE']


@pytest.mark.parametrize('file', ['reviews', pytest.param('sst2', marks=pytest.mark.slow)])
def test_help_with_a_config_lists_every_option_with_its_value_and_meaning(file: str) -> None:
    command = [sys.executable, 'train.py', f'--config=configs/{file}.py', '--help']
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert not done.stderr
    config = importlib.import_module(f'configs.{file}').get_config()
    shown = done.stdout.split('  --config.FIELD=VALUE')[1].splitlines()[1:]
    listed = list(options(config))
    assert shown[::2] == [f'  --config.{name}={value!r}' for name, value, _ in listed]
    for line, (_, _, field) in zip(shown[1::2], listed, strict=True):
        assert line.startswith(f'      {field.metadata["meaning"]}')
        assert ('may differ on a resume' in line) == field.metadata['resumable']
        check = field.metadata['check']
        assert check is None or f'expected: {check[1]}' in line
