"""The promises of --profile and of the compilation cache: neither changes a bit of a run."""

import subprocess
from pathlib import Path

import pytest
from etils import epath

from configs.schema import BadInput
from tests import runs
from training.profiling import Profile


@pytest.mark.parametrize('steps', ['3', '3:', '5:3', '0:2', 'a:b', '1:2:3', '-1:2'])
def test_a_profile_of_no_steps_is_refused(steps: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match='expected START:STOP'):
        Profile(steps, epath.Path(tmp_path))


def test_a_profile_in_a_bucket_is_refused() -> None:
    with pytest.raises(BadInput, match='on this machine'):
        Profile('1:2', epath.Path('gs://bucket/run'))


def launch(workdir: Path, *flags: str, **variables: str) -> None:
    """A small run with other flags and environment variables."""
    env = runs.environment(2, **variables)
    if 'XDG_CACHE_HOME' in variables:
        del env['JAX_COMPILATION_CACHE_DIR']
    done = subprocess.run(
        [*runs.command(workdir, num_steps=8, eval_every=8), *flags],
        cwd=runs.ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Error' not in done.stderr


@pytest.mark.slow
def test_a_profile_shows_its_steps_and_the_cache_is_used_and_neither_changes_a_bit(
    tmp_path: Path,
) -> None:
    launch(tmp_path / 'plain', JAX_ENABLE_COMPILATION_CACHE='false')
    launch(tmp_path / 'traced', '--profile=4:6', XDG_CACHE_HOME=str(tmp_path / 'cache'))
    compiled = sorted((tmp_path / 'cache' / 'keyfold').glob('*/*-cache'))
    assert compiled
    launch(tmp_path / 'again', XDG_CACHE_HOME=str(tmp_path / 'cache'))
    assert sorted((tmp_path / 'cache' / 'keyfold').glob('*/*-cache')) == compiled
    (tmp_path / 'file').touch()
    launch(tmp_path / 'homeless', XDG_CACHE_HOME=str(tmp_path / 'file'))
    outcomes = [runs.outcome(tmp_path / name) for name in ('plain', 'traced', 'again', 'homeless')]
    assert outcomes.count(outcomes[0]) == len(outcomes)
    (trace,) = (tmp_path / 'traced').glob('profile/plugins/profile/*/*.xplane.pb')
    data = trace.read_bytes()
    assert b'train' in data
    assert not (tmp_path / 'plain' / 'profile').exists()
