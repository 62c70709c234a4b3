"""The promises of the house: who may import whom, every option is read, everything is explained."""

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.schema import Config, check, options
from tasks.seq2seq import DataConfig as PairsConfig
from tasks.seq2seq import ModelConfig as Seq2SeqConfig

PROJECT = Path(__file__).parents[1]
CORE = ('configs', 'model', 'input_pipeline', 'training', 'tasks', 'train')
AROUND = ('tools', 'launch', 'benchmarks')  # import what they like and are imported by nobody
MAY_IMPORT = {
    'configs': {'configs'},
    'model': {'model', 'configs.schema', 'configs.sections'},
    'input_pipeline': {'input_pipeline', 'configs.schema', 'configs.sections', 'runtime.paths'},
    'training': {'training', 'configs.schema', 'configs.sections', 'runtime.paths'},
    'tasks': {'tasks', 'configs', 'model', 'input_pipeline'},
    'train': set(CORE),
    **{name: {*CORE, name} for name in AROUND},
}
MAY_PRINT = {'runtime/command_line.py'}  # errors in the command line, before there is a log
DATA_TABLES: set[str] = set()  # files that may be long because they are mostly data
MOST_LINES = 250


def files(*owners: str) -> list[str]:
    """The Python files of top-level modules and packages, relative to the project."""
    found = [path for name in owners for path in (PROJECT / name).rglob('*.py')]
    found += [PROJECT / f'{name}.py' for name in owners if (PROJECT / f'{name}.py').exists()]
    return sorted(str(path.relative_to(PROJECT)) for path in found)


@functools.cache
def parsed(file: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse((PROJECT / file).read_text())


def functions(file: str) -> set[str]:
    """The names of a file's functions."""
    return {node.name for node in parsed(file).body if isinstance(node, ast.FunctionDef)}


def imports(file: str) -> Iterator[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file}: relative import'
            for alias in node.names:
                inner = f'{node.module}.{alias.name}'.replace('.', '/')
                is_module = (PROJECT / inner).is_dir() or (PROJECT / f'{inner}.py').is_file()
                yield f'{node.module}.{alias.name}' if is_module else str(node.module)


@pytest.mark.parametrize('owner', MAY_IMPORT)
def test_who_may_import_whom(owner: str) -> None:
    allowed = MAY_IMPORT[owner]
    wrong = [
        f'{file} imports {name}'
        for file in files(owner)
        for name in imports(file)
        if name.split('.')[0] in MAY_IMPORT and name.split('.')[0] not in allowed
        if name not in allowed
    ]
    assert not wrong


def test_the_core_is_found() -> None:
    assert {file.split('/')[0].removesuffix('.py') for file in files(*CORE)} == set(CORE)


def test_every_knob_is_read() -> None:
    """As an attribute of its section, or of something called config."""
    read = set()
    for file in files(*CORE):
        for node in ast.walk(parsed(file)) if file != 'configs/schema.py' else ():
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = ast.unparse(node.value).split('.')[-1].lstrip('_')
                read.add((holder, node.attr))
    names = {
        tuple(name.rpartition('.')[::2])
        for config in (
            Config(),
            Config(data=PairsConfig(), model=Seq2SeqConfig()),  # seq2seq
        )
        for name, _, _ in options(config)
    }
    unread = [
        f'{section}.{name}'
        for section, name in sorted(names)
        if not {('config', name), ('options', name), (section, name)} & read
    ]
    assert len(names) > 30
    assert not unread


@pytest.mark.parametrize('file', files(*CORE))
def test_everything_public_has_a_docstring(file: str) -> None:
    tree = parsed(file)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    nodes = [node for body in (tree, *classes) for node in body.body]
    silent = [
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not node.name.startswith('_') and not ast.get_docstring(node)
    ]
    assert not silent
    assert ast.get_docstring(tree)


@pytest.mark.parametrize('file', files(*CORE))
def test_no_file_is_too_long_to_read(file: str) -> None:
    lines = (PROJECT / file).read_text().splitlines()
    assert len(lines) <= MOST_LINES or file in DATA_TABLES


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
    assert len(pickling) == len(loads), 'NumPy pickles unless it is told not to'


@pytest.mark.parametrize(
    'file', [file for file in files('configs') if 'get_config' in functions(file)]
)
def test_every_config_says_how_it_is_run_and_has_sound_values(file: str) -> None:
    module = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
    assert f'make train CONFIG={file}' in module.__doc__ or file == 'configs/reviews.py'
    check(module.get_config())
