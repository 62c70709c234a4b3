"""The promises of launch/tpu_vm.sh and launch/tpu_mig.sh, against a stand-in for gcloud.

No TPU and no cloud are used: the stand-in keeps the state of one slice in a folder, and its two
workers are folders in which it runs the commands sent by ssh. train.py and the scripts are the real
ones; `make setup` is replaced by a .venv that leads to this Python.
"""

import contextlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from errors import REQUEUE
from runtime import processes
from tests import runs

pytestmark = pytest.mark.long


class Launcher(NamedTuple):
    """Describes a launcher of slices of two workers."""

    script: str
    settings: dict[str, str]
    asks: list[str]  # what it calls for a slice at first
    again: list[str]  # after a preemption
    each: int  # calls for what it does on both workers
    scp: str = 'tpu-vm scp'
    ssh: str = 'tpu-vm ssh'


GROUP = 'instance-groups'
TPU_VM = Launcher(
    'launch/tpu_vm.sh',
    {'ACCELERATOR_TYPE': 'v5litepod-16', 'RUNTIME_VERSION': 'v2-alpha-tpuv5-lite'},
    ['tpu-vm create'],
    ['tpu-vm delete', 'tpu-vm create'],
    1,
)
TPU_MIG = Launcher(
    'launch/tpu_mig.sh',
    {'TOPOLOGY': '2x2x2', 'SPOT': '1'},
    ['resource-policies create', 'instance-templates create', f'{GROUP} create'],
    [f'{GROUP} delete', f'{GROUP} create'],
    2,
    'machine scp',
    'machine ssh',
)
WHERE = ['--project=mine', '--zone=us-central1-a', '--quiet']
RUN = ['--', '--config=configs/reviews.py', '--workdir=gs://bucket/run']
PATIENCE = 300

GCLOUD = r"""
import json, os, shutil, signal, socket, subprocess, sys
from pathlib import Path

signal.signal(signal.SIGINT, lambda *_: sys.exit(1))  # unlike most, it does not die of the signal
cloud = Path(os.environ['CLOUD'])
kind, verb, *words = [w for w in sys.argv[1:] if w not in ('compute', 'tpus', 'managed')]
if kind in ('ssh', 'scp'):
    kind, verb, words = 'machine', kind, [verb, *words]
with open(cloud / 'calls', 'a') as calls:
    print(json.dumps([f'{kind} {verb}', *words]), file=calls)
flags = dict(word.split('=', 1) for word in words if word.startswith('--') and '=' in word)
names = [word for word in words if not word.startswith('--')]
slice_, request, homes = cloud / 'slice', cloud / 'request', cloud / 'workers'
kept = {'tpu-vm': slice_, 'queued-resources': request, 'instance-groups': slice_,
        'resource-policies': cloud / 'policy', 'instance-templates': cloud / 'template'}

def provide(state):
    for index in range(2):
        (homes / str(index)).mkdir(parents=True)
    slice_.write_text(f'keyfold {state}')
    with socket.create_server(('127.0.0.1', 0)) as probe:
        (cloud / 'port').write_text(str(probe.getsockname()[1]))

if kind == 'auth':
    print(os.environ.get('ACCOUNT', 'me@example.com'))
elif verb == 'list':
    if kept[kind].exists():
        found = kept[kind].read_text()
        print('keyfold' if flags['--format'] == 'value(name)' else found)
        if kind == 'queued-resources' and 'WAITING' in found:
            request.write_text('keyfold ACTIVE')
            provide('READY')
elif verb == 'list-instances':
    state = slice_.read_text().split()[1]
    second = {'READY': 'RUNNING', 'PREEMPTED': 'TERMINATED'}.get(state, 'STAGING')
    print(f'keyfold-0 RUNNING\nkeyfold-1 {second}')
    if state == 'CREATING':
        slice_.write_text('keyfold READY')
elif verb == 'create':
    if kept[kind].exists() or slice_.exists() or request.exists():
        sys.exit('it exists')
    if kind == 'tpu-vm':
        provide('READY')
    elif kind == 'instance-groups':
        policy = 'projects/mine/regions/us-central1/resourcePolicies/keyfold'
        assert flags['--workload-policy'] == policy and flags['--target-size-policy-mode'] == 'bulk'
        assert flags['--size'] == '2' and all(kept[k].exists() for k in list(kept)[-2:])
        provide('CREATING')
    else:
        kept[kind].write_text('keyfold WAITING_FOR_RESOURCES')
elif verb == 'delete':
    if kept[kind] in (slice_, request):
        shutil.rmtree(homes)
        request.unlink(missing_ok=True)
    kept[kind].unlink(missing_ok=True)
    if kind == 'queued-resources':
        slice_.unlink(missing_ok=True)
elif slice_.read_text() != 'keyfold READY':
    sys.exit('the slice is not ready')
elif verb == 'scp':
    machine, _, path = names[1].partition(':')
    for home in homes.iterdir():
        if kind == 'tpu-vm' or machine == f'keyfold-{home.name}':
            shutil.copy(names[0], home / path)
else:
    lost = cloud / 'lost'  # words of commands whose connection is lost, once each
    for word in lost.read_text().split() if lost.exists() else []:
        if word in flags['--command']:
            lost.write_text(lost.read_text().replace(word, '', 1))
            sys.exit(255)
    chosen = [names[0][-1]] if kind == 'machine' else [flags['--worker']]
    port = (cloud / 'port').read_text()
    pod = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': '2'}
    workers = [
        subprocess.Popen(
            ['bash', '-c', flags['--command']],
            cwd=homes / index,
            env=os.environ | pod | {'JAX_PROCESS_ID': index, 'HOME': str(homes / index)},
        )
        for index in ('01' if chosen == ['all'] else chosen)
    ]
    sys.exit(max(worker.wait() for worker in workers))
"""
MAKE = """
echo "$@" >>"$CLOUD/made"
mkdir -p .venv/bin
cp "$CLOUD/bin/worker-python" .venv/bin/python
"""


class Cloud:
    """The stand-in: its folder, and the launcher that uses it."""

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        """Makes an empty cloud, whose workers run train.py with this Python."""
        self.folder, self.launcher = folder, launcher
        (folder / 'bin').mkdir()
        self.put('gcloud', GCLOUD, f'{sys.executable} -IS')
        self.put('make', MAKE)
        self.put('sudo', 'exit 1')
        self.put('python3', f'exec {shlex.quote(sys.executable)} "$@"')
        self.put('worker-python', f'exec {shlex.quote(sys.executable)} "$@"')

    def put(self, name: str, text: str, interpreter: str = '/bin/sh') -> None:
        """Adds a program that is found before others."""
        file = self.folder / 'bin' / name
        file.write_text(f'#!{interpreter}\n{text}\n')
        file.chmod(0o755)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Starts the launcher."""
        found = {'CLOUD': str(self.folder), 'PATH': f'{self.folder}/bin:{os.environ["PATH"]}'}
        place = {'PROJECT_ID': 'mine', 'ZONE': 'us-central1-a', 'POLL_SECONDS': '0'}
        return subprocess.Popen(
            [self.launcher.script, *words],
            cwd=runs.ROOT,
            env=runs.environment(2) | place | self.launcher.settings | found | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        """Runs the launcher; returns exit code, standard output and standard error."""
        return ended(self.start(*words, **env))

    def calls(self) -> list[str]:
        """Returns kind and verb of every gcloud command but those that only look."""
        file = self.folder / 'calls'
        words = [json.loads(line) for line in file.read_text().splitlines()]
        return [
            call[0]
            for call in words
            if ' list' not in call[0] and not any('echo idle' in word for word in call)
        ]

    def pids(self) -> list[int]:
        """Returns the sessions of the run, one per worker."""
        files = sorted((self.folder / 'workers').glob('*/keyfold-run/pid'))
        return [int(file.read_text()) for file in files]

    def preempt(self) -> None:
        """Preempts the slice: everything on it dies."""
        (self.folder / 'slice').write_text('keyfold PREEMPTED')
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a launcher; returns exit code, standard output and standard error."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, errors


@pytest.fixture(params=[TPU_VM, TPU_MIG], ids=lambda launcher: launcher.script[7:-3])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """Both launchers, one after the other."""
    return request.param


@pytest.fixture
def cloud(tmp_path: Path, launcher: Launcher) -> Iterator[Cloud]:
    """Makes a cloud without a slice; what runs on it ends with the test."""
    if not (runs.ROOT / '.git').exists() or not shutil.which('setsid'):
        pytest.skip('needs a git checkout, and setsid')
    made = Cloud(tmp_path, launcher)
    yield made
    made.preempt()


vm = pytest.mark.parametrize('launcher', [TPU_VM])
mig = pytest.mark.parametrize('launcher', [TPU_MIG])


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until `condition()` holds, while the process runs."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_stopped_killed_and_preempted_run_ends_in_the_same_bits(
    cloud: Cloud, tmp_path: Path
) -> None:
    """Two workers: asked to stop, then one of them killed and the slice taken away."""
    run, undisturbed = tmp_path / 'run', tmp_path / 'undisturbed'
    short = {'checkpoint_every': 2, 'data__bucket_lengths': '(42,)'}
    flags = ['--', *runs.command(run, **short)[2:]]
    first = cloud.start('resume', *flags)
    wait_for((run / 'checkpoints' / '2').exists, first)
    assert cloud.run('stop')[0] == 0
    code, output, errors = ended(first)
    assert code == REQUEUE, output + errors
    assert not (run / 'lock.json').exists()
    assert f'ended with exit code {REQUEUE}' in cloud.run('status')[1]

    again = cloud.start('watch', *flags)
    saved = set((run / 'checkpoints').iterdir())
    wait_for(lambda: set((run / 'checkpoints').iterdir()) - saved, again)
    os.killpg(cloud.pids()[1], signal.SIGKILL)
    cloud.preempt()
    code, output, errors = ended(again)
    assert code == 0, output + errors
    assert output.count('resumed after step') == 2
    assert not (run / 'checkpoints' / '0').exists()

    launcher = cloud.launcher
    ssh = [launcher.ssh] * launcher.each
    go_on = [*[launcher.scp] * launcher.each, *ssh * 4]
    expected = [*launcher.asks, *go_on, *ssh * 2, *go_on, *launcher.again, *go_on]
    assert cloud.calls() == expected
    runs.finish(undisturbed, devices=1, **short)
    assert runs.outcome(run) == runs.outcome(undisturbed)
    assert json.loads((run / 'summary.json').read_text())['process_count'] == 2


AWKWARD = ["--config.a=it's $HOME", '--config.b=two  spaces "and" `quotes`', '--x=\\n*;&\n|', '']


def test_flags_arrive_on_the_workers_as_they_were_given(cloud: Cloud) -> None:
    record = f'import json, sys; print(json.dumps(sys.argv[1:]))\nprint({REQUEUE})'
    cloud.put('worker-python', record, sys.executable)
    code, output, errors = cloud.run('resume', *RUN, *AWKWARD)
    assert code == 0, errors
    printed = {line for line in output.splitlines() if line.startswith('[')}
    assert [json.loads(line) for line in printed] == [['train.py', *RUN[1:], *AWKWARD]]
    assert (cloud.folder / 'made').read_text() == 'setup ACCELERATOR=tpu PYTHON=python3\n' * 2
    copy = cloud.folder / 'workers' / '1' / 'keyfold'
    assert (copy / 'train.py').read_bytes() == (runs.ROOT / 'train.py').read_bytes()
    assert not (copy / '.git').exists()


@pytest.mark.parametrize(
    ('codes', 'end', 'starts'),
    [([2, 0], 2, 1), ([REQUEUE, 137, 0, 1], 0, 3), ([1, REQUEUE, 1, 1, 1, 0], 1, 5)],
)
def test_watch_restarts_what_may_succeed(
    cloud: Cloud, codes: list[int], end: int, starts: int
) -> None:
    """Never after a final code, always after 75, three times after crashes."""
    (cloud.folder / 'codes').write_text('\n'.join(map(str, codes)))
    take = 'code=$(head -n 1 "$CLOUD/codes"); sed -i 1d "$CLOUD/codes"; exit "$code"'
    cloud.put('worker-python', f'[ "$JAX_PROCESS_ID" = 0 ] || exit 0; {take}')
    code, _, errors = cloud.run('watch', *RUN)
    assert code == end, errors
    assert len((cloud.folder / 'codes').read_text().split()) == len(codes) - starts


@mig
@pytest.mark.parametrize(
    ('codes', 'end'), [((1, 3), 3), ((2, 137), 2), ((0, REQUEUE), REQUEUE), ((REQUEUE, 1), REQUEUE)]
)
def test_exit_code_of_a_group_is_the_highest_but_first_one_that_ends_the_run(
    cloud: Cloud, codes: tuple[int, int], end: int
) -> None:
    cloud.put('worker-python', 'exit $(echo "$CODES" | cut -d, -f$((JAX_PROCESS_ID + 1)))')
    code, _, errors = cloud.run('resume', *RUN, CODES=','.join(map(str, codes)))
    assert code == end, errors


def test_set_up_that_fails_is_tried_again_and_is_not_taken_for_bad_input(cloud: Cloud) -> None:
    cloud.put('make', 'echo "$@" >>"$CLOUD/made"; exit 2')
    code, _, errors = cloud.run('watch', *RUN)
    assert code == 1, errors
    assert len((cloud.folder / 'made').read_text().splitlines()) == 2 * 4  # on two workers


def test_ctrl_c_ends_watch_and_not_the_run(cloud: Cloud) -> None:
    until_told = 'while [ ! -e "$CLOUD/enough" ]; do sleep 0.1; done'
    cloud.put('worker-python', until_told)
    process = cloud.start('watch', *RUN)
    wait_for((cloud.folder / 'calls').exists, process)
    wait_for(lambda: 'follow' in (cloud.folder / 'calls').read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process)[0] == 130
    for pid in cloud.pids():
        os.kill(pid, 0)
    (cloud.folder / 'enough').touch()


def test_run_that_is_running_is_followed_and_not_started_again(cloud: Cloud) -> None:
    until_told = 'while [ ! -e "$CLOUD/enough" ]; do sleep 0.1; done'
    cloud.put('worker-python', f'echo started; {until_told}; echo ended; exit 3')
    process = cloud.start('resume', *RUN)
    wait_for((cloud.folder / 'calls').exists, process)
    wait_for(lambda: 'follow' in (cloud.folder / 'calls').read_text(), process)
    pids = cloud.pids()
    os.killpg(process.pid, signal.SIGINT)  # the connection ends, the run does not
    process.communicate()
    looked = (cloud.folder / 'calls').read_text().count('follow')
    process = cloud.start('resume', *RUN)
    wait_for(lambda: (cloud.folder / 'calls').read_text().count('follow') > looked, process)
    (cloud.folder / 'enough').touch()
    code, output, errors = ended(process)
    assert code == 3, errors
    followed = 1 if cloud.launcher is TPU_VM else 2
    assert sorted(output.split()) == ['ended'] * followed + ['started'] * followed
    assert cloud.pids() == pids
    assert cloud.calls().count(cloud.launcher.scp) == cloud.launcher.each


@vm
def test_lost_connections_are_no_crashes_and_start_nothing_again(cloud: Cloud) -> None:
    until_told = 'while [ ! -e "$CLOUD/enough" ]; do sleep 0.1; done'
    cloud.put('worker-python', f'{until_told}; exit 3')
    (cloud.folder / 'lost').write_text('follow ' * 5)
    process = cloud.start('watch', *RUN)
    wait_for((cloud.folder / 'calls').exists, process)
    wait_for(lambda: (cloud.folder / 'calls').read_text().count('follow') > 5, process)
    pids = cloud.pids()
    (cloud.folder / 'lost').write_text('idle')
    assert cloud.run('resume', *RUN)[0] == 255  # it may still run, so nothing is set up again
    (cloud.folder / 'enough').touch()
    code, _, errors = ended(process)
    assert code == 3, errors
    assert cloud.pids() == pids
    assert cloud.calls().count('tpu-vm scp') == 1


@vm
def test_queued_resource_is_waited_for_replaced_and_deleted(cloud: Cloud) -> None:
    code, _, errors = cloud.run('create', '--queued')
    assert code == 0, errors
    states = ['missing', 'WAITING_FOR_RESOURCES', 'READY']
    assert [line.rpartition(' is ')[2] for line in errors.splitlines()] == states
    (cloud.folder / 'slice').unlink()
    (cloud.folder / 'request').write_text('keyfold SUSPENDED')  # after a preemption
    assert cloud.run('create', QUEUED='1')[0] == 0
    assert cloud.run('delete', '--queued')[0] == 0
    assert cloud.calls() == [f'queued-resources {v}' for v in ('create', 'delete') * 2]
    assert not (cloud.folder / 'slice').exists()


@mig
def test_group_is_made_once_waited_for_replaced_if_it_is_spot_and_deleted(cloud: Cloud) -> None:
    for spot, states in (('1', ['missing', 'WAITING', 'READY']), ('', ['READY'])):
        code, _, errors = cloud.run('create', SPOT=spot)
        assert code == 0, errors
        assert [line.rpartition(' is ')[2] for line in errors.splitlines()] == states
    (cloud.folder / 'slice').write_text('keyfold PREEMPTED')
    waits = cloud.start('create', SPOT='', POLL_SECONDS='1')  # Compute Engine restarts these
    assert waits.stderr is not None
    assert waits.stderr.readline() == 'keyfold: the slice is WAITING\n'
    (cloud.folder / 'slice').write_text('keyfold READY')
    assert ended(waits)[0] == 0
    (cloud.folder / 'slice').write_text('keyfold PREEMPTED')
    assert 'is PREEMPTED' in cloud.run('create')[2]
    assert cloud.run('delete')[0] == 0
    assert cloud.run('delete')[0] == 0  # again: nothing is left
    deletes = [f'{GROUP} delete', 'instance-templates delete', 'resource-policies delete']
    assert cloud.calls() == [*TPU_MIG.asks, *TPU_MIG.again, *deletes]


@vm
def test_worker_without_a_new_enough_python_gets_one(cloud: Cloud) -> None:
    for name in ('python3', 'python3.11', 'python3.12', 'python3.13'):
        cloud.put(name, 'exit 1')
    cloud.put('sudo', 'echo "$@" >>"$CLOUD/installed"')
    assert cloud.run('create')[0] == 0
    assert cloud.run('setup')[0] == 0
    assert (cloud.folder / 'made').read_text() == 'setup ACCELERATOR=tpu PYTHON=python3.12\n' * 2
    assert 'install --yes python3.12-venv' in (cloud.folder / 'installed').read_text()


@vm
def test_dry_run_prints_commands_that_a_shell_reads_back_and_runs_none(cloud: Cloud) -> None:
    code, output, _ = cloud.run('watch', '--spot', '--dry-run', '--name=s', *RUN, *AWKWARD)
    assert code == 0
    assert not (cloud.folder / 'calls').exists()
    words = shlex.split(output)
    begins = [index for index, word in enumerate(words) if word in ('git', 'gcloud')]
    ends = [*begins[1:], len(words)]
    pack, *commands = [words[begin:end] for begin, end in zip(begins, ends, strict=True)]
    assert pack[:2] == ['git', '-C']
    assert all(command[:4] == ['gcloud', 'compute', 'tpus', 'tpu-vm'] for command in commands)
    assert all(command[-3:] == WHERE for command in commands)
    looks, create, copy, unpack, setup, start, follow = [command[4:-3] for command in commands]
    assert looks == ['list', '--format=value(name.basename(),state)']
    version, kind = '--version=v2-alpha-tpuv5-lite', '--accelerator-type=v5litepod-16'
    assert create == ['create', 's', version, kind, '--spot']
    archive = pack[-2].removeprefix('--output=')
    assert copy[:4] == ['scp', archive, 's:keyfold.tar.gz', '--worker=all']
    assert all(ssh[:3] == ['ssh', 's', '--worker=all'] for ssh in (unpack, setup, start))
    assert follow[:3] == ['ssh', 's', '--worker=0']
    remote = shlex.split(start[-1].removeprefix('--command='))
    assert remote == ['bash', 'keyfold/launch/tpu_worker.sh', 'start', *RUN[1:], *AWKWARD]


@vm
@pytest.mark.parametrize(
    ('words', 'env', 'expected'),
    [
        (['launch'], {}, 'launch: no such command'),
        (['create', '--zones=a'], {}, '--zones=a: no such --FLAG=VALUE'),
        (['create', '--config=a'], {}, "come after ' -- '"),
        (['create', '--name=My slice'], {}, '--name=My slice: expected up to 40'),
        (['create', f'--name={"a" * 41}'], {}, f'--name={"a" * 41}: expected up to 40'),
        (['create'], {'ZONE': ''}, '--zone=ZONE, or ZONE, is missing'),
        (['delete'], {'PROJECT_ID': ''}, '--project=PROJECT, or PROJECT_ID, is missing'),
        (['watch', *RUN], {'RUNTIME_VERSION': ''}, '--runtime-version=NAME, or RUNTIME_VERSION'),
        (['run'], {}, '--config=FILE is missing'),
        (['run', '--', '--config=a'], {}, '--workdir=: expected gs://BUCKET/PATH'),
        (['run', '--', '--config=a', '--workdir=runs/a'], {}, '--workdir=runs/a: expected gs://'),
        (['create'], {'ACCOUNT': ''}, 'gcloud has no credentials: run gcloud auth login'),
        (['create'], {'POLL_SECONDS': 'soon'}, 'POLL_SECONDS=soon: expected a whole number'),
        (['create', '--accelerator-type=tpu7x-8'], {}, 'ends at v6e; use launch/tpu_mig.sh'),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    cloud: Cloud, words: list[str], env: dict[str, str], expected: str
) -> None:
    check_refusal(cloud, words, env, expected)


@mig
@pytest.mark.parametrize(
    ('words', 'env', 'expected'),
    [
        (['watch', *RUN], {'ZONE': ''}, '--zone=ZONE, or ZONE, is missing'),
        (['create'], {'TOPOLOGY': ''}, '--topology=CHIPS, or TOPOLOGY, is missing'),
        (['create', '--topology=2by2'], {}, '--topology=2by2: expected the chips of the slice'),
        (['create', '--topology=3x3'], {}, '--topology=3x3: expected a multiple of the 4 chips'),
        (
            ['create', '--topology=1x1'],
            {},
            '--topology=1x1: fewer chips than one tpu7x-standard-4t',
        ),
        (
            ['create'],
            {'MACHINE_TYPE': 'n2-standard-4'},
            '--machine-type=n2-standard-4: expected one',
        ),
        (['create', '--queued'], {}, '--queued: no such --FLAG=VALUE'),
        (['run', '--', '--config=a', '--workdir=runs/a'], {}, '--workdir=runs/a: expected gs://'),
    ],
)
def test_a_mistake_about_a_group_is_one_line_and_changes_nothing(
    cloud: Cloud, words: list[str], env: dict[str, str], expected: str
) -> None:
    check_refusal(cloud, words, env, expected)


def check_refusal(cloud: Cloud, words: list[str], env: dict[str, str], expected: str) -> None:
    """Checks that a command is refused in one line, before anything is done."""
    runs.check_refusal(cloud.run(*words, **env), expected)
    assert not (cloud.folder / 'slice').exists()


@vm
def test_without_googles_command_line_it_says_so(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / 'few').mkdir()
    for name in ('bash', 'dirname', 'env'):
        (tmp_path / 'few' / name).symlink_to(str(shutil.which(name)))
    code, _, errors = cloud.run('create', PATH=str(tmp_path / 'few'))
    assert code == 2
    assert errors == 'error: gcloud is not on PATH: install the Google Cloud CLI\n'


@vm
def test_workdir_on_a_disk_is_taken_with_a_warning(cloud: Cloud) -> None:
    code, _, errors = cloud.run('run', '--dry-run', *RUN[:2], '--workdir=/mnt/shared/run')
    assert code == 0
    assert 'warning: all workers must mount the file system of --workdir=/mnt/shared' in errors


def test_help_is_the_head_of_the_script(cloud: Cloud) -> None:
    code, output, _ = cloud.run('--help')
    assert code == 0
    assert output == cloud.run()[1]
    assert all(f'\n{name} ' in output for name in ('create', 'watch', 'delete'))
    assert '#' not in output


@mig
def test_dry_run_of_a_group_prints_commands_that_a_shell_reads_back(cloud: Cloud) -> None:
    flags = ['--template-flag=--reservation=R', '--topology=4x4x4', *RUN]
    code, output, _ = cloud.run('watch', '--dry-run', *flags)
    assert code == 0
    assert not (cloud.folder / 'calls').exists()
    commands = [shlex.split(line)[1:] for line in output.splitlines()[1:]]
    assert all(command[0] == 'compute' and '--project=mine' in command for command in commands)
    made = [command for command in commands if 'create' in command]
    policy, template, group = made
    assert policy[3:5] == ['workload-policy', 'keyfold']
    assert '--accelerator-topology=4x4x4' in policy
    assert {'--provisioning-model=SPOT', '--reservation=R'} <= set(template)
    assert {'--size=16', '--zone=us-central1-a', '--template=keyfold'} <= set(group)
    start = next(command[-4] for command in commands if ' start ' in command[-4])
    remote = shlex.split(start.removeprefix('--command='))
    assert remote == ['bash', 'keyfold/launch/tpu_worker.sh', 'start', *RUN[1:]]
    one = cloud.run('create', '--dry-run', '--topology=2x2x1')[1]
    assert 'resource-policies' not in one  # no links between machines, no policy
    assert '--target-size-policy-mode' not in one


@pytest.mark.parametrize(
    ('platforms', 'env', 'asks'),
    [
        (None, {}, False),
        ('cpu', {'TPU_WORKER_HOSTNAMES': 'a,b'}, False),
        ('cuda', {}, False),
        ('tpu,cpu', {}, True),
        ('tpu', {'TPU_SKIP_MDS_QUERY': '1'}, False),
        ('tpu,cpu', {'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
        ('tpu,cpu', {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_SKIP_MDS_QUERY': 'true'}, True),
        ('tpu,cpu', {'TPU_PROCESS_ADDRESSES': 'a:1,b:1', 'TPU_WORKER_HOSTNAMES': 'a'}, True),
    ],
)
def test_other_hosts_are_asked_for_only_where_there_is_a_tpu(
    monkeypatch: pytest.MonkeyPatch, platforms: str | None, env: dict[str, str], asks: bool
) -> None:
    for name in ('TPU_SKIP_MDS_QUERY', 'TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', platforms)
    try:
        assert processes.in_tpu_slice() is asks
    finally:
        jax.config.update('jax_platforms', before)


ON_A_TPU_VM = """
import os, jax
from jax._src.clusters import cloud_tpu_cluster
from errors import REQUEUE
from runtime import processes

cloud_tpu_cluster.running_in_cloud_tpu_vm = True  # as where there are TPU chips, and libtpu
os.environ.pop('TPU_SKIP_MDS_QUERY')
jax.config.update('jax_platforms', 'tpu,cpu')
meet = processes.meet

def meet_on_cpu():
    jax.config.update('jax_platforms', 'cpu')
    meet()

processes.meet = meet_on_cpu
processes.join(60)
print(f'host {jax.process_index()} of {jax.process_count()}', flush=True)
"""


@contextlib.contextmanager
def metadata_server(worker: int, endpoints: str) -> Iterator[str]:
    """Gives the address of a server that tells a TPU VM its place in the slice."""
    answers = {'agent-worker-number': str(worker), 'worker-network-endpoints': endpoints}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path.rpartition('/')[2], '').encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.mark.parametrize('endpoints', ['127.0.0.1', 'a:0:127.0.0.1,b:1:127.0.0.1'])
def test_hosts_of_a_tpu_vm_slice_find_each_other_through_its_metadata(endpoints: str) -> None:
    """JAX's own code for TPU VMs believes that there are chips, and asks a stand-in server."""
    with socket.create_server(('', 0)) as probe:
        port = str(probe.getsockname()[1])
    count = len(endpoints.split(','))
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(metadata_server(n, endpoints)) for n in range(count)]
        hosts = [
            subprocess.Popen(
                [sys.executable, '-c', ON_A_TPU_VM],
                cwd=runs.ROOT,
                env=runs.environment(2, GCE_METADATA_IP=address, JAX_COORDINATOR_PORT=port),
                stdout=subprocess.PIPE,
                text=True,
            )
            for address in servers
        ]
        printed = [host.communicate(timeout=PATIENCE)[0] for host in hosts]
    found = [re.findall('^host .*', text, re.MULTILINE) for text in printed]
    assert found == [[f'host {index} of {count}'] for index in range(count)], printed
