"""The promises of tools/compare_runs.py: it says whether two runs are one, and where they part."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.run_record import seal
from tests import runs
from tools import compare_runs

COLUMNS = [
    'step',
    'batch',
    'keys',
    'parameters',
    'grad_norm',
    'correct',
    'loss',
    'tokens',
    'weight',
]
TYPES = [(name, '<u4' if index < 4 else '<f4') for index, name in enumerate(COLUMNS)]
STRUCTURE = {'.step': 'int32[]', ".params['embedding']": 'float32[20, 8]'}


def rows(steps: int = 8, seed: int = 0) -> np.ndarray:
    """A ledger's rows, of which every word follows from the seed."""
    rng = np.random.default_rng(seed)
    made = np.zeros(steps, TYPES)
    for name, kind in TYPES:
        words = rng.integers(1, 2**32, steps, np.uint32)
        made[name] = words if kind == '<u4' else words.astype(np.float32)
    made['step'], made['weight'] = range(1, steps + 1), 64
    return made


def differ(made: np.ndarray, first: int, *columns: str) -> np.ndarray:
    """The same rows with the last bit of some columns turned over, from step `first` on."""
    made = made.copy()
    for name in columns:
        made.view(('<u4', len(COLUMNS)))[first - 1 :, COLUMNS.index(name)] ^= 1
    return made


def write_run(
    workdir: Path,
    made: np.ndarray,
    segment: int = 2,
    config: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """A workdir with a ledger, a checkpoint and a summary, each as train.py writes it."""
    steps = len(made)
    (workdir / 'ledger').mkdir(parents=True)
    for first in range(0, steps, segment):
        part = made[first : first + segment]
        name = f'{part["step"][0]:09d}-{part["step"][-1]:09d}.npy'
        np.save(workdir / 'ledger' / name, part, allow_pickle=False)
    common = {'root_key': '0' * 16, 'state_fingerprint': f'{made["parameters"][-1]:064x}'}
    run_record = {
        'config': {'seed': 0, 'optimizer.learning_rate': 0.001, 'batch_size': 64, **(config or {})},
        'task': {'vocabulary': [f'w{index}' for index in range(20)], 'training_data': 'ab' * 32},
        'manifest': {
            'structure': STRUCTURE,
            'versions': {'jax': '1.0', 'numpy': '2.0'},
            'device_count': 8,
            'xla_flags': '',
            'overrides': [],
            **common,
            **(manifest or {}),
        },
    }
    run = workdir / 'checkpoints' / str(steps) / 'run'
    run.mkdir(parents=True)
    (run / 'metadata').write_text(json.dumps(seal(run_record)))
    facts = {'step': steps, 'eval': {'loss': 0.5}, **common, 'device_count': 8, **summary}
    (workdir / 'summary.json').write_text(json.dumps(facts))
    return workdir


def rewrite(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the run_record of a run's checkpoint."""
    (path,) = run.glob('checkpoints/*/run/metadata')
    run_record = json.loads(path.read_text())
    change(run_record)
    path.write_text(json.dumps(seal(run_record)))


@pytest.fixture
def compared(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """(run, run, ...) -> (exit code, what was printed)."""

    def compared(*args: Path | str) -> tuple[int, str]:
        try:
            code = compare_runs.main([str(arg) for arg in args])
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        assert (code == 2) == bool(printed.err)
        if code == 2:
            assert printed.err.count('\n') == 1
            assert printed.err.startswith('error: ')
        return code, printed.out + printed.err

    return compared


def test_the_same_run_is_known_as_such(tmp_path: Path, compared: Callable[..., Any]) -> None:
    a = write_run(tmp_path / 'a', rows())
    b = write_run(tmp_path / 'b', rows(), segment=5, manifest={'device_count': 4}, device_count=4)
    code, output = compared(a, b)
    assert code == 0
    assert (
        f'The same run, bit for bit: 8 steps, final state {rows()["parameters"][-1]:064x}' in output
    )
    assert 'environment: device_count: 8 -> 4' in output


def test_another_seed_is_seen_in_data_and_keys(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    a = write_run(tmp_path / 'a', rows())
    other = {'root_key': f'{1:016x}'}
    b = write_run(tmp_path / 'b', rows(seed=1), config={'seed': 1}, manifest=other, **other)
    code, output = compared(a, b)
    assert code == 1
    assert 'diverge at step 1.' in output
    assert 'First to differ: the data' in output
    assert (
        f'batch fingerprint): 0x{rows()["batch"][0]:08x} -> 0x{rows(seed=1)["batch"][0]:08x}'
        in output
    )
    assert 'Also different in that step, as a consequence: keys, loss' in output
    assert 'config: seed: 0 -> 1' in output
    assert f'environment: root_key: "{0:016x}" -> "{1:016x}"' in output


@pytest.mark.parametrize(
    ('first', 'columns', 'culprit'),
    [
        (3, ('parameters', 'grad_norm', 'loss', 'correct', 'batch'), 'the data'),  # a changed row
        (5, ('parameters', 'grad_norm', 'loss', 'keys'), 'the dropout keys'),  # a swapped shard key
        (2, ('parameters', 'grad_norm', 'correct', 'loss'), 'the loss'),
        (2, ('parameters', 'grad_norm', 'correct'), 'the loss: correct '),
        (1, ('parameters', 'grad_norm'), 'the gradient'),  # other devices under psum
        (7, ('parameters',), 'the parameters after the update'),  # another learning rate
    ],
)
def test_the_first_cause_within_the_first_step_is_named(
    tmp_path: Path,
    compared: Callable[..., Any],
    first: int,
    columns: tuple[str, ...],
    culprit: str,
) -> None:
    later = differ(rows(), min(first + 1, 8), 'loss', 'grad_norm', 'parameters')
    later[:first] = differ(rows(), first, *columns)[:first]
    code, output = compared(write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', later))
    assert code == 1
    before = f'; the {first - 1} steps before are the same, bit for bit.' if first > 1 else '.'
    assert f'The runs diverge at step {first}{before}' in output
    assert f'First to differ: {culprit}' in output
    assert ('Also different' in output) == (len(columns) > 1)


def test_a_loss_is_shown_as_a_number_and_as_bits(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    one, other = rows(), rows()
    one['loss'][3], other['loss'][3] = np.float32(32), np.nextafter(np.float32(32), np.float32(33))
    code, output = compared(write_run(tmp_path / 'a', one), write_run(tmp_path / 'b', other))
    assert code == 1
    assert '0.5 (its sum 0x42000000) -> 0.50000006 (its sum 0x42000001)' in output


def test_not_a_number_is_the_same_only_in_the_same_bits(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    one = rows()
    one['loss'][4] = np.nan
    a, b = write_run(tmp_path / 'a', one), write_run(tmp_path / 'b', one)
    assert compared(a, b)[0] == 0
    c = write_run(tmp_path / 'c', differ(one, 5, 'loss'))
    code, output = compared(a, c)
    assert code == 1
    assert 'diverge at step 5' in output


def test_minus_zero_is_not_zero(tmp_path: Path, compared: Callable[..., Any]) -> None:
    one, other = rows(), rows()
    one['grad_norm'][2], other['grad_norm'][2] = 0.0, -0.0
    code, output = compared(write_run(tmp_path / 'a', one), write_run(tmp_path / 'b', other))
    assert code == 1
    assert 'diverge at step 3' in output


def test_a_shorter_run_is_compared_as_far_as_it_goes(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows()[:4])
    code, output = compared(a, b)
    assert code == 1
    assert 'The same bits as far as both go: A has 8 steps, B 4.' in output


def test_equal_steps_with_another_end_are_not_the_same(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    a = write_run(tmp_path / 'a', rows())
    b = write_run(tmp_path / 'b', rows(), eval={'loss': 0.25})
    code, output = compared(a, b)
    assert code == 1
    assert 'All 8 steps are the same, but eval: {"loss": 0.5} -> {"loss": 0.25}' in output
    c = write_run(tmp_path / 'c', rows(), state_fingerprint='f' * 64)
    code, output = compared(a, c)
    assert code == 1
    assert 'but state_fingerprint' in output
    d = write_run(tmp_path / 'd', rows(), root_key='f' * 16)
    code, output = compared(a, d)
    assert code == 1
    assert 'Different root keys' in output


def test_a_run_that_is_not_finished_is_compared_by_its_ledger(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows())
    (b / 'summary.json').unlink()
    assert compared(a, b)[0] == 0
    (b / 'checkpoints' / '8').rename(b / 'checkpoints' / '8.being-written')
    code, output = compared(a, b)
    assert code == 0
    assert 'config and environment cannot be compared' in output


def test_every_circumstance_is_named(tmp_path: Path, compared: Callable[..., Any]) -> None:
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows())

    def change(run_record: dict[str, Any]) -> None:
        run_record['config']['optimizer.learning_rate'] = 0.002
        run_record['task']['vocabulary'][7:] = ['new']
        run_record['manifest']['versions']['jax'] = '1.1'
        run_record['manifest']['xla_flags'] = '--some_flag=1'
        run_record['manifest']['evaluation'] = {'loss': 0.25}  # an outcome, no circumstance
        run_record['manifest']['overrides'] = ['batch_size: 32 -> 64']

    rewrite(b, change)
    code, output = compared(a, b)
    assert code == 0
    for line in (
        'config: optimizer.learning_rate: 0.001 -> 0.002',
        'data: vocabulary: 20 and 8 entries, the first difference at 7: ["w7"] -> ["new"]',
        'environment: versions.jax: "1.0" -> "1.1"',
        'environment: xla_flags: "" -> "--some_flag=1"',
        'environment: overrides: [] -> ["batch_size: 32 -> 64"]',
    ):
        assert f'\n  {line}\n' in output
    assert 'numpy' not in output
    assert 'evaluation' not in output


@pytest.mark.parametrize(
    ('other', 'line'),
    [
        (
            {'commit': 'b' * 40, 'dirty': False, 'files': {'train.py': '1', 'model/lstm.py': '2'}},
            '',
        ),
        (
            {'commit': 'b' * 40, 'dirty': True, 'files': {'train.py': '1', 'model/lstm.py': '3'}},
            'code: model/lstm.py (commit aaaaaaaaaaaa -> bbbbbbbbbbbb with changes)',
        ),
        ({'commit': '', 'dirty': False, 'files': {'train.py': '1'}}, 'code: model/lstm.py (commit'),
        (None, 'code: not recorded in B'),
    ],
)
def test_changed_code_is_named_between_environment_and_data(
    tmp_path: Path, compared: Callable[..., Any], other: dict[str, Any] | None, line: str
) -> None:
    one = {'commit': 'a' * 40, 'dirty': False, 'files': {'train.py': '1', 'model/lstm.py': '2'}}
    a = write_run(tmp_path / 'a', rows(), manifest={'code': one})
    b = write_run(tmp_path / 'b', rows(), manifest={'code': other, 'device_count': 4})
    rewrite(b, lambda run_record: run_record['task'].update(training_data='cd' * 32))
    code, output = compared(a, b)
    assert code == 0
    assert ('code: ' in output) == bool(line)
    places = [output.index(part) for part in ('environment: ', line, 'data: ') if part]
    assert places == sorted(places)


def test_root_keys_may_be_stored_as_another_version_did(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    a, b = (
        write_run(tmp_path / name, rows(), manifest={'structure': STRUCTURE | {key: 'key<fry>[]'}})
        for name, key in (('a', '.root_key'), ('b', '.root_keys.data'))
    )
    assert compared(a, b)[0] == 0


@pytest.mark.slow
def test_a_real_run_equals_its_copy_and_not_a_copy_with_a_changed_bit(
    classifier_run: tuple[Path, dict[str, Any]], tmp_path: Path, compared: Callable[..., Any]
) -> None:
    run, summary = classifier_run
    copy = tmp_path / 'copy'
    shutil.copytree(run, copy)
    code, output = compared(run, copy)
    assert code == 0
    assert f'12 steps, final state {summary["state_fingerprint"]}' in output
    segment = min((copy / 'ledger').glob('*.npy'))
    changed = np.load(segment)
    changed['keys'][2] ^= 1
    np.save(segment, changed)
    code, output = compared(run, copy)
    assert code == 1
    assert 'diverge at step 3; the 2 steps before are the same' in output
    assert 'First to differ: the dropout keys' in output


def missing(run: Path) -> None:
    (run / 'ledger' / '000000003-000000004.npy').unlink()


def missing_first(run: Path) -> None:
    (run / 'ledger' / '000000001-000000002.npy').unlink()


def missing_last(run: Path) -> None:
    (run / 'ledger' / '000000007-000000008.npy').unlink()


def cut(run: Path) -> None:
    path = run / 'ledger' / '000000003-000000004.npy'
    path.write_bytes(path.read_bytes()[:-7])


def emptied(run: Path) -> None:
    (run / 'ledger' / '000000003-000000004.npy').write_bytes(b'')


def damaged(run: Path) -> None:
    path = run / 'ledger' / '000000003-000000004.npy'
    path.write_bytes(path.read_bytes().replace(b"'loss'", b"'l\x00ss'"))


def of_other_steps(run: Path) -> None:
    path = run / 'ledger' / '000000003-000000004.npy'
    path.write_bytes((run / 'ledger' / '000000001-000000002.npy').read_bytes())


def with_other_columns(run: Path) -> None:
    np.save(run / 'ledger' / '000000003-000000004.npy', rows()[['step', 'loss']][2:4])


def without_ledger(run: Path) -> None:
    for path in (run / 'ledger').iterdir():
        path.unlink()


def with_a_torn_header(run: Path) -> None:
    (path,) = run.glob('checkpoints/*/run/metadata')
    path.write_text(path.read_text()[:-9])


def with_another_seed(run: Path) -> None:
    (path,) = run.glob('checkpoints/*/run/metadata')
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))


def with_a_torn_summary(run: Path) -> None:
    (run / 'summary.json').write_text('{')


def with_a_list_for_a_summary(run: Path) -> None:
    (run / 'summary.json').write_text('[]')


@pytest.mark.parametrize(
    ('spoil', 'output'),
    [
        (missing, 'expected a segment from step 3; one is missing'),
        (missing_first, 'expected a segment from step 1; one is missing'),
        (missing_last, 'ledger: ends at step 6, a checkpoint is of step 8'),
        (cut, '000000003-000000004.npy: not a ledger segment, damaged or cut'),
        (emptied, '000000003-000000004.npy: not a ledger segment, damaged or cut'),
        (damaged, '000000003-000000004.npy: '),
        (of_other_steps, 'expected the rows of steps 3 to 4'),
        (with_other_columns, 'expected the columns of a ledger'),
        (without_ledger, 'expected ledger segments (FIRST-LAST.npy), found none'),
        (with_a_torn_header, 'a checkpoint or summary.json is damaged'),
        (with_another_seed, 'a checkpoint or summary.json is damaged'),
        (with_a_list_for_a_summary, 'a checkpoint or summary.json is damaged'),
        (with_a_torn_summary, 'a checkpoint or summary.json is damaged'),
    ],
)
def test_a_run_that_is_not_whole_is_refused(
    tmp_path: Path, compared: Callable[..., Any], spoil: Callable[[Path], None], output: str
) -> None:
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows())
    spoil(b)
    for pair in ((a, b), (b, a)):
        code, printed = compared(*pair)
        assert code == 2
        assert output in printed
        assert str(b) in printed


def test_cause_without_a_text_is_named_in_the_refusal_of_a_segment(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows())
    header = b'-' * 9000 + b'1\n'  # Python 3.11 raises MemoryError() for it
    start = b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little')
    (b / 'ledger' / '000000003-000000004.npy').write_bytes(start + header)
    code, printed = compared(a, b)
    assert code == 2
    assert 'not a ledger segment, damaged or cut (' in printed
    assert '()' not in printed


def test_no_bit_flip_in_a_segment_is_a_traceback(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    """It is refused as damaged or, in a value of a row, reported as a difference."""
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows())
    path = b / 'ledger' / '000000003-000000004.npy'
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        in_a_row = place >= len(whole) - 2 * 4 * len(COLUMNS)
        assert compared(a, b)[0] in ((1, 2) if in_a_row else (0, 2))  # 0: NumPy's own padding


def test_bad_arguments_are_one_line(tmp_path: Path, compared: Callable[..., Any]) -> None:
    a = write_run(tmp_path / 'a', rows())
    for args in ((a,), (a, tmp_path / 'none'), (a, a, '--plt=x.png'), (a, a / 'summary.json')):
        assert compared(*args)[0] == 2


def test_runs_of_different_models_are_refused(tmp_path: Path, compared: Callable[..., Any]) -> None:
    a, b = write_run(tmp_path / 'a', rows()), write_run(tmp_path / 'b', rows())
    wide = {".params['embedding']": 'float32[20, 16]'}
    rewrite(b, lambda run_record: run_record['manifest']['structure'].update(wide))
    code, output = compared(a, b)
    assert code == 2
    assert ".params['embedding'] is float32[20, 8] in one, float32[20, 16] in the other" in output
    deep = {'.params["more"]': 'float32[1]'}
    c = write_run(tmp_path / 'c', rows(), manifest={'structure': STRUCTURE | deep})
    assert 'is missing in one, float32[1] in the other' in compared(a, c)[1]
    d = write_run(tmp_path / 'd', rows()[COLUMNS[:-2]])
    assert 'different models: tokens is' in compared(a, d)[1]


def test_the_plot_shows_runs_of_unequal_length(
    tmp_path: Path, compared: Callable[..., Any]
) -> None:
    pytest.importorskip('matplotlib')
    a = write_run(tmp_path / 'a', rows())
    b = write_run(tmp_path / 'b', differ(rows(6), 3, 'loss'))
    file = tmp_path / 'losses.png'
    assert compared(a, b, f'--plot={file}')[0] == 1
    assert file.read_bytes().startswith(b'\x89PNG')
    assert compared(a, a, f'--plot={file}')[0] == 0
    code, output = compared(a, b, f'--plot={tmp_path / "none" / "losses.png"}')
    assert code == 2
    assert 'cannot be written' in output


def test_it_starts_without_jax_and_without_matplotlib() -> None:
    heavy = '{"jax", "flax", "orbax", "matplotlib"}'
    program = f'import sys, tools.compare_runs; print({heavy} & sys.modules.keys())'
    command = [sys.executable, '-c', program]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == 'set()\n'


SWAPPED_KEYS = """
import runpy
from training import keys
right = keys.shard_rngs
keys.shard_rngs = lambda root, step, shard: right(root, step, shard ^ 1)
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.fixture(scope='module')
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(name, devices=2, program=..., option=value, ...) -> the workdir of a run on files."""
    folder = tmp_path_factory.mktemp('planted')
    rng = np.random.default_rng(0)
    words = [' '.join(f'w{word}' for word in rng.integers(0, 30, 12)) for _ in range(96)]
    lines = [f'{text}\t{"good" if index % 2 else "bad"}' for index, text in enumerate(words)]
    (folder / 'train.tsv').write_text('\n'.join(['text\tlabel', *lines]) + '\n')
    lines[50] = lines[50].replace('bad', 'good')
    (folder / 'changed.tsv').write_text('\n'.join(['text\tlabel', *lines]) + '\n')

    def train(
        name: str,
        *flags: str,
        devices: int = 2,
        data: str = 'train',
        program: str = '',
        **options: Any,
    ) -> Path:
        common = {
            'num_steps': 6,
            'checkpoint_every': 3,
            'optimizer__decay_steps': 100,
            'data__source': 'files',
            'data__train': str(folder / f'{data}.tsv'),
            'data__evaluation': str(folder / 'train.tsv'),
            'data__bucket_lengths': '(16,)',
        }
        python, script, *rest = runs.command(folder / name, **common | options)
        command = [python, *(['-c', program] if program else [script]), *rest, *flags]
        done = subprocess.run(
            command, cwd=runs.ROOT, env=runs.environment(devices), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / name

    return train


@pytest.mark.long
def test_planted_differences_of_real_runs_are_traced_to_their_culprit(
    train: Callable[..., Path], compared: Callable[..., Any]
) -> None:
    base = train('base')
    assert compared(base, train('again', devices=4))[0] == 0

    code, output = compared(base, train('seed', seed=1))
    assert code == 1
    assert 'diverge at step 1.' in output
    assert 'First to differ: the data' in output
    assert 'config: seed: 0 -> 1' in output
    assert 'environment: root_key: "0000000000000000" -> "0000000000000001"' in output

    code, output = compared(base, train('changed', data='changed'))
    assert code == 1
    assert 'First to differ: the data' in output
    assert 'keys' not in output.split('Also different')[1]
    assert 'data: training_data: ' in output

    code, output = compared(base, train('swapped', program=SWAPPED_KEYS))
    assert code == 1
    assert 'First to differ: the dropout keys' in output
    assert 'diverge at step 1.' in output

    train('rate', num_steps=3)
    rate = train('rate', '--allow_changes', optimizer__learning_rate=0.002)
    code, output = compared(base, rate)
    assert code == 1
    assert 'diverge at step 4; the 3 steps before are the same, bit for bit.' in output
    assert 'First to differ: the parameters' in output
    assert 'config: optimizer.learning_rate: 0.003 -> 0.002' in output
    assert 'environment: overrides: [] -> [' in output

    wide, narrow = (train(f'psum{n}', devices=n, reduction='psum') for n in (8, 2))
    code, output = compared(wide, narrow)
    assert code == 1
    assert any(f'First to differ: the {it}' in output for it in ('loss', 'gradient', 'parameters'))
    assert 'environment: device_count: 8 -> 2' in output
