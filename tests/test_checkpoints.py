"""A checkpoint gives back exactly what was saved, or is seen to be damaged; a good one never is."""

import builtins
import contextlib
import errno
import functools
import gc
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from errors import RunError, SaveFailed, Unavailable, UserError
from runtime import checkpoints
from runtime.checkpoints import Checkpoints, Damaged
from runtime.command_line import check_workdir
from training import keys, state
from training.state import TrainState

# Orbax leaves coroutines of a failed read behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Has what a failed read left behind complain here, where that is ignored."""
    yield
    gc.collect()


HEADER: dict[str, Any] = {
    'config': {'seed': 3},
    'task': {'vocabulary': ['good', 'bad']},
    'manifest': {'num_shards': 8},
}


def shapes(state: TrainState) -> TrainState:
    """Returns the target of a restore."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@functools.cache
def small_state(layout: Any, step: int) -> TrainState:
    """A state with every kind of array that a run saves."""
    noise = np.random.default_rng(step).standard_normal((20, 30), np.float32)
    params = {'kernel': jnp.asarray(noise), 'bias': jnp.ones(7, jnp.bfloat16)}
    optimizer = optax.adam(1e-3)
    made = TrainState(jnp.int32(step), params, optimizer.init(params), keys.root_keys(3, 'rbg'))
    return jax.device_put(made, layout.replicated)


def wait(keeper: Checkpoints) -> None:
    """Until nothing is being saved."""
    manager = keeper._manager
    while manager.is_saving_in_progress():
        time.sleep(0.01)


@pytest.fixture(scope='module')
def saved_once(tmp_path_factory: pytest.TempPathFactory, layout: Any) -> Path:
    """The workdir that `saved` copies."""
    workdir = tmp_path_factory.mktemp('saved')
    keeper = Checkpoints(epath.Path(workdir), keep_newest=2, keep_best=0, metric='accuracy')
    for step in (1, 2):
        keeper.save(small_state(layout(8), step), HEADER, None)
    keeper.close()
    return workdir


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path, layout: Any) -> tuple[Path, Any]:
    """A workdir with checkpoints of steps 1 and 2."""
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path, layout(2)


def restore(workdir: Path, layout: Any) -> TrainState:
    """The newest whole checkpoint, on two devices."""
    keeper = Checkpoints(epath.Path(workdir), keep_newest=2, keep_best=0, metric='accuracy')
    target = shapes(small_state(layout, 0))
    found, _ = keeper.restore(target)
    keeper.close()
    return found


def test_restored_state_has_the_saved_bits_and_key_on_another_device_count(saved: Any) -> None:
    found = restore(*saved)
    expected = small_state(saved[1], 2)
    assert state.state_fingerprint(found) == state.state_fingerprint(expected)
    for key, expected_key in zip(found.root_keys, expected.root_keys, strict=True):
        assert jax.random.key_impl(key) == 'rbg'
        np.testing.assert_array_equal(keys.key_words(key), keys.key_words(expected_key))


def test_checkpoint_is_told_of_when_it_is_committed_and_never_if_that_fails(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, may_commit = Checkpoints(epath.Path(tmp_path), keep_newest=2), threading.Event()
    keeper.save(small_state(layout(2), 1), HEADER, None)
    wait(keeper)
    assert keeper.poll() == 1

    rename = epath.gpath.PosixGPath.rename

    def slow(path: Any, target: Any) -> Any:
        may_commit.wait(20)
        return rename(path, target)

    def none(path: Any, target: Any) -> Any:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(epath.gpath.PosixGPath, 'rename', slow)
    keeper.save(small_state(layout(2), 2), HEADER, None)
    assert keeper.poll() == 1
    may_commit.set()
    wait(keeper)
    assert keeper.poll() == 2
    monkeypatch.setattr(epath.gpath.PosixGPath, 'rename', none)
    keeper.save(small_state(layout(2), 3), HEADER, None)
    wait(keeper)
    assert keeper.poll() == 2
    with pytest.raises(SaveFailed):
        keeper.close()


def test_failed_save_of_a_pod_ends_it_at_once_since_the_others_would_wait(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    keeper = Checkpoints(epath.Path(tmp_path))
    keeper.save(small_state(layout(2), 1), HEADER, None, before=full)
    assert keeper.poll() is None  # one process trains on
    monkeypatch.setattr(checkpoints.jax, 'process_count', lambda: 2)
    with pytest.raises(SaveFailed, match=r'No space left on device.*those before it are intact'):
        keeper.save(small_state(layout(2), 2), HEADER, None, before=full)


def test_save_that_lacks_a_process_does_not_blame_the_storage(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> None:
        raise jax.errors.JaxRuntimeError('Gloo all-reduce: connection closed by peer')

    monkeypatch.setattr(checkpoints.jax, 'process_count', lambda: 2)
    keeper = Checkpoints(epath.Path(tmp_path))
    with pytest.raises(Unavailable, match=r'another process does not answer \(Gloo'):
        keeper.save(small_state(layout(2), 1), HEADER, None, before=gone)


def kept_after(workdir: Path, layout: Any, launches: list[range]) -> list[list[int]]:
    """Returns the steps there are after each save, when each range is saved by another launch."""
    accuracy = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.9, 5: 0.8}  # later ones are not evaluated
    found = []
    for launch in launches:
        keeper = Checkpoints(epath.Path(workdir), 1, 1, 'accuracy')
        for step in launch:
            metrics = {'loss': 9.0 - step, 'accuracy': accuracy[step]} if step in accuracy else None
            keeper.save(small_state(layout, step), HEADER, metrics)
            wait(keeper)
            keeper.poll()
            found.append(keeper.steps())
        del keeper  # as if the process was killed
    return found


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory, layout: Any) -> list[list[int]]:
    """The steps there are after each save of a run that nothing happened to."""
    return kept_after(tmp_path_factory.mktemp('undisturbed'), layout(2), [range(1, 8)])


@pytest.mark.parametrize('ends', [(2,), (3,), (1, 2, 3, 4, 5)])
def test_best_checkpoint_is_the_same_however_often_the_run_is_killed_and_resumed(
    tmp_path: Path, layout: Any, undisturbed: list[list[int]], ends: tuple[int, ...]
) -> None:
    assert undisturbed == [[1], [2], [2, 3], [2, 4], [2, 5], [2, 6], [2, 7]]
    edges = (0, *ends, 7)
    launches = [range(first + 1, last + 1) for first, last in itertools.pairwise(edges)]
    assert kept_after(tmp_path, layout(2), launches) == undisturbed


def test_older_checkpoint_that_cannot_be_read_is_not_deleted(tmp_path: Path, layout: Any) -> None:
    kept_after(tmp_path, layout(2), [range(1, 4)])
    (tmp_path / 'checkpoints' / '2' / 'run' / 'metadata').write_text('{}')
    assert kept_after(tmp_path, layout(2), [range(4, 6)]) == [[2, 4], [2, 4, 5]]


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['flipped bit', 'cut', 'emptied', 'deleted'])
def test_damage_to_any_file_is_harmless_or_noticed(saved: Any, damage: str) -> None:
    workdir, layout = saved
    newest = workdir / 'checkpoints' / '2'
    expected = {step: state.state_fingerprint(small_state(layout, step)) for step in (1, 2)}
    shutil.copytree(workdir / 'checkpoints', workdir / 'kept')
    files = sorted(p.relative_to(newest) for p in newest.rglob('*') if p.is_file())
    random, noticed = np.random.default_rng(0), 0
    for name in files:
        shutil.rmtree(workdir / 'checkpoints')
        shutil.copytree(workdir / 'kept', workdir / 'checkpoints')
        shutil.rmtree(workdir / 'damaged', ignore_errors=True)
        data = bytearray((newest / name).read_bytes())
        if damage == 'deleted':
            (newest / name).unlink()
        else:
            if damage == 'flipped bit' and data:
                data[random.integers(len(data))] ^= 1 << random.integers(8)
            kept = {'cut': len(data) // 2, 'emptied': 0}.get(damage, len(data))
            (newest / name).write_bytes(data[:kept])
        found = restore(workdir, layout)
        aside = (workdir / 'damaged' / '2').exists() or int(found.step) == 1
        assert state.state_fingerprint(found) == expected[1 if aside else 2], name
        noticed += aside
    assert noticed >= 2


def test_one_flipped_bit_in_a_saved_array_is_noticed(
    saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Orbax restores some of these without a word: the manifest's fingerprint finds them."""
    workdir, layout = saved
    newest = workdir / 'checkpoints' / '2'
    victim = max((newest / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
    whole, random = victim.read_bytes(), np.random.default_rng(1)
    for place in random.integers(len(whole), size=12):
        data = bytearray(whole)
        data[place] ^= 1 << random.integers(8)
        victim.write_bytes(data)
        found = restore(workdir, layout)
        step = int(found.step)
        assert state.state_fingerprint(found) == state.state_fingerprint(small_state(layout, step))
        if step == 1:
            (workdir / 'damaged' / '2').rename(newest)
    assert 'fingerprint of the state is' in caplog.text


def test_root_keys_of_another_run_are_noticed(saved: Any) -> None:
    """They decide every later step, and no fingerprint of parameters covers them."""
    workdir, layout = saved
    state_folder = workdir / 'checkpoints' / '2' / 'state'
    roots = jax.device_put(keys.root_keys(4, 'rbg'), layout.replicated)
    keeper = Checkpoints(epath.Path(workdir / 'other'))
    keeper.save(small_state(layout, 2).replace(root_keys=roots), HEADER)
    keeper.close()
    shutil.rmtree(state_folder)
    (workdir / 'other' / 'checkpoints' / '2' / 'state').rename(state_folder)
    assert int(restore(workdir, layout).step) == 1
    assert (workdir / 'damaged' / '2').exists()


def test_another_model_is_refused_and_no_checkpoint_is_moved(saved: Any) -> None:
    workdir, layout = saved
    keeper = Checkpoints(epath.Path(workdir), keep_newest=2, keep_best=0, metric='accuracy')
    target = shapes(small_state(layout, 0))
    target.params['kernel'] = jax.ShapeDtypeStruct((20, 31), jnp.float32)
    with pytest.raises(UserError, match=r'kernel.* was float32\[20, 30\], is float32\[20, 31\]'):
        keeper.restore(target)
    assert keeper.steps() == [1, 2]
    keeper.close()


def test_changed_description_is_noticed(saved: Any) -> None:
    workdir, _ = saved
    path = workdir / 'checkpoints' / '2' / 'run' / 'metadata'
    path.write_text(path.read_text().replace('good', 'gold'))
    with pytest.raises(ValueError, match='not as written'):
        checkpoints.read_record(epath.Path(path.parent.parent))


# A good checkpoint is never called damaged

CODES = ('EACCES', 'EIO', 'EMFILE', 'ENFILE', 'ENOMEM', 'ESTALE', 'EDQUOT', 'ETIMEDOUT', 'EROFS')


def refused(workdir: Path, layout: Any) -> RunError:
    """Returns the one-line error of a restore that must move nothing."""
    before = {path: path.lstat().st_mtime for path in workdir.rglob('*')}
    with pytest.raises(RunError) as caught:
        restore(workdir, layout)
    assert not isinstance(caught.value, Damaged)
    assert '\n' not in str(caught.value)
    assert 'damaged' not in str(caught.value)
    assert {path: path.lstat().st_mtime for path in workdir.rglob('*')} == before
    return caught.value


@pytest.mark.parametrize('files', [['notes.txt'], ['default/_METADATA', 'commit_success.txt']])
def test_folder_of_another_program_is_refused_and_not_moved(saved: Any, files: list[str]) -> None:
    workdir, layout = saved
    folder = workdir / 'checkpoints' / '100'
    for file in ['_CHECKPOINT_METADATA', '.hidden', *files]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text('')
    found = files[0].partition('/')[0]
    message = f'{folder}: expected state/ and run/, found {found}; move it elsewhere'
    assert str(refused(workdir, layout)) == message


@pytest.mark.parametrize('left', [[], ['state'], ['state', 'notes.txt'], ['commit_success.txt']])
def test_checkpoint_that_lost_files_is_damaged_and_not_of_another_program(
    saved: Any, left: list[str]
) -> None:
    workdir, layout = saved
    whole, folder = workdir / 'whole', workdir / 'checkpoints' / '2'
    folder.rename(whole)
    folder.mkdir()
    for name in left:
        if (whole / name).exists():
            (whole / name).rename(folder / name)
        else:
            (folder / name).write_text('')
    assert int(restore(workdir, layout).step) == 1
    assert (workdir / 'damaged' / '2').exists()


@pytest.mark.parametrize('code', CODES)
@pytest.mark.parametrize('victim', ['run/metadata', 'state/_METADATA'])
def test_file_that_cannot_be_opened_ends_the_run_with_the_cause(
    saved: Any, monkeypatch: pytest.MonkeyPatch, victim: str, code: str
) -> None:
    workdir, layout = saved
    path, number = str(workdir / 'checkpoints' / '2' / victim), getattr(errno, code)
    opened, os_opened = builtins.open, os.open

    def fail(opener: Any) -> Any:
        def injected(file: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, str | os.PathLike) and os.fspath(file) == path:
                raise OSError(number, os.strerror(number), path)
            return opener(file, *args, **kwargs)

        return injected

    monkeypatch.setattr('io.open', fail(opened))
    monkeypatch.setattr(builtins, 'open', fail(opened))
    monkeypatch.setattr(os, 'open', fail(os_opened))
    error = refused(workdir, layout)
    assert f'[Errno {number}]' in str(error)
    assert isinstance(error, UserError if code == 'EACCES' else Unavailable)
    monkeypatch.undo()
    assert int(restore(workdir, layout).step) == 2


@pytest.mark.parametrize(
    ('status', 'kind'),
    [('PERMISSION_DENIED', UserError), ('RESOURCE_EXHAUSTED', Unavailable),
     ('UNAVAILABLE', Unavailable), ('ABORTED', Unavailable)],
)  # fmt: skip
def test_status_of_tensorstore_that_is_of_access_ends_the_run(
    saved: Any, monkeypatch: pytest.MonkeyPatch, status: str, kind: type[RunError]
) -> None:
    """It reads in C++, out of the reach of a patched open: it raises ValueError for all."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError(f'{status}: Error opening "zarr" driver: Failed to open: "d/1"')

    workdir, layout = saved
    monkeypatch.setattr(checkpoints.ocp.StandardCheckpointHandler, 'restore', fail)
    assert isinstance(refused(workdir, layout), kind)


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("can't start new thread")])
def test_lack_of_memory_or_threads_ends_the_run(
    saved: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError('while reading an array') from error

    workdir, layout = saved
    monkeypatch.setattr(checkpoints.ocp.StandardCheckpointHandler, 'restore', fail)
    assert isinstance(refused(workdir, layout), Unavailable)


def test_error_without_a_known_cause_is_damage_only_if_every_file_can_be_read(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError('something is wrong with an array')

    workdir, layout = saved
    monkeypatch.setattr(checkpoints.ocp.StandardCheckpointHandler, 'restore', fail)
    loop = workdir / 'checkpoints' / '2' / 'state' / 'd' / 'loop'
    loop.symlink_to(loop)
    assert 'Too many levels of symbolic links' in str(refused(workdir, layout))
    loop.unlink()
    keeper = Checkpoints(epath.Path(workdir))
    with pytest.raises(Damaged, match='something is wrong with an array'):
        keeper.read(2, shapes(small_state(layout, 0)))


@pytest.mark.parametrize('spare', range(6))
def test_good_checkpoint_is_not_called_damaged_without_file_descriptors(
    saved: Any, spare: int
) -> None:
    """However few descriptors are left, it is restored or the cause is reported."""
    workdir, layout = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while filled[-1] < 200:
            filled.append(os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (filled[-1] + 1 + spare, hard))
        if spare < 1:
            with pytest.raises(Unavailable, match='Too many open files'):
                restore(workdir, layout)
        else:
            with contextlib.suppress(Unavailable):
                assert int(restore(workdir, layout).step) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filled:
            os.close(descriptor)
    assert not (workdir / 'damaged').exists()
    assert int(restore(workdir, layout).step) == 2


class FailingFiles:
    """Makes calls of Python's file functions in a folder fail, from one to another in their order.

    TensorStore, in C++, is out of reach.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Fails nothing yet."""
        self.calls, self.first, self.last, self.number = 0, 0, -1, errno.EIO
        self._folder = str(folder)
        names = ('os.open', 'os.stat', 'os.lstat', 'os.listdir', 'os.scandir', 'io.open')
        for name in (*names, 'builtins.open'):
            module, _, function = name.partition('.')
            monkeypatch.setattr(name, self._failing(getattr(sys.modules[module], function)))

    def _failing(self, operation: Any) -> Any:
        def call(path: Any = '.', *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder):
                self.calls += 1
                if self.first <= self.calls <= self.last:
                    raise OSError(self.number, os.strerror(self.number), os.fspath(path))
            return operation(path, *args, **options)

        return call


@pytest.mark.parametrize('code', CODES)
def test_every_error_at_every_file_operation_of_a_restore_moves_nothing_and_hides_no_checkpoint(
    saved: Any, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """At one operation alone, and from there on."""
    workdir, layout = saved
    before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    expected = state.state_fingerprint(small_state(layout, 2))
    failing, refusals = FailingFiles(monkeypatch, workdir / 'checkpoints'), 0
    restore(workdir, layout)
    operations = failing.calls
    assert operations > 10
    for first, lasting in itertools.product(range(1, operations + 1), (False, True)):
        error = None
        failing.calls, failing.first, failing.number = 0, first, getattr(errno, code)
        failing.last = 10**9 if lasting else first
        try:
            found = restore(workdir, layout)
        except RunError as raised:
            error = raised
        failing.last = -1
        if error:
            assert not isinstance(error, Damaged)
            assert 'damaged' not in str(error)
            # For one that came once Orbax may say "Path is not a directory" instead.
            assert os.strerror(failing.number) in str(error) or not lasting, first
            assert str(workdir / 'checkpoints') in str(error)
            refusals += 1
        else:
            assert state.state_fingerprint(found) == expected, (first, lasting, code)
        files = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
        assert files == before
    assert refusals >= operations


def test_file_that_is_missing_once_is_neither_damage_nor_a_new_run(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stays missing is damage."""
    workdir, layout = saved
    before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    expected = state.state_fingerprint(small_state(layout, 2))
    failing = FailingFiles(monkeypatch, workdir / 'checkpoints')
    restore(workdir, layout)
    failing.number = errno.ENOENT
    for operation in range(1, failing.calls + 1):
        failing.calls, failing.first, failing.last = 0, operation, operation
        assert state.state_fingerprint(restore(workdir, layout)) == expected, operation
    failing.last = -1
    files = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    assert files == before


def test_steps_that_cannot_be_looked_at_are_no_new_run(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, _ = saved
    keeper = Checkpoints(epath.Path(workdir))
    failing = FailingFiles(monkeypatch, workdir / 'checkpoints')
    failing.last = 10**9
    with pytest.raises(Unavailable, match=r'/checkpoints: cannot be read.*Input/output error'):
        keeper.newest_record()


@contextlib.contextmanager
def user(number: int) -> Iterator[None]:
    """Acts as another user on files inside, in all threads."""
    before = os.geteuid()
    os.seteuid(number)
    yield
    os.seteuid(before)


def test_file_without_permission_ends_a_restore_by_tensorstore_and_moves_nothing(
    layout: Any,
) -> None:
    nobody = os.geteuid() or 65534  # permissions do not bind root
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter tmp_path
        workdir = Path(folder) / 'run'
        keeper = Checkpoints(epath.Path(workdir), keep_newest=2)
        for step in (1, 2):
            keeper.save(small_state(layout(2), step), HEADER, None)
        keeper.close()
        for path in (Path(folder), *Path(folder).rglob('*')):
            path.chmod(0o777)
        restore(workdir, layout(2))  # imports what it needs
        paths, refusals = sorted((workdir / 'checkpoints' / '2').rglob('*')), 0
        for path in paths:
            path.chmod(0)
            error = None
            with user(nobody):
                try:
                    found = restore(workdir, layout(2))
                except RunError as raised:
                    error = raised
            path.chmod(0o777)
            if error:
                assert type(error) is UserError
                assert 'Permission denied' in str(error)
                refusals += 1
            else:
                assert int(found.step) == 2, path
            assert not (workdir / 'damaged').exists()
        assert refusals >= len(paths) // 3  # how many of the files are read varies


NAMES = """
import os, sys
from errors import UserError
from runtime.storage import open_location
for name in os.listdir(b'.'):
    try:
        print(open_location(os.fsdecode(name)).name.encode())
    except UserError as error:
        print('refused', ascii(str(error)))
"""


@pytest.mark.parametrize(
    ('locale', 'name', 'works'),
    [
        ('C.UTF-8', 'café'.encode(), True),
        ('C.UTF-8', 'caf\xe9'.encode('latin-1'), False),
        ('C', b'run', True),
        ('C', 'café'.encode(), False),  # Python sees other characters than TensorStore
    ],
)
def test_workdir_that_python_and_tensorstore_see_differently_is_refused_at_once(
    tmp_path: Path, locale: str, name: bytes, works: bool
) -> None:
    os.mkdir(os.fsencode(tmp_path) + b'/' + name)
    plain = {'LC_ALL': locale, 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, '-c', NAMES],
        cwd=tmp_path,
        env=os.environ | plain | {'PYTHONPATH': root},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = repr(name) if works else r'refused .*expected a name in UTF-8 and a UTF-8 locale'
    assert re.match(re.escape(expected) if works else expected, done.stdout), done


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A workdir whose `checkpoints/` is there and cannot be written."""
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield tmp_path
        return
    mount = ['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('root writes anywhere, and may not mount here')
    yield tmp_path
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_checkpoints_that_cannot_be_written_are_found_before_the_first_step(
    read_only: Path,
) -> None:
    with pytest.raises(UserError, match=rf': cannot write in {read_only}/checkpoints \('):
        check_workdir(str(read_only))
    assert Checkpoints(epath.Path(read_only)).steps() == []
