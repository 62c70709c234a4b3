"""The lock pins what pyproject.toml asks for, and make sets up .venv with it, safely."""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from launch import local_pod

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
FILES = ('requirements.txt', 'requirements-extras.txt')
PYTHONS = ('3.11', '3.12', '3.13', '3.14')
NAMES = ('python3.14', 'python3.13', 'python3.12', 'python3.11', 'python3', 'python')


def applies(requirement: Requirement, python: str) -> bool:
    """Whether a requirement's marker holds on Linux with this Python."""
    environment = {name: str(value) for name, value in default_environment().items()}
    environment |= {'python_version': python, 'python_full_version': f'{python}.0'}
    environment |= {'sys_platform': 'linux', 'platform_machine': 'x86_64', 'extra': ''}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def lines(file: str) -> list[str]:
    """The lines of a requirements file that are not comments."""
    return [line for line in (ROOT / file).read_text().splitlines() if not line.startswith('#')]


def pins(python: str, files: tuple[str, ...] = FILES) -> dict[str, Version]:
    """The version of each package that the files pin for this Python."""
    found: dict[str, Version] = {}
    for line in (line for file in files for line in lines(file) if line[:3] != '-c '):
        requirement = Requirement(line)
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name not in found, f'{name} is pinned twice for Python {python}'
            found[name] = Version(str(requirement.specifier).removeprefix('=='))
    return found


def asked_for() -> Iterator[Requirement]:
    """What pyproject.toml requires by name: to run, to develop, and for extras."""
    project = PYPROJECT['project']
    groups = [project['dependencies'], *PYPROJECT['dependency-groups'].values()]
    groups += project['optional-dependencies'].values()
    yield from (Requirement(line) for group in groups for line in group)


@pytest.mark.parametrize('python', PYTHONS)
def test_lock_pins_what_pyproject_asks_for(python: str) -> None:
    pinned = pins(python)
    for requirement in filter(lambda asked: applies(asked, python), asked_for()):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f'{requirement}: run make lock'
        assert version in requirement.specifier, f'{requirement}: run make lock'


@pytest.mark.parametrize('python', PYTHONS)
def test_requirements_txt_installs_no_accelerator_but_pins_each(python: str) -> None:
    accelerator = re.compile(r'libtpu|nvidia-|jax-cuda')
    assert not [name for name in pins(python, FILES[:1]) if accelerator.match(name)]
    pinned = pins(python)
    assert {'libtpu', 'jax-cuda13-plugin', 'nvidia-cublas', 'nvidia-nccl-cu13'} <= set(pinned)
    assert pinned['jax-cuda13-plugin'] == pinned['jaxlib'] == pinned['jax']
    assert lines(FILES[0])[0] == f'-c {FILES[1]}'  # so that `-c requirements.txt` pins them, too


def test_lock_is_complete() -> None:
    """Whatever an installed package requires in turn is pinned as well."""
    python = f'{sys.version_info[0]}.{sys.version_info[1]}'
    pinned, visited = pins(python), 0
    for name in pinned:
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        visited += 1
        for requirement in map(Requirement, required):
            if applies(requirement, python):
                required_name = canonicalize_name(requirement.name)
                assert required_name in pinned, f'{name} requires {requirement}'
    assert visited > 50


@pytest.mark.parametrize('file', FILES)
def test_lock_names_packages_and_no_index(file: str) -> None:
    pin = re.compile(r'[a-z0-9-]+==[0-9a-z.]+( ; [a-z_0-9.\'()<>=! -]+)?', re.IGNORECASE)
    assert (ROOT / file).read_text().startswith('# Written by `make lock`')
    assert [line for line in lines(file) if not pin.fullmatch(line)] in ([], [f'-c {FILES[1]}'])


def test_every_package_and_module_is_declared() -> None:
    """`pip install .` installs all of it; tests and docs stay here."""
    setup = PYPROJECT['tool']['setuptools']
    folders = {path.parent.name for path in ROOT.glob('[a-z]*/*.py')} - {'tests', 'docs'}
    assert folders <= {name.rstrip('*') for name in setup['packages']['find']['include']}
    assert {path.stem for path in ROOT.glob('*.py')} == set(setup['py-modules'])


def test_makefile_takes_the_pythons_that_pyproject_allows() -> None:
    makefile = (ROOT / 'Makefile').read_text()
    allowed = SpecifierSet(PYPROJECT['project']['requires-python'])
    assert [f'3.{minor}' for minor in range(30) if f'3.{minor}' in allowed] == list(PYTHONS)
    assert '(3, 11) <= sys.version_info < (3, 15)' in makefile
    assert all(f'python{version} ' in makefile for version in PYTHONS)


class Project:
    """A fresh clone, as far as `make setup` sees it, on a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder / 'clone', folder / 'bin', folder / 'log'
        self.bin.mkdir()
        self.folder.mkdir()
        for name in ('Makefile', *FILES):
            shutil.copy(ROOT / name, self.folder)
        self.script('fake_pip', f'echo start >>{self.log}\nsleep 1\necho end >>{self.log}')
        for name in NAMES:  # as pyenv's, for a version that it has but does not use
            self.script(name, 'echo "pyenv: command not found" >&2\nexit 127')

    def script(self, name: str, text: str) -> None:
        """Puts a shell script on the PATH."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\n{text}\n')
        path.chmod(0o755)

    def python(self, name: str) -> None:
        """Puts this Python on the PATH, under a name; it logs that it was run."""
        self.script(name, f'echo {name} >>{self.log}\nexec {sys.executable} "$@"')

    def make(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts make with a pip that installs nothing, in a process group of its own."""
        tools = {os.path.dirname(shutil.which(tool) or '') for tool in ('make', 'sh', 'cat')}
        return subprocess.Popen(
            ['make', 'PIP_INSTALL=fake_pip', *arguments],
            cwd=self.folder,
            env={
                'PATH': ':'.join([str(self.bin), *sorted(tools)]),
                'HOME': str(self.folder),
                'PYTHONDONTWRITEBYTECODE': '1',
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def logged(self) -> list[str]:
        """What ran so far."""
        return self.log.read_text().split() if self.log.exists() else []

    def setup(self, *arguments: str) -> str:
        """Runs `make setup`, which has to succeed, and returns its output."""
        process = self.make('setup', *arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns as soon as the condition holds; fails if it does not within a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_make_passes_over_a_python_that_does_not_run(project: Project) -> None:
    project.python('python3.12')
    project.python('python3')
    output = project.setup()
    assert project.logged() == ['python3.12', 'start', 'end']  # the newest that runs
    assert 'pyenv' not in output
    assert f'Python {sys.version.split()[0]}' in output


def test_without_a_python_make_says_which_it_tried_and_what_to_do(project: Project) -> None:
    process = project.make('setup')
    output, _ = process.communicate(timeout=60)
    error = output.splitlines()[0]
    assert process.returncode == 2
    assert error.startswith('error: no Python 3.11 to 3.14 with venv among:')
    assert 'make PYTHON=' in error
    assert len(error) <= 400
    assert not (project.folder / '.venv').exists()


@pytest.mark.slow
def test_two_set_ups_at_once_are_one(project: Project) -> None:
    """The second waits for the first, and then finds everything done."""
    project.python('python3')
    processes = [project.make('setup') for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert project.logged().count('start') == project.logged().count('end') == 1
    assert sum('waiting for another set-up' in output for output in outputs) == 1
    assert all('.venv is ready for cpu' in output for output in outputs)


@pytest.mark.slow
def test_an_interrupted_set_up_does_not_count(project: Project) -> None:
    """Killed while pip works, it leaves no lock, and the next one starts afresh."""
    project.python('python3')
    process = project.make('setup')
    wait_until(lambda: 'start' in project.logged())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert 'end' not in project.logged()
    half = project.folder / '.venv' / 'half'
    half.touch()
    assert 'installing into .venv' in project.setup()
    assert not half.exists()
    assert 'installing' not in project.setup()


@pytest.mark.long
def test_set_up_follows_the_requirements_and_what_is_asked_for(project: Project) -> None:
    project.python('python3')
    project.setup()
    kept = project.folder / '.venv' / 'kept'
    kept.touch()
    later = time.time() + 10
    os.utime(project.folder / 'requirements.txt', (later, later))
    assert 'installing' in project.setup()
    assert kept.exists()  # changed requirements are installed over the old ones
    os.utime(project.folder / 'requirements.txt', (1, 1))
    project.script('python3', 'exit 127')
    assert 'ready for tpu' in project.setup('ACCELERATOR=tpu')  # with the Python that .venv has
    assert not kept.exists()
    assert 'ready for tpu' in project.setup()  # until another one is asked for


def test_an_unknown_accelerator_or_extra_is_an_error(project: Project) -> None:
    for asked, expected in (
        ('ACCELERATOR=cuda12', 'cpu, cuda13 or tpu'),
        ('EXTRAS=x', 'pretrained'),
    ):
        process = project.make('setup', asked)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert asked in output
        assert expected in output


def test_what_training_imports_is_compiled_even_if_python_is_told_to_write_no_bytecode(
    project: Project,
) -> None:
    project.python('python3')
    (project.folder / 'train.py').touch()
    (project.folder / 'pytest.py').touch()
    project.setup()
    compiled = project.folder.glob('__pycache__/*.pyc')
    assert {file.name.partition('.')[0] for file in compiled} == {'train', 'pytest'}


def test_huge_pages_are_asked_for_wherever_training_starts() -> None:
    setting = 'GLIBC_TUNABLES=glibc.malloc.hugetlb=1'
    command = ['make', '--silent', '--eval=print:;@env', 'print']
    env = {name: text for name, text in os.environ.items() if name != 'GLIBC_TUNABLES'}
    for given, expected in ((env, setting), (env | {'GLIBC_TUNABLES': 'x'}, 'GLIBC_TUNABLES=x')):
        printed = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
        assert expected in printed.stdout.splitlines()
    assert local_pod.environments(1, 1)[0]['GLIBC_TUNABLES']
    for file in ('Dockerfile', 'slurm.sbatch'):
        path = ROOT / 'launch' / file  # a fork may not need it
        assert not path.exists() or setting.partition('=')[2] in path.read_text()
