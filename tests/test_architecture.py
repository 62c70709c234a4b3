"""The house keeps its shape: imports run one way, every option is read, configs say how to run."""

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tasks
from configs.schema import Config, check, options

PROJECT = Path(__file__).parents[1]
CORE = (
    'arrays', 'errors', 'configs', 'model', 'input_pipeline', 'training', 'runtime', 'reporting',
    'tasks', 'train',
)  # fmt: skip
AROUND = ('tools', 'launch', 'benchmarks')  # import what they like; nobody imports them
BOTTOM = {'arrays', 'errors', 'configs.checks', 'configs.schema'}
MAY_IMPORT = {
    'arrays': set[str](),
    'errors': set[str](),
    'configs': {'errors', 'configs.checks'},
    'model': {'model'},
    'input_pipeline': {'input_pipeline'} | BOTTOM,
    'training': {'training'} | BOTTOM,
    'runtime': {'runtime', 'training', 'configs'} | BOTTOM,
    'reporting': {'reporting', 'runtime', 'training', 'configs'} | BOTTOM,
    'tasks': {'tasks', 'model', 'input_pipeline', 'configs'} | BOTTOM,
    'run': {'tasks', 'configs'} | BOTTOM,  # a file in configs/ for one run; only others import it
    'train': set(CORE),
    **{name: {*CORE, *AROUND} for name in AROUND},
}
MAY_PRINT = {'runtime/command_line.py'}  # errors in the command line, before there is a log


def files(*owners: str) -> list[str]:
    """Returns the Python files of top-level modules and packages, relative to the project."""
    found = [path for name in owners for path in (PROJECT / name).rglob('*.py')]
    found += [PROJECT / f'{name}.py' for name in owners if (PROJECT / f'{name}.py').exists()]
    return sorted(str(path.relative_to(PROJECT)) for path in found)


@functools.cache
def parsed(file: str) -> ast.Module:
    """Returns the syntax tree of a file."""
    return ast.parse((PROJECT / file).read_text())


def functions(file: str) -> set[str]:
    """Returns the names of a file's functions."""
    return {node.name for node in parsed(file).body if isinstance(node, ast.FunctionDef)}


def is_run(file: str) -> bool:
    """Returns whether a file is the config of one run."""
    return file.startswith('configs/') and 'get_config' in functions(file)


def imports(file: str) -> Iterator[str]:
    """Yields the dotted names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file}: relative import'
            for alias in node.names:
                inner = f'{node.module}.{alias.name}'.replace('.', '/')
                is_module = (PROJECT / inner).is_dir() or (PROJECT / f'{inner}.py').is_file()
                yield f'{node.module}.{alias.name}' if is_module else str(node.module)


RUNS = [file for file in files('configs') if is_run(file)]


@pytest.mark.parametrize('file', files(*CORE, *AROUND))
def test_imports_run_one_way(file: str) -> None:
    owner = 'run' if is_run(file) else file.split('/')[0].removesuffix('.py')
    allowed = MAY_IMPORT[owner]
    ours = [name for name in imports(file) if name.split('.')[0] in MAY_IMPORT]
    wrong = [name for name in ours if name not in allowed and name.split('.')[0] not in allowed]
    assert not wrong
    runs = [name for name in ours if f'{name.replace(".", "/")}.py' in RUNS]
    assert not runs or owner in ('run', *AROUND), 'the config of a run is loaded by path'


def test_every_part_of_the_core_is_found() -> None:
    assert {file.split('/')[0].removesuffix('.py') for file in files(*CORE)} == set(CORE)


def task_modules() -> list[str]:
    """Returns the names of the modules in tasks/ that are tasks."""
    return [
        Path(file).stem
        for file in files('tasks')
        if 'make_task' in functions(file) and not file.endswith('__init__.py')
    ]


@pytest.mark.parametrize('task', task_modules())
def test_every_option_is_read(task: str) -> None:
    """An option is read as an attribute of its section or of a config, or with its section."""
    read = set()
    for file in files(*CORE):
        for node in ast.walk(parsed(file)) if file != 'configs/schema.py' else ():
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = ast.unparse(node.value).split('.')[-1].lstrip('_')
                read.add((holder, node.attr))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'vars':
                read.add((ast.unparse(node.args[0]).split('.')[-1], '*'))
    module = tasks.load(task)
    config = Config(data=module.DataConfig(), model=module.ModelConfig())
    names = [name.rpartition('.')[::2] for name, _, _ in options(config)]
    unread = [
        f'{section}.{name}'
        for section, name in names
        if not {('config', name), ('options', name), (section, name), (section, '*')} & read
    ]
    assert len(names) > 30
    assert not unread


@pytest.mark.parametrize('file', files(*CORE))
def test_core_neither_prints_nor_runs_what_it_reads(file: str) -> None:
    banned = {'eval', 'exec', 'compile'} | (set() if file in MAY_PRINT else {'print'})
    nodes = list(ast.walk(parsed(file)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert not called & banned
    assert not {name.split('.')[0] for name in imports(file)} & {'pickle', 'marshal', 'shelve'}
    pickling = [
        keyword.value
        for node in calls
        for keyword in node.keywords
        if keyword.arg == 'allow_pickle'
    ]
    assert all(isinstance(value, ast.Constant) and value.value is False for value in pickling)
    loads = [node for node in calls if ast.unparse(node.func) in {'np.load', 'np.save'}]
    assert len(pickling) == len(loads), 'NumPy pickles unless allow_pickle=False'


@pytest.mark.parametrize('file', RUNS)
def test_every_config_has_valid_values(file: str) -> None:
    check(importlib.import_module(file.removesuffix('.py').replace('/', '.')).get_config())
