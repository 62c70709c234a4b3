"""What surrounds the program cannot change its bits: threads, flags, settings, wrong backends."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest
from etils import epath

from errors import UserError
from runtime import backend, resume
from runtime.run_record import seal
from tests import runs
from training import keys, mesh
from training.mesh import Layout
from training.state import make_create_state
from training.step import make_eval_step, make_gradient, make_update

MakeLayout = Callable[..., Layout]
YNN = '--xla_cpu_experimental_ynn_fusion_type'
UNPINNED = (
    'import runpy, sys; from runtime import backend; '
    f'backend.PINNED_XLA_FLAGS.pop({YNN!r}); sys.argv = sys.argv[1:]; '
    "runpy.run_path('train.py', run_name='__main__')"
)


def launch(
    workdir: Path, *overrides: str, program: tuple[str, ...] = ('train.py',), **extra: str
) -> subprocess.CompletedProcess[str]:
    """Trains a small run of 6 steps on one device, in an environment with `extra` in it."""
    small = runs.command(workdir, num_steps=6, optimizer__decay_steps=24)[2:]
    return subprocess.run(
        [sys.executable, *program, *small, *overrides],
        cwd=runs.ROOT,
        env=runs.environment(1, **extra),
        capture_output=True,
        text=True,
        timeout=300,
    )


def manifest(workdir: Path) -> dict[str, Any]:
    """Returns the manifest of the newest checkpoint."""
    newest = max((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name))
    found: dict[str, Any] = json.loads((newest / 'run' / 'metadata').read_text())['manifest']
    return found


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line of a launch that was refused as bad input."""
    assert done.returncode == 2, done
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert len(done.stderr) <= 401
    return done.stderr


# A backend that computes wrongly


@pytest.mark.slow
@pytest.mark.skipif(
    jaxlib.version.__version_info__ >= (0, 12), reason='this jaxlib computes right by itself'
)
def test_backend_that_computes_wrongly_is_refused_before_the_first_step(tmp_path: Path) -> None:
    error = refused(launch(tmp_path, program=('-c', UNPINNED, 'train.py')))
    assert f'error: cpu backend of jaxlib {jaxlib.__version__}: ' in error
    assert 'computed wrongly; no result can be trusted' in error
    assert not (tmp_path / 'checkpoints').exists()


def test_backend_of_this_environment_computes_right() -> None:
    assert backend.wrong_results() == ''


@pytest.mark.parametrize('place', range(3))
def test_each_checked_computation_is_compared_with_its_exact_result(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_get = jax.device_get

    def one_bit_wrong(values: tuple[jax.Array, ...]) -> list[Any]:
        found = [np.array(value) for value in device_get(values)]
        last = found[place].reshape(-1)[-1:]
        last[:] = np.nextafter(last, np.float32(np.inf))
        return found

    monkeypatch.setattr(jax, 'device_get', one_bit_wrong)
    assert backend.wrong_results(1).startswith(('a sum', 'matrix-vector', 'a bfloat16')[place])
    with pytest.raises(UserError, match='computed wrongly'):
        backend.check()


def test_flag_against_wrong_reductions_is_set_only_for_the_versions_that_need_it() -> None:
    needed = jaxlib.version.__version_info__ < (0, 12)
    assert (f'{YNN}=-reduce' in os.environ['XLA_FLAGS']) == needed


# The environment


@pytest.fixture
def settings() -> Iterator[None]:
    """Restores JAX's settings."""
    names = [*backend.PINNED_SETTINGS, *backend.REFUSED_SETTINGS, 'jax_default_matmul_precision']
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


FOREIGN = {
    'jax_enable_x64': True,
    'jax_default_prng_impl': 'rbg',
    'jax_numpy_rank_promotion': 'raise',
    'jax_numpy_dtype_promotion': 'strict',
}


@pytest.mark.usefixtures('settings')
@pytest.mark.parametrize('name', FOREIGN)
def test_setting_of_the_environment_is_overridden(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('PJRT_NPROC', '8')
    jax.config.update(name, FOREIGN[name])
    backend.prepare(8)
    assert getattr(jax.config, name) == backend.PINNED_SETTINGS[name] != FOREIGN[name]


@pytest.mark.usefixtures('settings')
@pytest.mark.parametrize('name', backend.REFUSED_SETTINGS)
def test_setting_that_changes_how_programs_compile_is_refused_by_name(name: str) -> None:
    jax.config.update(name, True)
    with pytest.raises(UserError, match=f'{name.upper()} is set: expected it unset'):
        backend.prepare(8)


@pytest.mark.slow
def test_no_setting_of_the_environment_changes_a_bit(tmp_path: Path) -> None:
    foreign = {name.upper(): str(value) for name, value in FOREIGN.items()}
    foreign |= {
        'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16',
        'JAX_THREEFRY_PARTITIONABLE': '0',
        'PJRT_NPROC': '1',
    }
    for name, extra in (('plain', {}), ('foreign', foreign)):
        done = launch(tmp_path / name, **extra)
        assert done.returncode == 0, done
    assert runs.outcome(tmp_path / 'foreign') == runs.outcome(tmp_path / 'plain')


def test_platform_that_jax_cannot_start_is_refused_by_name(tmp_path: Path) -> None:
    error = refused(launch(tmp_path, JAX_PLATFORMS='cuda'))
    assert 'JAX_PLATFORMS = cuda: JAX cannot start it' in error
    assert 'unset JAX_PLATFORMS' in error


@pytest.mark.parametrize('flag', backend.PINNED_XLA_FLAGS)
def test_another_value_of_a_pinned_flag_is_refused(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XLA_FLAGS', f'--xla_dump_to=/tmp/x {flag}=other')
    with pytest.raises(UserError, match=f'XLA_FLAGS: found {flag}=other, expected {flag}='):
        backend.prepare(8)


@pytest.mark.parametrize('flags', ['flags.txt', '--xla_force_host_platform_device_count=two'])
def test_flags_that_cannot_be_kept_are_refused(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XLA_FLAGS', flags)
    with pytest.raises(UserError, match=f'XLA_FLAGS = {flags}: expected flags'):
        backend.prepare(8)


@pytest.mark.usefixtures('settings')
def test_precision_of_matrix_products_is_the_one_of_the_config() -> None:
    for precision in ('default', 'high', 'highest'):
        backend.prepare(8, precision)
        program = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).as_text()
        assert f'precision = [{precision.upper()}, {precision.upper()}]' in program


# The thread pool


def test_new_pool_is_the_larger_of_cores_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PJRT_NPROC', '77')
    monkeypatch.setattr(backend, 'usable_cores', lambda: 3)
    backend.prepare()
    assert os.environ['PJRT_NPROC'] == '8'  # the devices of these tests
    monkeypatch.setattr(backend, 'usable_cores', lambda: 12)
    backend.prepare()
    assert os.environ['PJRT_NPROC'] == '12'
    backend.prepare(cpu_threads=5)
    assert os.environ['PJRT_NPROC'] == '5'


def write_record(workdir: Path, step: int, **facts: Any) -> Path:
    """Writes the JSON of a checkpoint, and returns the file."""
    file = workdir / 'checkpoints' / str(step) / 'run' / 'metadata'
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(seal({'manifest': facts})))
    return file


def test_pool_of_a_run_is_read_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    workdir = epath.Path(tmp_path)
    assert resume.saved_threads(workdir) == 0
    write_record(tmp_path, 9, threads='4')  # as records had it before
    assert resume.saved_threads(workdir) == 4
    newest = write_record(tmp_path, 10, cpu_threads=6)
    (tmp_path / 'checkpoints' / '12.orbax-checkpoint-tmp').mkdir()
    assert resume.saved_threads(workdir) == 6
    newest.write_text(newest.read_text().replace('6', '7'))
    assert resume.saved_threads(workdir) == 4
    newest.unlink()
    assert resume.saved_threads(workdir) == 4


@pytest.mark.slow
def test_resume_takes_the_pool_of_the_run_whatever_config_and_machine_say(tmp_path: Path) -> None:
    first = launch(tmp_path, '--config.cpu_threads=3')
    assert first.returncode == 0, first
    assert manifest(tmp_path)['cpu_threads'] == 3
    error = refused(launch(tmp_path, '--config.num_steps=12', JAX_NUM_CPU_DEVICES='4'))
    assert '4 CPU devices: expected at most 3' in error
    assert 'a run that starts with --config.cpu_threads=4' in error
    longer = ('--config.num_steps=12', '--config.cpu_threads=7')
    done = launch(tmp_path, *longer, PJRT_NPROC='5', JAX_NUM_CPU_DEVICES='2')
    assert done.returncode == 0, done
    assert 'config.cpu_threads = 7 has no effect: this run has had 3 threads' in done.stdout
    assert manifest(tmp_path)['cpu_threads'] == 3


# Compilation


def programs(layout: Layout) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns gradient, update and evaluation programs that sort the same numbers twice."""

    def twice(x: jax.Array) -> jax.Array:
        return jnp.sort(x) + jnp.sort(x)[::-1]

    def sums(params: Any, batch: dict[str, jax.Array], *_: Any) -> dict[str, jax.Array]:
        return {'loss': (params['w'] * twice(batch['x'])).sum(), 'weight': batch['x'].sum()}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(twice, grads), state

    optimizer = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    create_state = make_create_state(lambda _: {'w': jnp.ones(4)}, optimizer, layout)
    state = create_state(keys.root_keys(0, 'threefry2x32'))
    batch = {'x': jnp.ones(8 * 4), 'weights': jnp.ones(8 * 4)}
    gradient = make_gradient(sums, layout)
    arguments = (state.params, state.root_keys, state.step, batch)
    return {
        'gradient': (gradient, arguments),
        'update': (make_update(optimizer, 0.0, layout), (state, *gradient(*arguments))),
        'evaluation': (make_eval_step(sums, layout), (state.params, batch)),
    }


def sorts_compiled(layout: Layout, name: str) -> int:
    """Counts the sorts in the text of a compiled program."""
    program: Any
    program, arguments = programs(layout)[name]
    return program.lower(*arguments).compile().as_text().count(' sort(')


@pytest.mark.parametrize('name', ['gradient', 'update', 'evaluation'])
def test_one_device_compiles_without_early_elimination_of_common_subexpressions(
    name: str, layout: MakeLayout
) -> None:
    assert sorts_compiled(layout(1), name) == 2


def test_the_count_of_sorts_shows_that_elimination(
    layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, 'COMPILER_OPTIONS', {})
    for name in ('gradient', 'update', 'evaluation'):
        assert sorts_compiled(layout(1), name) == 1


# The code


def test_manifest_names_commit_and_every_file_of_the_code() -> None:
    code = backend.code()
    assert set(code) == {'commit', 'dirty', 'files'}
    if (runs.ROOT / '.git').exists():
        assert len(code['commit']) == 40
    assert {'train.py', 'runtime/backend.py', 'tasks/__init__.py'} <= set(code['files'])
    assert 'configs/schema.py' in code['files']
    assert 'configs/reviews.py' not in code['files']
    assert all(len(digest) == 16 for digest in code['files'].values())


def test_code_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    assert backend.code()['commit'] == ''
    monkeypatch.undo()
    monkeypatch.setattr(backend, 'PROJECT', tmp_path)
    monkeypatch.setattr(backend, 'code_files', dict)
    assert backend.code() == {'commit': '', 'dirty': False, 'files': {}}


def test_changed_files_are_those_edited_added_and_removed() -> None:
    old = {'files': {'a.py': '1', 'b.py': '2', 'c.py': '3'}}
    new = {'files': {'a.py': '1', 'b.py': '9', 'd.py': '4'}}
    assert resume.changed_files(old, new) == ['b.py', 'c.py', 'd.py']
    assert resume.changed_files(old, old) == []
    assert resume.changed_files(None, new) == []  # a record from before code was recorded


HEAPS = """
import ctypes, threading
from runtime import backend
if {prepared}:
    backend.prepare()
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
barrier = threading.Barrier(4)
def allocate():
    library.malloc(100)
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = ctypes.c_void_p(library.fopen(b'/dev/stdout', b'w'))
library.malloc_info(0, file)
library.fflush(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='heaps of glibc')
def test_threads_share_one_heap() -> None:
    def heaps(prepared: bool) -> int:
        program = [sys.executable, '-c', HEAPS.format(prepared=prepared)]
        return runs.printed(program, runs.ROOT, os.environ.copy(), 300).count('<heap nr=')

    assert heaps(prepared=True) < heaps(prepared=False)  # imports may have started a thread


def test_what_a_long_compilation_freed_goes_back_to_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only after a long one: it takes milliseconds, and most programs compile in less."""
    trimmed: list[int] = []
    library = SimpleNamespace(malloc_trim=trimmed.append)
    monkeypatch.setattr(backend.ctypes, 'CDLL', lambda _: library)
    listeners: list[Callable[..., None]] = []
    listen = 'register_event_duration_secs_listener'
    monkeypatch.setattr(jax.monitoring, listen, listeners.append)
    backend.prepare(cpu_threads=8)
    (heard,) = listeners
    compilation = '/jax/core/compile/backend_compile_duration'
    for event, seconds in ((compilation, 0.5), (compilation, 2.0), ('/jax/other', 2.0)):
        heard(event, seconds)
    assert trimmed == [0]
