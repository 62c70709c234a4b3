"""A mistake ends the program with one line that names it and exit code 2, and changes no file."""

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
from absl import flags
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from configs import reviews, schema
from configs.schema import Config, fill, options, to_dict
from errors import (
    REQUEUE,
    NonFinite,
    RunError,
    SaveFailed,
    TakenOver,
    Unavailable,
    UserError,
)
from runtime import command_line
from tests import runs
from training.mesh import make_layout, make_mesh
from training.optimizer import make_schedule

MISTAKES = {
    'unknown field': (
        ['--config.batchsize=4'],
        r'--config.batchsize: no such option; did you mean config.batch_size?',
    ),
    'unknown section': (['--config.modle.dropout=0.1'], 'did you mean config.model.dropout?'),
    'option without its section': (
        ['--config.learning_rate=0.1'],
        '--config.learning_rate: no such option; did you mean config.optimizer.learning_rate?',
    ),
    'option of an option': (
        ['--config.data.train.x=1'],
        '--config.data.train.x: no such option; did you mean config.data.train?',
    ),
    'section': (['--config.optimizer=1'], '--config.optimizer: no such option; did you mean'),
    'mistyped value': (
        ['--config.seed=many'],
        "config.seed = 'many': expected a whole number",
    ),
    'value out of range': (
        ['--config.model.dropout=1.5'],
        'config.model.dropout = 1.5: expected a number in [0, 1)',
    ),
    'unknown flag': (['--wrokdir=x'], "Unknown command line flag 'wrokdir'"),
    'word that is no flag': (['runs/x'], 'runs/x: expected only flags'),
    'missing config file': (
        ['--config=configs/revews.py'],
        'configs/revews.py: no such file; there are ',
    ),
    'missing config file with an override': (
        ['--config=configs/revews.py', '--config.seed=1'],
        'configs/revews.py: no such file; there are ',
    ),
    'batch that shards do not divide': (
        ['--config.batch_size=20'],
        'config.batch_size = 20: expected a multiple of the 8 shards, such as 24',
    ),
    'devices that do not divide shards': (
        ['--config.num_shards=1'],
        '2 devices: expected a power of two, at most the 1 shards of this run (config.num_shards)',
    ),
    'missing data file': (['--config.data.source=files'], 'train'),
}
# Found where those of the same kind are, so a process of its own for each is a slow test.
ALIKE = (
    'unknown section',
    'option without its section',
    'option of an option',
    'section',
    'value out of range',
    'missing config file with an override',
)


# Lines of a config file, and the one line that each is refused with.
LINES = {
    'c.batchsize = 64; c.optimizer.lr = 1.0': (
        'config.batchsize: no such option; did you mean config.batch_size?; '
        'config.optimizer.lr: no such option; did you mean config.optimizer.learning_rate?'
    ),
    'c.modle.dropout = 0.1': (
        "{file}, line 6: AttributeError: 'Config' object has no attribute 'modle'; "
        'did you mean model?'
    ),
    'schema.Config(batchsize=8, data=c.data, model=c.model)': (
        '{file}, line 6: TypeError: Config.__init__() got an unexpected keyword argument '
        "'batchsize'"  # Python 3.13 adds the nearest name by itself
    ),
    'c.num_steps = 20.5': 'config.num_steps = 20.5: expected a whole number',
    "c.num_steps = float('inf')": 'config.num_steps = inf: expected a whole number',
    'c.num_steps = 2**31': 'config.num_steps = 2147483648: expected a number in [1, 2**31)',
    'c.seed = True': 'config.seed = True: expected a whole number',
    'c.optimizer.warmup_steps = 0.1': (
        'config.optimizer.warmup_steps = 0.1: expected a whole number'
    ),
    "c.optimizer.learning_rate = '3e-3'": (
        "config.optimizer.learning_rate = '3e-3': expected a number"
    ),
    "c.data.text_features = 'text'": (
        "config.data.text_features = 'text': expected one or more names, such as ('sentence',)"
    ),
    'c.data.train = 3': 'config.data.train = 3: expected text',
    'c.model.remat = 1': 'config.model.remat = 1: expected True or False',
    'c.model = None': 'config.model = None: expected ModelConfig(...)',
    'c.optimizer = schema.OptimizerConfig': (
        "config.optimizer = <class 'configs.schema.OptimizerConfig'>: expected OptimizerConfig(...)"
    ),
    "c.data.columns = 'text,label'": "config.data.columns = 'text,label': expected tuple(...)",
    "c.data.label_feature = ''": "config.data.label_feature = '': expected a name",
    "c.data.delimiter = '||'": "config.data.delimiter = '||': expected one character, such as ';'",
    'c = None': '{file}: expected get_config() to return a Config',
    '1 / 0': '{file}, line 6: ZeroDivisionError: division by zero',
    "c.data.source = 'x' * 10_000": "config.data.source = 'xxxx",
}


def config_with(tmp_path: Path, line: str) -> Path:
    """Writes a config file with a line of its own in it."""
    file = tmp_path / 'own.py'
    file.write_text(
        'from configs import reviews, schema\n\n\ndef get_config():\n'
        f'    c = reviews.get_config()\n    {line}\n    return c\n'
    )
    return file


def parsed(argv: list[str]) -> tuple[Config | None, str]:
    """Returns the config that train.py would get, or what it would print before exit code 2."""
    values, printed, code = flags.FlagValues(), io.StringIO(), 0
    holder = config_flags.DEFINE_config_file('config', flag_values=values)
    argv = ['train.py', *argv]
    with (
        mock.patch.object(flags, 'FLAGS', values),
        mock.patch.object(sys, 'argv', argv),  # where ml_collections looks for overrides
        contextlib.redirect_stderr(printed),
    ):
        try:
            command_line.parse_flags(argv)
            return command_line.checked_config(holder), ''
        except UserError as error:  # train.py ends alike: command_line.run passes it to `refuse`
            code = error.exit_code
            print('error:', command_line.one_line(error, 393), file=printed)
        except SystemExit as end:
            code = end.code
    assert code == 2
    return None, printed.getvalue()


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
@pytest.mark.parametrize('line', LINES)
def test_mistake_in_a_config_file_is_one_line_that_names_it(tmp_path: Path, line: str) -> None:
    file = config_with(tmp_path, line)
    for override in ([], ['--config.log_every=7']):
        config, printed = parsed([f'--config={file}', *override])
        assert config is None
        assert re.fullmatch('error: .+\n', printed)
        assert len(printed) <= 401
        assert printed.startswith(f'error: {LINES[line]}'.replace('{file}', str(file)))
        assert 'batchsize' not in line or 'batch_size' in printed


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_mistake_in_a_config_file_has_its_line_however_the_file_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config_with(tmp_path, '1 / 0')
    file.write_text(file.read_text().replace('get_config()', 'get_config(size=1)', 1))
    monkeypatch.chdir(tmp_path)
    for path in ('own.py', 'own.py:large', './own.py:large', str(file)):
        _, printed = parsed([f'--config={path}'])
        assert 'own.py, line 6: ZeroDivisionError: division by zero' in printed


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_value_of_another_type_is_converted_where_that_loses_nothing(tmp_path: Path) -> None:
    line = 'c.num_steps = 2e1; c.optimizer.learning_rate = 1; c.data.affixes = [3.0, 2]'
    line += '; c.data.train = pathlib.Path("a/b"); c.data.name = numpy.str_("x")'
    file = config_with(tmp_path, f'import numpy, pathlib; {line}')
    config, printed = parsed([f'--config={file}', '--config.log_every=7'])
    assert not printed
    assert config is not None
    found = to_dict(config)
    for name, value in {
        'log_every': 7,
        'num_steps': 20,
        'optimizer.learning_rate': 1.0,
        'data.affixes': [3, 2],
        'data.train': 'a/b',
        'data.name': 'x',
    }.items():
        assert (found[name], type(found[name])) == (value, type(value))


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize(
    ('name', 'text', 'value'),
    [
        ('num_steps', '2e1', 20),
        ('num_steps', '20.0', 20),
        ('num_steps', '20.5', None),
        ('num_steps', '0x14', None),
        ('seed', 'True', None),
        ('seed', '4294967295', 2**32 - 1),
        ('optimizer.learning_rate', '3e-3', 0.003),
        ('optimizer.learning_rate', '1', 1.0),
        ('optimizer.learning_rate', 'fast', None),
    ],
)
def test_command_line_takes_the_numbers_that_a_config_file_takes(
    tmp_path: Path, name: str, text: str, value: float | None
) -> None:
    config, printed = parsed(['--config=configs/reviews.py', f'--config.{name}={text}'])
    if value is None:
        assert printed.startswith(f'error: config.{name} = ')
    else:
        assert config is not None
        assert (to_dict(config)[name], type(to_dict(config)[name])) == (value, type(value))
    try:
        line = f'c.{name} = {float(text)}'
    except ValueError:
        line = f'c.{name} = {text!r}'
    assert parsed([f'--config={config_with(tmp_path, line)}']) == (config, printed)


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize(
    ('name', 'texts', 'value'),
    [
        ('data.columns', ['a,b', '(a,b)', 'a, b,'], ['a', 'b']),
        ('data.columns', ["('a','b')", "'a','b'", '["a","b"]'], ['a', 'b']),
        ('data.columns', ['class,my/text', '[class,my/text]'], ['class', 'my/text']),
        ('data.columns', ['a', '(a)', "('a',)", "'a'"], ['a']),
        ('data.columns', ["'a,b'", "('a,b',)"], ['a,b']),
        ('data.columns', ['()', ''], []),
        ('data.class_weights', ['very bad=5,good=0.5'], ['very bad=5', 'good=0.5']),
        ('data.bucket_lengths', ['8,16', '(8,16)', '[8, 16]', '8,16,'], [8, 16]),
        ('data.bucket_lengths', ['8'], [8]),
        ('data.bucket_lengths', ['8 16', 'short,long'], None),
    ],
)
def test_tuples_are_written_as_in_python_or_as_words_between_commas(
    name: str, texts: list[str], value: list[str] | None
) -> None:
    for text in texts:
        config, printed = parsed(['--config=configs/reviews.py', f'--config.{name}={text}'])
        if value is None:
            assert printed.startswith(f'error: config.{name} = ')
        else:
            assert config is not None, printed
            assert to_dict(config)[name] == value
    repeated = [f'--config.data.columns={name}' for name in ('a', 'b')]
    config, _ = parsed(['--config=configs/reviews.py', *repeated])
    assert config is not None
    assert config.data.columns == ('a', 'b')


def test_long_error_keeps_its_beginning_and_what_to_do() -> None:
    line = command_line.one_line('config.x: ' + 'v' * 1000 + ' use\n another')
    assert len(line) == 400
    assert line.startswith('config.x: vvv')
    assert line.endswith('vvv use another')
    assert command_line.one_line('two\nlines') == 'two lines'


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize('mistake', ALIKE)
def test_mistake_on_the_command_line_is_one_line_that_names_it(mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    config, printed = parsed(['--config=configs/reviews.py', *arguments])
    assert config is None
    assert re.fullmatch('error: .+\n', printed)
    assert expected in printed


def test_exit_codes_are_those_of_the_documents() -> None:
    kinds = (UserError, NonFinite, TakenOver, SaveFailed)
    codes = [kind.exit_code for kind in (*kinds, Unavailable, RunError)]
    assert [*codes, REQUEUE] == [2, 3, 4, 5, 1, 1, 75]


@pytest.mark.parametrize(
    'mistake', [pytest.param(m, marks=pytest.mark.slow if m in ALIKE else ()) for m in MISTAKES]
)
def test_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    tmp_path: Path, mistake: str
) -> None:
    arguments, expected = MISTAKES[mistake]
    workdir = tmp_path / 'run'
    launch = [sys.executable, 'train.py', '--config=configs/reviews.py']
    done = subprocess.run(
        [*launch, f'--workdir={workdir}', *arguments],
        cwd=runs.ROOT,
        env=runs.environment(devices=2),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done
    assert done.stderr.count('\n') == 1, done.stderr
    assert done.stderr.startswith('error: ')
    assert expected in done.stderr
    assert not workdir.exists()


def test_workdir_that_is_a_file_or_not_writable_or_missing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / 'file'
    file.write_text('precious')
    with pytest.raises(UserError, match=f'{file} is a file'):
        command_line.check_workdir(str(file))
    with pytest.raises(UserError, match=f'{file} is a file'):
        command_line.check_workdir(str(file / 'run'))
    with pytest.raises(UserError, match='cannot write in /proc'):
        command_line.check_workdir('/proc/run')
    with pytest.raises(UserError, match='expected the folder'):
        command_line.check_workdir(None)
    assert file.read_text() == 'precious'
    assert command_line.check_workdir(str(tmp_path / 'a' / 'b')) == epath.Path(tmp_path / 'a/b')
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize('name', ['checkpoints', 'ledger'])
def test_file_in_the_place_of_a_folder_of_the_workdir_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('')
    with pytest.raises(UserError, match=f'expected a folder, {tmp_path}/{name} is a file'):
        command_line.check_workdir(str(tmp_path))


@pytest.mark.parametrize('name', ['config.json', 'metrics.csv', 'summary.json'])
def test_folder_in_the_place_of_a_file_of_the_workdir_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f'expected a file, {tmp_path}/{name} is a folder'):
        command_line.check_workdir(str(tmp_path))


def test_workdir_that_is_or_holds_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    link = tmp_path / 'link'
    link.symlink_to(tmp_path / 'nothing')
    for workdir in (link, link / 'run'):
        with pytest.raises(UserError, match=f'expected a folder, {link} is a link to nothing'):
            command_line.check_workdir(str(workdir))
    link.rename(tmp_path / 'ledger')
    with pytest.raises(UserError, match=f'expected a folder, {tmp_path}/ledger is a link to'):
        command_line.check_workdir(str(tmp_path))


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('seed', -1),
        ('seed', 2**32),
        ('num_steps', 0),
        ('prng_impl', 'unsafe_rbg'),
        ('reduction', 'mean'),
        ('log_every', 0),
        ('data.bucket_lengths', (16, 8)),
        ('data.bucket_lengths', ()),
        ('data.bucket_lengths', ('8',)),
        ('data.text_features', ()),
        ('data.text_features', ('text', 'text')),
        ('data.train', ''),
        ('data.class_weights', ('rare=5', 'rare=2')),
        ('data.source', 'http'),
        ('model.compute_dtype', 'float16'),
        ('optimizer.learning_rate', float('nan')),
        ('optimizer.momentum', 1.0),
        ('optimizer.decay_steps', 50),
        ('optimizer.name', 'adam'),
    ],
)
def test_value_that_makes_no_sense_is_named_with_what_would(field: str, value: object) -> None:
    config: Config = reviews.get_config()
    *sections, name = field.split('.')
    part: object = config
    for section in sections:
        part = getattr(part, section)
    setattr(part, name, value)
    with pytest.raises(UserError) as refused:
        schema.check(config)
    assert str(refused.value).startswith(f'config.{field} = {value!r}: expected ')
    assert '\n' not in str(refused.value)


def test_number_of_devices_is_a_power_of_two_and_at_most_the_shards() -> None:
    config = dataclasses.replace(reviews.get_config(), batch_size=48)
    for devices, shards in ((6, 6), (6, 8), (3, 8), (8, 4), (2, 1)):
        mesh = make_mesh(jax.devices()[:devices])
        with pytest.raises(UserError, match=f'^{devices} devices: .* at most the {shards} shards'):
            make_layout(config, shards, mesh)


OPTIONS = {
    file: [name for name, _, _ in options(config)]
    for file, config in (('configs/reviews.py', reviews.get_config()),)
}
VALUES = st.one_of(
    st.text(max_size=8),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.lists(st.integers(-5, 100), max_size=4).map(lambda numbers: str(tuple(numbers))),
    st.sampled_from(['True', 'None', '()', '(', '1e999', '-0', '[]', "'", '0x10', 'sgd', 'files']),
)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
@pytest.mark.parametrize('file', OPTIONS)
@settings(max_examples=int(os.environ.get('FUZZED', '1000')), deadline=None, database=None)
@given(data=st.data())
def test_any_value_of_any_option_is_accepted_or_refused_in_one_line(
    file: str, data: st.DataObject
) -> None:
    overrides = data.draw(st.dictionaries(st.sampled_from(OPTIONS[file]), VALUES, max_size=3))
    argv = [f'--config.{name}={value}' for name, value in overrides.items()]
    config, printed = parsed([f'--config={runs.ROOT / file}', *argv])
    if config is None:
        assert re.fullmatch('error: .+\n', printed)
        assert len(printed) <= 401
    else:
        make_schedule(config.optimizer, config.num_steps)(0)
        fresh = runpy.run_path(str(runs.ROOT / file))['get_config']()
        assert fill(fresh, json.loads(json.dumps(to_dict(config)))) == config
