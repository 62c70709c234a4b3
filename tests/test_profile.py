"""The promises of --profile and of the compilation cache: neither changes a bit of a run."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from etils import epath

from errors import UserError
from reporting.profile import Profile
from runtime import backend
from tests import runs

STEPS = {'num_steps': 8, 'eval_every': 8}


@pytest.mark.parametrize('steps', ['3', '3:', '5:3', '0:2', 'a:b', '1:2:3', '-1:2'])
def test_a_profile_of_no_steps_is_refused(steps: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='expected START:STOP'):
        Profile(steps, epath.Path(tmp_path))


def test_a_profile_in_a_bucket_is_refused() -> None:
    with pytest.raises(UserError, match='on this machine'):
        Profile('1:2', epath.Path('gs://bucket/run'))


def test_a_profile_of_steps_that_never_come_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile('7:9', epath.Path(tmp_path))
    with profile.step(3):
        pass
    profile.close()
    assert 'this launch had no step 7' in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_resume_after_the_first_step_of_a_profile_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile('3:5', epath.Path(tmp_path))
    for step in (4, 5, 6):
        with profile.step(step):
            pass
    profile.close()
    assert caplog.text.count('this launch had no step 3') == 1


def test_a_profile_that_cannot_be_written_is_logged_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError('no space left')

    monkeypatch.setattr(jax.profiler, 'stop_trace', full)
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda _: None)
    with Profile('1:1', epath.Path(tmp_path)).step(1):
        pass
    assert 'no space left' in caplog.text


def steps_of(trace: Path) -> set[int]:
    """The numbers of the steps that a trace shows."""
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = (event for plane in data.planes for line in plane.lines for event in line.events)
    stats = (dict(event.stats) for event in events if event.name == 'train')
    return {int(found['step_num']) for found in stats if 'step_num' in found}


@pytest.mark.long
def test_a_profile_shows_its_steps_and_what_was_compiled_is_kept_and_no_bit_changes(
    tmp_path: Path,
) -> None:
    kept = {'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'JAX_COMPILATION_CACHE_DIR': ''}
    runs.finish(tmp_path / 'plain', **STEPS)
    compiled: list[str] = []
    for name, flags in (('traced', ['--profile=4:6']), ('again', [])):
        done = subprocess.run(
            [*runs.command(tmp_path / name, **STEPS), *flags],
            cwd=runs.ROOT, env=runs.environment(2, **kept), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found = sorted(path.name for path in tmp_path.glob('cache/keyfold/*/*-cache'))
        assert found
        assert compiled in ([], found)
        compiled = found
        assert runs.outcome(tmp_path / name) == runs.outcome(tmp_path / 'plain')
    (trace,) = tmp_path.glob('*/profile/plugins/profile/*/*.xplane.pb')
    assert steps_of(trace) == {4, 5, 6}


@pytest.mark.parametrize(('folder', 'seconds'), [('/tmp/compiled', 0), ('gs://box/compiled', 1)])
def test_a_cache_on_a_disk_keeps_every_program_and_one_in_a_bucket_what_took_long(
    monkeypatch: pytest.MonkeyPatch, folder: str, seconds: float
) -> None:
    names = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 1)
        backend.enable_compilation_cache()
        assert [jax.config.values[name] for name in names] == [folder, seconds]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def no_cache_chosen() -> Iterator[None]:
    """No folder for compiled programs, as where the environment names none."""
    shared = jax.config.values['jax_compilation_cache_dir']
    jax.config.update('jax_compilation_cache_dir', None)
    yield
    jax.config.update('jax_compilation_cache_dir', shared)


def test_compiled_programs_are_kept_in_a_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache_chosen: None
) -> None:
    """Those of training and of the tools, by the size of the pool."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    backend.prepare(cpu_threads=8)
    kept = Path(jax.config.values['jax_compilation_cache_dir'])
    assert kept.is_relative_to(tmp_path / 'keyfold')
    assert kept.is_dir()


def test_without_a_home_that_can_be_written_nothing_is_kept_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache_chosen: None
) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    monkeypatch.setenv('PJRT_NPROC', '8')
    backend.enable_compilation_cache()
    assert jax.config.values['jax_compilation_cache_dir'] is None
