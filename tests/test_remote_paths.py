"""The promises about paths in a bucket, shown on a stand-in (tests/bucket.py).

What a real bucket may do besides is not shown here: docs/launch.md, Buckets.
"""

import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from configs.schema import DataConfig
from errors import RunError, Unavailable, UserError
from input_pipeline import text_files
from input_pipeline.examples import Features
from runtime import command_line, lock, processes, storage
from runtime.checkpoints import Checkpoints
from tests import runs
from tests.bucket import Storage
from tests.test_processes import finish_pod
from tools import compare_runs, predict

NUMBERS = itertools.count()


@pytest.fixture(scope='module')
def store() -> Iterator[Storage]:
    """The stand-in, where this process and those that it starts look for Google's."""
    served = Storage('box')
    found_by = {
        'STORAGE_EMULATOR_HOST': served.url,
        'TENSORSTORE_GCS_HTTP_URL': served.url,
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # gRPC, for buckets of another kind
    }
    with mock.patch.dict(os.environ, found_by):
        pytest.importorskip('gcsfs')
        yield served
    served.shutdown()
    served.server_close()
    assert not served.not_known


@pytest.fixture
def workdir(store: Storage) -> Iterator[epath.Path]:
    """Of a run that is about to begin, in an empty bucket."""
    name = f'bucket-{next(NUMBERS)}'
    store.buckets[name] = {}
    yield storage.open_location(f'gs://{name}/a/run')
    store.refused, store.code, store.before = '^$', 403, ('^$', bool)


def objects(store: Storage, folder: epath.Path) -> dict[str, bytes]:
    """What is in a folder, by the names within it."""
    bucket, _, prefix = f'{folder}/'.removeprefix('gs://').partition('/')
    return {
        name.removeprefix(prefix): data
        for name, (_, data) in store.buckets[bucket].copy().items()
        if name.startswith(prefix)
    }


def soon(condition: Callable[[], object]) -> None:
    """Waits until a condition holds, and fails after half a minute."""
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


# A run


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on this machine."""
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    runs.finish(workdir)
    return workdir


@pytest.fixture(scope='module')
def disturbed(store: Storage) -> epath.Path:
    """That of a run in a bucket, killed where it would commit step 12, and finished by a pod."""
    workdir = epath.Path('gs://box/run')
    with mock.patch.object(runs, 'COMPILED', 'gs://box/compiled'):
        process = runs.start(workdir)

    def kill() -> None:
        process.kill()
        raise ConnectionAbortedError  # and so the call does nothing

    store.before = ('POST .*/checkpoints/12/commit_success', kill)
    output, _ = process.communicate(timeout=300)
    store.before = ('^$', bool)
    assert process.returncode == -signal.SIGKILL, output
    assert 'checkpoints/12/state/_METADATA' in objects(store, workdir)
    programs = objects(store, epath.Path('gs://box/compiled'))
    assert any(name.startswith('jit_update') for name in programs), programs.keys()
    assert Checkpoints(storage.open_location(str(workdir))).steps() == [0, 6]
    assert 'resumed after step 6' in finish_pod('2x1', workdir)
    return workdir


@pytest.mark.long
def test_run_in_a_bucket_killed_in_a_save_and_finished_by_a_pod_is_the_run_of_a_local_disk(
    store: Storage, disturbed: epath.Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.outcome(disturbed) == runs.outcome(undisturbed)
    assert compare_runs.main([str(disturbed), str(undisturbed)]) == 0
    assert 'The same run, bit for bit: 24 steps' in capsys.readouterr().out
    left = objects(store, disturbed)
    names = {re.sub('tfevents.*', 'tfevents', name) for name in left}
    kept = {name for name in names if not name.startswith('checkpoints/')}
    assert kept == {
        'config.json', 'summary.json', 'vocabulary.txt', 'metrics.csv',
        'tensorboard/events.out.tfevents',
        *(f'ledger/{n - 5:09d}-{n:09d}.npy' for n in (6, 12, 18, 24)),
    }  # fmt: skip
    # The newest two, and the earlier of two evaluations with the same accuracy.
    assert {name.split('/')[1] for name in names - kept} == {'12', '18', '24'}
    points = [scalars(left[name]) for name in left if 'tfevents' in name]
    files = (undisturbed / 'tensorboard').iterdir()
    assert set().union(*points) == set().union(*(scalars(file.read_bytes()) for file in files))
    tables = left['metrics.csv'].decode(), (undisturbed / 'metrics.csv').read_text()
    rows = [[row for row in text.splitlines() if '_per_second,' not in row] for text in tables]
    assert rows[0] == rows[1]


def scalars(events: bytes) -> set[tuple[int, str]]:
    """(step, tag) of every event in TensorBoard's file."""
    found, place = set(), 0
    while place < len(events):
        (size,) = struct.unpack_from('<Q', events, place)
        event = Event.FromString(events[place + 12 : place + 12 + size])
        found |= {(event.step, value.tag) for value in event.summary.value}
        place += size + 16
    return found


@pytest.mark.long
def test_tools_read_a_run_in_a_bucket(
    disturbed: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, '-m', 'tools.replay', str(disturbed), '--step=20']
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment(2), capture_output=True, text=True
    )
    assert 'the same bits as the ledger' in done.stdout.splitlines(), done
    assert predict.main([str(disturbed), '--text', 'i hated it']) == 0
    assert json.loads(capsys.readouterr().out)['text'] == 'i hated it'
    with pytest.raises(SystemExit):
        compare_runs.main([str(disturbed), str(disturbed / 'none')])
    assert 'found no folder' in capsys.readouterr().err


@pytest.mark.long
def test_damaged_checkpoint_in_a_bucket_is_moved_aside_whole_and_a_barred_one_is_left_alone(
    store: Storage, disturbed: epath.Path, workdir: epath.Path
) -> None:
    for name, data in objects(store, disturbed).items():
        store.put(workdir.parts[2], f'a/run/{name}', data)
    before = objects(store, workdir)
    for barred in ('run/metadata', 'state/manifest'):
        store.refused = f'GET .*/checkpoints/24/{barred}.*alt=media'
        predicting = [sys.executable, '-m', 'tools.predict', str(workdir), '--text', 'good']
        for command in (predicting, runs.command(workdir)):
            done = subprocess.run(
                command, cwd=runs.ROOT, env=runs.environment(2), capture_output=True, text=True
            )
            assert done.returncode == 2, done
            assert re.match(
                f'error: {workdir}.*(Forbidden|PERMISSION_DENIED)', done.stderr.splitlines()[-1]
            ), done
            assert 'Traceback' not in done.stderr, done.stderr  # of threads of TensorStore
            assert 'damaged' not in done.stdout + done.stderr
    store.refused = '^$'
    assert objects(store, workdir) == before

    name = next(name for name in before if re.match('checkpoints/24/state/d/', name))
    store.put(workdir.parts[2], f'a/run/{name}', before[name][:-1])
    damaged = objects(store, workdir / 'checkpoints' / '24')
    output = runs.finish(workdir)
    assert '24 is damaged' in output
    assert 'resumed after step 18' in output
    assert objects(store, workdir / 'damaged' / '24') == damaged
    assert 'OUT_OF_RANGE' in (workdir / 'damaged' / 'why-24.txt').read_text()
    assert runs.outcome(workdir) == runs.outcome(disturbed)


# The lease


def test_second_run_in_a_bucket_is_refused_while_the_first_renews_its_lease(
    store: Storage, workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, 'LEASE_SECONDS', 1.2)
    with lock.exclusive_workdir(workdir):
        refusal = f'held by process {os.getpid()} on {socket.gethostname()}; stop that run'
        with pytest.raises(UserError, match=refusal), lock.exclusive_workdir(workdir):
            pass
        assert set(objects(store, workdir)) == {'lock.json'}
    assert not objects(store, workdir)


@pytest.mark.parametrize('text', ['{"host": "elsewhere", "pid": 7, "id": "x"}', '', '{', '[]'])
def test_lease_of_a_dead_holder_expires(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(lock, 'LEASE_SECONDS', 0.3)
    (workdir / 'lock.json').write_text(text)
    began = time.monotonic()
    with lock.exclusive_workdir(workdir):
        assert time.monotonic() - began >= 0.3
        assert json.loads((workdir / 'lock.json').read_text())['pid'] == os.getpid()


@pytest.mark.parametrize('lease', ['none', 'expired'])
def test_of_two_runs_that_start_together_in_a_bucket_one_gets_it(
    store: Storage, workdir: epath.Path, monkeypatch: pytest.MonkeyPatch, lease: str
) -> None:
    """The other one writes between our last look and our write."""
    monkeypatch.setattr(lock, 'LEASE_SECONDS', 0.3)
    if lease == 'expired':
        (workdir / 'lock.json').write_text('{"host": "dead", "pid": 6}')
    bucket, other = workdir.parts[2], b'{"host": "elsewhere", "pid": 7, "id": "x"}'

    def overtake() -> None:
        store.before = ('^$', bool)
        store.put(bucket, 'a/run/lock.json', other)

    store.before = ('POST', overtake)
    with (
        pytest.raises(UserError, match='held by process 7 on elsewhere'),
        lock.exclusive_workdir(workdir),
    ):
        pass
    assert objects(store, workdir) == {'lock.json': other}


def test_run_whose_lease_was_taken_over_exits_with_4_and_leaves_the_new_lease(
    store: Storage, workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, 'LEASE_SECONDS', 0.6)
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(processes, 'end_now', lambda *given: ended.append(given))
    other = json.dumps({'host': socket.gethostname(), 'pid': 7, 'id': 'x'}).encode()
    with lock.exclusive_workdir(workdir):
        store.put(workdir.parts[2], 'a/run/lock.json', other)
        soon(lambda: ended)
    assert ended[0] == (f'error: {workdir}: another run took it over', 4)


def test_renewal_whose_answer_was_lost_is_not_a_takeover(workdir: epath.Path) -> None:
    lease = lock.Lease(workdir)
    lease.acquire()
    before = lease._generation
    lease.renew()
    lease._generation = before  # as if we had not heard of it
    lease.renew()
    lease.renew()
    lease.release()
    assert not (workdir / 'lock.json').exists()


def test_released_lease_of_another_run_is_left_alone(store: Storage, workdir: epath.Path) -> None:
    lease, other = lock.Lease(workdir), b'{"host": "elsewhere", "pid": 7, "id": "x"}'
    lease.acquire()
    store.put(workdir.parts[2], 'a/run/lock.json', other)
    with pytest.raises(lease._errors.PreconditionFailed):
        lease.release()
    assert objects(store, workdir) == {'lock.json': other}


def test_lease_that_is_released_while_it_is_read_is_free(
    store: Storage, workdir: epath.Path
) -> None:
    """Its holder deletes it before the request for its text is answered."""
    (workdir / 'lock.json').write_text('{"host": "elsewhere", "pid": 7, "id": "x"}')

    def release() -> None:
        store.before = ('^$', bool)
        del store.buckets[workdir.parts[2]]['a/run/lock.json']

    store.before = ('GET .*lock.json.*alt=media', release)
    with lock.exclusive_workdir(workdir):
        assert json.loads((workdir / 'lock.json').read_text())['pid'] == os.getpid()


def test_lease_is_renewed_again_when_a_bucket_that_failed_is_back(
    store: Storage, workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, 'LEASE_SECONDS', 0.6)
    store.code = 400  # which Google's client does not retry
    with lock.exclusive_workdir(workdir):
        store.refused = '.'
        asked = len(store.calls)
        soon(lambda: len(store.calls) > asked + 1)
        store.refused = '^$'
        before = objects(store, workdir)['lock.json']
        soon(lambda: objects(store, workdir)['lock.json'] != before)


# What is in the way


@pytest.mark.parametrize(
    ('refused', 'problem'),
    [
        ('.', r'cannot be reached \(Forbidden'),
        (r'GET /storage/v1/b/bucket-\d+\?', r'cannot be reached \(403 GET .*/b/bucket-'),
        ('POST', r'cannot be written \(403 POST'),
    ],
    ids=['list', 'buckets.get, as Orbax will', 'write'],
)
def test_missing_permission_is_told_before_anything_is_done(
    store: Storage, workdir: epath.Path, refused: str, problem: str
) -> None:
    store.refused = refused
    with (
        pytest.raises(UserError, match=f'^{workdir}: {problem}'),
        lock.exclusive_workdir(command_line.check_workdir(str(workdir))),
    ):
        pass
    assert not objects(store, workdir)


def test_missing_package_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, package in (('gs://box/run', 'gcsfs'), ('s3://box/run', 's3fs')):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError) as refused:
            storage.open_location(path)
        install = f'.venv/bin/pip install -c requirements.txt {package}'
        assert str(refused.value) == f'{path}: needs {package}; {install}'


def test_bucket_that_does_not_answer_is_waited_for_in_bounds(
    store: Storage, workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, 'ANSWER_SECONDS', 0.3)
    store.before = ('.', lambda: time.sleep(1.0))
    with pytest.raises(Unavailable, match='no answer within 0 s'):
        command_line.check_workdir(str(workdir))


def test_network_that_fails_is_worth_another_try_and_a_missing_bucket_is_not(
    store: Storage, workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(Exception):
        code = 404  # as Google's client raises it

    Missing.__module__ = 'google.api_core.exceptions'
    for error, kind in ((ConnectionRefusedError('refused'), Unavailable), (Missing(), UserError)):
        exists = mock.Mock(side_effect=error)
        monkeypatch.setattr(type(workdir), 'exists', exists)
        with pytest.raises(RunError, match='cannot be reached') as raised:
            storage.open_location(str(workdir))
        assert type(raised.value) is kind
    verbose = OSError('\n no route to host\n  in a trace of many lines')
    monkeypatch.setattr(type(workdir), 'exists', mock.Mock(side_effect=verbose))
    with pytest.raises(Unavailable, match=r'cannot be reached \(no route to host\); see docs'):
        storage.open_location(str(workdir))


def test_only_a_folder_of_a_gs_bucket_can_be_a_workdir(store: Storage, workdir: epath.Path) -> None:
    (workdir / 'file').write_text('precious')
    with pytest.raises(UserError, match=r'expected a folder, gs://.*/file is a file'):
        command_line.check_workdir(f'{workdir}/file')
    for wrong in ('s3://box/run', 'http://box/run'):
        with pytest.raises(UserError, match='expected a local folder or gs://BUCKET/FOLDER'):
            command_line.check_workdir(wrong)
    with pytest.raises(UserError, match='in a bucket: gs://BUCKET/FOLDER'):
        command_line.check_workdir('gs:///run')
    assert objects(store, workdir) == {'file': b'precious'}


@pytest.mark.long
def test_missing_bucket_is_one_line_and_exit_code_2_and_is_not_made(store: Storage) -> None:
    done = subprocess.run(
        runs.command(epath.Path('gs://none/run')),
        cwd=runs.ROOT,
        env=runs.environment(devices=2),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done
    assert re.fullmatch(r'error: gs://none/run: .* bucket does not exist.*\n', done.stderr)
    assert 'none' not in store.buckets


# Files


def test_what_others_write_is_seen(store: Storage, workdir: epath.Path) -> None:
    """gcsfs keeps lists, with the sizes that files had."""
    (workdir / 'a').write_text('short')
    assert [path.name for path in workdir.iterdir()] == ['a']
    bucket = workdir.parts[2]
    store.put(bucket, 'a/run/a', b'as long as it is now')
    store.put(bucket, 'a/run/b', b'')
    assert (workdir / 'a').read_text() == 'as long as it is now'
    assert sorted(path.name for path in workdir.iterdir()) == ['a', 'b']


def test_text_files_are_read_from_a_bucket(workdir: epath.Path, tmp_path: Path) -> None:
    for folder in (workdir, tmp_path):
        (folder / 'train.tsv').write_text('text\tlabel\nso good\t1\nso bad\t0\ngut größer\t1\n')
        (folder / 'dev.jsonl').write_text('{"text": "fine", "label": "1"}\n')

    features = Features(['text'], 'label')

    def read(folder: epath.Path | Path) -> list[object]:
        parts = [
            text_files.read(DataConfig(), str(folder / name), features, pytest.fail)
            for name in ('train.tsv', 'dev.jsonl')
        ]
        return [(part.texts, part.labels) for part in parts]

    assert read(workdir) == read(tmp_path)
    (workdir / 'dev.jsonl').unlink()
    with pytest.raises(UserError, match=f'^{workdir}/dev.jsonl: no such file'):
        read(workdir)
