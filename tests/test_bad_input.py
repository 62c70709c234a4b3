"""A mistake gets one line that names it, exit code 2, and leaves everything as it was."""

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

import train
from configs import reviews, schema
from configs.schema import Config, from_dict, options, to_dict
from errors import UserError
from runtime import command_line
from tests import runs
from training.optimizer import make_schedule

MISTAKES = {
    'unknown field': (
        ['--config.batchsize=4'],
        r'--config.batchsize: no such config field; did you mean --config.batch_size?',
    ),
    'unknown section': (['--config.modle.dropout=0.1'], 'did you mean --config.model.dropout?'),
    'mistyped value': (
        ['--config.seed=many'],
        'flag --config.seed=many: invalid literal for int()',
    ),
    'value out of range': (
        ['--config.model.dropout=1.5'],
        'config.model.dropout = 1.5: expected a number in [0, 1)',
    ),
    'unknown flag': (['--wrokdir=x'], "Unknown command line flag 'wrokdir'"),
    'word that is no flag': (['runs/x'], 'runs/x: expected only flags'),
    'missing config file': (['--config=configs/none.py'], 'configs/none.py'),
    'batch that shards do not divide': (
        ['--config.batch_size=20'],
        'config.batch_size = 20: expected a multiple of the 8 shards, as in 24',
    ),
    'devices that do not divide shards': (
        ['--config.num_shards=1'],
        'config.num_shards = 1 can not be spread over 2 devices: expected a device count of 1',
    ),
    'missing data file': (['--config.data.source=files'], 'train'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
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
        command_line.usable_workdir(str(file))
    with pytest.raises(UserError, match=f'{file} is a file'):
        command_line.usable_workdir(str(file / 'run'))
    with pytest.raises(UserError, match='can not write in /proc'):
        command_line.usable_workdir('/proc/run')
    with pytest.raises(UserError, match='expected the folder'):
        command_line.usable_workdir(None)
    assert file.read_text() == 'precious'
    assert command_line.usable_workdir(str(tmp_path / 'a' / 'b')) == epath.Path(tmp_path / 'a/b')
    assert list(tmp_path.iterdir()) == [file]


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
        ('data.source', 'http'),
        ('model.compute_dtype', 'float16'),
        ('optimizer.learning_rate', float('nan')),
        ('optimizer.momentum', 1.0),
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


def test_number_of_shards_is_a_power_of_two(tmp_path: Path) -> None:
    config = dataclasses.replace(reviews.get_config(), num_shards=24, batch_size=48)
    with pytest.raises(UserError, match='num_shards = 24: expected a power of two'):
        train.train(config, epath.Path(tmp_path))


def test_pinned_environment_can_not_be_changed_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=4')
    with pytest.raises(UserError, match='XLA_FLAGS: found --xla_gpu_autotune_level=4, expected'):
        train.backend.prepare(8)
    monkeypatch.setenv('PJRT_NPROC', '2')
    with pytest.raises(UserError, match='PJRT_NPROC = 2: expected at least 8'):
        train.backend.prepare(8)


KNOBS = {
    file: [name for name, _, _ in options(config)]
    for file, config in (
        ('configs/reviews.py', reviews.get_config()),
    )
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
@pytest.mark.parametrize('file', KNOBS)
@settings(max_examples=1000, deadline=None, database=None)
@given(data=st.data())
def test_any_value_of_any_knob_is_accepted_or_refused_in_one_line(
    file: str, data: st.DataObject
) -> None:
    overrides = data.draw(st.dictionaries(st.sampled_from(KNOBS[file]), VALUES, max_size=3))
    argv = ['train.py', f'--config={runs.ROOT / file}']
    argv += [f'--config.{name}={value}' for name, value in overrides.items()]
    values, told = flags.FlagValues(), io.StringIO()
    holder = config_flags.DEFINE_config_file('config', flag_values=values)
    config, code = None, 0
    with mock.patch.object(flags, 'FLAGS', values), contextlib.redirect_stderr(told):
        try:
            command_line.parse_flags(argv)
            config = command_line.loaded_config(holder)
        except UserError as error:
            print(f'error: {error}', file=told)
        except SystemExit as end:
            code = end.code
    if config is None:
        assert code in (0, 2)
        assert re.fullmatch('error: .+\n', told.getvalue())
    else:
        make_schedule(config.optimizer, config.num_steps)(0)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
