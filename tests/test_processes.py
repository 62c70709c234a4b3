"""The promises about several processes: the same bits as in one, and no process waits for ever."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import REQUEUE, UserError
from runtime import processes
from tests import runs

ONE_PROCESS = (1, 2, 4, 8)
PODS = ('2x4', '4x2')
PATIENCE = 600  # seconds that anything may take on a busy machine before it counts as hanging


def start_pod(
    layout: str, workdir: Path, restarts: int = 0, **overrides: Any
) -> subprocess.Popen[str]:
    """Starts a small run on PROCESSESxDEVICES."""
    processes, devices = layout.split('x')
    flags = [
        f'--processes={processes}',
        f'--devices_per_process={devices}',
        f'--restarts={restarts}',
    ]
    return start(['-m', 'launch.local_pod', *flags, '--', *small(workdir, **overrides)])


def start(
    args: list[str], devices: int = 2, root: Path = runs.ROOT, **env: str
) -> subprocess.Popen[str]:
    """Starts a Python program of the project, or of a copy of it."""
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=root,
        env=runs.environment(devices, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def small(workdir: Path, **overrides: Any) -> list[str]:
    """The flags of a small run."""
    return runs.command(workdir, **overrides)[2:]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, output) of a process that must end by itself."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, output


def finish_pod(layout: str, workdir: Path, **overrides: Any) -> str:
    """Runs a pod to its end, and returns what was printed."""
    code, output = ended(start_pod(layout, workdir, **overrides))
    assert code == 0, output
    return output


def trainers(workdir: Path) -> dict[int, int]:
    """The processes of train.py in a workdir that are alive: index in the pod -> process id."""
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            command = (folder / 'cmdline').read_text().split('\0')
            env = (folder / 'environ').read_text()
        except OSError:
            continue
        if f'--workdir={workdir}' in command and 'train.py' in command:
            found[int(re.findall(r'(?:JAX_PROCESS_|SLURM_PROC)ID=(\d+)', env)[0])] = int(
                folder.name
            )
    return found


def wait_for(condition: Callable[[], Any], pause: float = 0.02) -> None:
    """Returns as soon as `condition()` holds, asked again after `pause` seconds."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(pause)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on one device."""
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    runs.finish(workdir, devices=1)
    return workdir


@pytest.mark.long
def test_same_bits_on_1_2_4_8_devices_and_on_2x4_and_4x2_processes(
    undisturbed: Path, tmp_path: Path
) -> None:
    """With word dropout, dropout, clipping, AdamW, warm-up, two widths and evaluation on."""
    run_record = json.loads((undisturbed / 'checkpoints/24/run/metadata').read_text())
    on = ('model.word_dropout', 'model.embedding_dropout', 'model.dropout', 'optimizer.clip_norm')
    assert all(run_record['config'][name] > 0 for name in on)
    assert run_record['config']['optimizer.name'] == 'adamw'
    assert run_record['config']['optimizer.schedule'] == 'cosine'
    expected = runs.outcome(undisturbed)
    assert len(list((undisturbed / 'ledger').iterdir())) == 4
    for devices in ONE_PROCESS[1:]:
        runs.finish(tmp_path / str(devices), devices=devices)
        assert runs.outcome(tmp_path / str(devices)) == expected, f'on {devices} devices'
    for layout in PODS:
        finish_pod(layout, tmp_path / layout)
        assert runs.outcome(tmp_path / layout) == expected, f'on {layout}'
        manifest = json.loads((tmp_path / layout / 'checkpoints/24/run/metadata').read_text())
        assert manifest['manifest']['process_count'] == int(layout[0])
        assert manifest['manifest']['device_count'] == 8


@pytest.mark.long
def test_same_bits_in_bfloat16(tmp_path: Path) -> None:
    short = {'num_steps': 6, 'data__bucket_lengths': '(42,)', 'model__compute_dtype': 'bfloat16'}
    runs.finish(tmp_path / 'one', devices=1, **short)
    runs.finish(tmp_path / 'eight', devices=8, **short)
    finish_pod('2x1', tmp_path / 'pod', **short)
    for layout in ('eight', 'pod'):
        assert runs.outcome(tmp_path / layout) == runs.outcome(tmp_path / 'one'), layout


@pytest.mark.long
def test_sharded_optimizer_state_keeps_the_bits_on_any_layout_and_moves_with_the_run(
    tmp_path: Path,
) -> None:
    always = {
        'data__bucket_lengths': '(42,)',
        'model__remat': 'True',
        'optimizer__shard_state': 'True',
        'optimizer__decay_steps': 6,
    }
    runs.finish(tmp_path / 'one', devices=1, num_steps=6, **always)
    expected = runs.outcome(tmp_path / 'one')
    finish_pod('2x1', tmp_path / 'pod', num_steps=6, **always)
    assert runs.outcome(tmp_path / 'pod') == expected
    runs.finish(tmp_path / 'moved', devices=8, num_steps=2, **always)
    finish_pod('2x2', tmp_path / 'moved', num_steps=4, **always)
    assert 'resumed after step 4' in runs.finish(tmp_path / 'moved', num_steps=6, **always)
    assert runs.outcome(tmp_path / 'moved')['ledger'] == expected['ledger']
    assert runs.outcome(tmp_path / 'moved') == expected


@pytest.mark.slow
def test_run_moved_between_layouts_equals_undisturbed_run(
    undisturbed: Path, tmp_path: Path
) -> None:
    """8 devices -> 2 processes x 2 -> 1 device: only the number of steps grows."""
    run, always = tmp_path / 'run', {'optimizer__decay_steps': 24}
    runs.finish(run, devices=8, num_steps=6, **always)
    output = finish_pod('2x2', run, num_steps=12, **always)
    assert 'resumed after step 6' in output
    assert 'resumed after step 12' in runs.finish(run, devices=1, **always)
    assert runs.outcome(run) == runs.outcome(undisturbed)


@pytest.mark.long
def test_processes_checkpoint_by_the_clock_after_the_same_steps_without_changing_a_bit(
    undisturbed: Path, tmp_path: Path
) -> None:
    finish_pod('2x1', tmp_path / 'run', checkpoint_minutes=1e-4, checkpoint_every=1000)
    segments = list((tmp_path / 'run' / 'ledger').iterdir())
    assert len(segments) > 2  # one is written before each checkpoint
    assert runs.outcome(tmp_path / 'run') == runs.outcome(undisturbed)


@pytest.mark.long
def test_dead_process_stops_the_others_and_nothing_is_lost(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / 'run'
    pod = start_pod('2x2', run)
    wait_for(lambda: (run / 'checkpoints' / '0').exists() or pod.poll() is not None)
    os.kill(trainers(run)[1], signal.SIGKILL)
    code, output = ended(pod)
    assert code == 128 + signal.SIGKILL, output
    assert output.splitlines()[-1] == 'process 1 ended with signal SIGKILL; the others were stopped'
    assert not trainers(run)
    runs.finish(run, devices=2)
    assert runs.outcome(run) == runs.outcome(undisturbed)


@pytest.mark.slow
def test_pod_with_a_dead_process_starts_again_and_equals_the_undisturbed_run(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / 'run'
    pod = start_pod('2x1', run, restarts=1)
    wait_for(lambda: (run / 'checkpoints' / '0').exists() or pod.poll() is not None)
    os.kill(trainers(run)[1], signal.SIGKILL)
    code, output = ended(pod)
    assert code == 0, output
    assert 'restarting in 1 s, 1 of 1' in output
    assert runs.outcome(run) == runs.outcome(undisturbed)
    check_logs(run, output)
    assert 'the run is finished at step 24' in finish_pod('2x1', run)


def check_logs(run: Path, output: str) -> None:
    """Checks that every line names its process, and that process 0 alone writes logs and files."""
    start = output.index('restarting in 1 s')
    lines = output[start:].splitlines()[1:]
    assert all(re.match(r'\[[01]\] ', line) for line in lines), lines
    assert sum('24/24  evaluation  loss' in line for line in lines if line.startswith('[0]')) == 1
    others = [line for line in lines if line.startswith('[1]')]
    assert not any('step ' in line or 'finished' in line for line in others), others
    assert len(list((run / 'tensorboard').iterdir())) == 2  # one of each launch
    assert not list(run.rglob('*tmp*'))


@pytest.mark.slow
@pytest.mark.parametrize(
    'number', [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_no_process_outlives_the_launcher(tmp_path: Path, number: signal.Signals) -> None:
    if not sys.platform.startswith('linux'):
        pytest.skip('looks for processes in /proc')
    run = tmp_path / 'run'
    pod = start_pod('2x1', run)
    wait_for(lambda: (run / 'checkpoints').exists() or pod.poll() is not None)
    assert len(trainers(run)) == 2
    pod.send_signal(number)
    code, output = ended(pod)
    assert code == (-number if number == signal.SIGKILL else REQUEUE), output
    wait_for(lambda: not trainers(run))


STAND_IN = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print('ready', flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(0.5)  # saves
sys.exit(75 if len(asked) == 1 else 1)
"""
POD = """
import sys
from launch import local_pod
sys.exit(local_pod.run_pod([], local_pod.environments(2, 1), [], [sys.argv[1]]))
"""


@pytest.mark.parametrize('protected', [False, True])
def test_pod_whose_terminal_closes_saves_once_unless_nohup_protects_it(
    tmp_path: Path, protected: bool
) -> None:
    stand_in = tmp_path / 'stand_in.py'
    stand_in.write_text(STAND_IN)
    pod = subprocess.Popen(
        [*['nohup'][:protected], sys.executable, '-c', POD, str(stand_in)],
        cwd=runs.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert pod.stdout is not None
    assert [pod.stdout.readline()[4:] for _ in range(2)] == ['ready\n'] * 2
    for _ in range(2):  # one is the kernel's, one the shell's
        pod.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    if protected:
        time.sleep(1)
        assert pod.poll() is None
        pod.send_signal(signal.SIGTERM)
    assert ended(pod)[0] == REQUEUE


def start_by_hand(
    workdirs: list[Path],
    *overrides: dict[str, Any],
    roots: tuple[Path, Path] = (runs.ROOT, runs.ROOT),
) -> Iterator[tuple[int, str]]:
    """(exit code, output) of each process of a pod whose processes have other flags each."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    pod = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(len(overrides))}
    processes = [
        start(['train.py', *small(workdir, **options)], 2, root, **pod, JAX_PROCESS_ID=str(index))
        for index, (workdir, options, root) in enumerate(
            zip(workdirs, overrides, roots, strict=True)
        )
    ]
    try:
        yield from [ended(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def errors(output: str) -> list[str]:
    """The lines that tell an error."""
    assert 'Traceback' not in output, output
    return [line for line in output.splitlines() if line.startswith('error: ')]


@pytest.mark.slow
def test_processes_with_different_configs_are_named(tmp_path: Path) -> None:
    run = tmp_path / 'run'
    ends = start_by_hand([run, run], {}, {'batch_size': 32})
    for process, (code, output) in enumerate(ends):
        assert code == 2, output
        (error,) = errors(output)
        value = runs.STEPS['batch_size'] if process == 0 else 32
        assert f'batch_size is not the same on process {1 - process}' in error
        assert f'on process {process}, which has {value}' in error
    assert not run.exists()


@pytest.mark.slow
def test_processes_with_different_code_are_named(tmp_path: Path) -> None:
    run, copy = tmp_path / 'run', tmp_path / 'copy'
    shutil.copytree(
        runs.ROOT, copy, ignore=lambda *_: {'.venv', '.git', 'runs', 'docs', '__pycache__'}
    )
    with (copy / 'model' / 'classifier.py').open('a') as code:
        code.write('# an edit on one host alone\n')
    for code, output in start_by_hand([run, run], {}, {}, roots=(runs.ROOT, copy)):
        assert code == 2, output
        (error,) = errors(output)
        assert 'the code is not the same on process' in error
    assert not run.exists()


@pytest.mark.slow
def test_a_process_that_fails_alone_leaves_no_other_waiting(tmp_path: Path) -> None:
    run, missing = tmp_path / 'run', {'data__source': 'files', 'data__train': 'none.tsv'}
    began = time.monotonic()
    (good, output_of_good), (bad, output) = start_by_hand([run, run], {}, missing)
    assert time.monotonic() - began < 200, "that was JAX's own limit, 300 s"
    assert bad == 2, output
    assert 'none.tsv' in errors(output)[0]
    assert good != 0, output_of_good
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, pytest.param(1, marks=pytest.mark.long)])
def test_unreachable_coordinator_fails_in_bounded_time(tmp_path: Path, process: int) -> None:
    """Process 1 finds no coordinator; process 0 is one, and the others do not come."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    pod = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2'}
    flags = [*small(tmp_path / 'run'), '--join_timeout=4']
    code, output = ended(start(['train.py', *flags], **pod, JAX_PROCESS_ID=str(process)))
    assert code == 1, output  # a launcher may try again
    (error,) = errors(output)
    assert f'JAX_COORDINATOR_ADDRESS = {address}: ' in error
    assert 'within 4 s' in error
    assert not (tmp_path / 'run').exists()


READ = """
import pathlib, shutil, sys
import jax, jax.numpy as jnp, optax
from etils import epath
from errors import RunError
from runtime import backend, checkpoints, processes
from training import keys, mesh, state

backend.prepare(cpu_threads=2)
processes.join(60)
index, folder = jax.process_index(), pathlib.Path(sys.argv[1])
layout = mesh.Layout(mesh.make_mesh(), 2, 'tree', shard_state=True)
init = lambda key: {'kernel': jax.random.normal(key, (40, 30))}
create = state.make_create_state(init, optax.adam(1e-3), layout)
target = state.abstract_state(create, 'threefry2x32')
keeper = checkpoints.Checkpoints(epath.Path(folder / 'run'), keep_newest=2)
for step in (1, 2):
    roots = keys.root_keys(step, 'threefry2x32')
    made = create(roots)
    keeper.save(made.replace(step=made.step + step), {'manifest': {}})
keeper.close()
processes.meet()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def largest(run):
    return max((run / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)


def unreadable(file):
    file.unlink()
    file.symlink_to(file)


# Each process reads files of its own, as if the storage of process 1 alone was damaged.
for name, damage in {
    'record': lambda run: flip(run / 'run' / 'metadata'),
    'cut': lambda run: largest(run).write_bytes(b''),
    'flipped': lambda run: flip(largest(run)),
    'unreadable': lambda run: unreadable(run / 'run' / 'metadata'),
    'unlisted': shutil.rmtree,
}.items():
    own = folder / f'{name}{index}'
    shutil.copytree(folder / 'run', own)
    if index == 1:
        damage(own / 'checkpoints' / '2')
    try:
        restored, _ = checkpoints.Checkpoints(epath.Path(own)).restore(target)
        found = f'step {int(restored.step)} {state.state_fingerprint(restored)[:8]}'
    except RunError as error:
        found = f'{type(error).__name__} {error}'
    print(f'{name}:', 'moved,' if (own / 'damaged' / '2').exists() else 'kept,', found, flush=True)
processes.meet()
"""


@pytest.mark.slow
def test_damage_that_one_process_alone_sees_leaves_no_other_waiting(tmp_path: Path) -> None:
    """With slices of the optimizer state on each process, which are gathered to be compared."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        pod = pod_of_two(probe.getsockname()[1])
    launches = [
        start(['-c', READ, str(tmp_path)], 1, **pod | {'JAX_PROCESS_ID': str(index)})
        for index in (0, 1)
    ]
    try:
        outputs = [launch.communicate(timeout=150)[0] for launch in launches]
    finally:
        for launch in launches:
            launch.kill()
    assert [launch.returncode for launch in launches] == [0, 0], outputs
    found = [re.findall(r'^(\w+): (moved|kept), (\w+) (.*)$', text, re.M) for text in outputs]
    for (name, *here), (_, *there) in zip(*found, strict=True):
        if name == 'unreadable':
            assert here[:2] == there[:2] == ['kept', 'Unavailable']
            assert 'Too many levels of symbolic links' in there[2]
        elif name == 'unlisted':
            assert here[:2] == there[:2] == ['kept', 'Unavailable']
            assert 'checkpoints is not the same on process 0 and on process 1' in there[2]
        else:
            assert here == ['moved', 'step', here[2]]  # in its folder, by process 0
            assert there == ['kept', 'step', here[2]]
            assert here[2].startswith('1 ')
    assert [len(names) for names in found] == [5, 5], outputs


def pod_of_two(port: int, **env: str) -> dict[str, str]:
    """Returns the environment of process 1 of 2, changed by `env`."""
    return {
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': '1',
    } | env


@pytest.mark.parametrize(
    ('env', 'problem'),
    [
        ({'JAX_COORDINATOR_ADDRESS': 'localhost'}, 'localhost: expected HOST:PORT'),
        ({'JAX_COORDINATOR_ADDRESS': 'localhost:70000'}, '70000: expected HOST:PORT'),
        ({'JAX_PROCESS_ID': 'one'}, "JAX_PROCESS_ID = 'one': expected a whole number"),
        ({'JAX_NUM_PROCESSES': ''}, "JAX_NUM_PROCESSES = '': expected a whole number"),
        ({'JAX_PROCESS_ID': '0'}, 'the port is not free'),
    ],
)
def test_a_mistake_in_the_environment_is_found_before_anything_connects(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], problem: str
) -> None:
    monkeypatch.setattr(processes.jax.distributed, 'initialize', pytest.fail)
    monkeypatch.setattr(processes.jax.config, 'update', lambda *_: None)
    with socket.create_server(('', 0)) as taken:
        for name, value in pod_of_two(taken.getsockname()[1], **env).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as caught:
            processes.join(60)
    assert problem in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_a_mistake_that_jax_finds_in_the_environment_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(('', 0)) as taken:
        pod = pod_of_two(taken.getsockname()[1], JAX_PROCESS_ID='2')
        code, output = ended(start(['train.py', *small(tmp_path / 'run')], **pod))
    assert code == 2, output
    (line,) = errors(output)
    assert 'Got process_id=2, num_processes=2' in line


@pytest.mark.parametrize(
    'flags',
    [
        ['--processes=0'],
        ['--processes=two'],
        ['--restarts=-1'],
        ['--devices=4'],
        ['--config=configs/reviews.py'],
    ],
)
def test_a_mistake_in_the_launchers_flags_is_one_line(flags: list[str]) -> None:
    code, output = ended(start(['-m', 'launch.local_pod', *flags]))
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith('error: ')
    assert flags[0].partition('=')[0] in line
    assert "after ' -- '" in line


@pytest.mark.long
def test_exactness_names_the_layouts_and_leaves_out_what_does_not_divide(tmp_path: Path) -> None:
    flags = small(tmp_path, num_shards=2, data__bucket_lengths='(42,)')
    flags = [flag for flag in flags if not flag.startswith('--workdir')]
    command = ['-m', 'tools.exactness', *flags, '--layouts=1,2,4', '--steps', '2']
    code, output = ended(start(command))
    assert code == 0, output
    assert '4  left out: 4 devices do not divide 2 shards' in output
    assert len(re.findall(r' s  [0-9a-f]{16} the same bits', output)) == 2
    code, output = ended(start([*command, '--config.reduction=psum', '--config.num_shards=8']))
    assert code == 1, output
    assert 'other bits than 1. The runs diverge at step' in output
