"""A checkpoint gives back exactly what was saved, or is seen to be damaged."""

import gc
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from errors import SaveFailed, UserError
from runtime import checkpoints
from runtime.checkpoints import Checkpoints
from training import keys, state
from training.state import TrainState, abstract_state

# Orbax leaves coroutines of a failed read behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

HEADER: dict[str, Any] = {
    'config': {'seed': 3},
    'task': {'vocabulary': ['good', 'bad']},
    'manifest': {'num_shards': 8},
}


def small_state(layout: Any, step: int) -> TrainState:
    """A state with every kind of array that a run saves."""
    noise = np.random.default_rng(step).standard_normal((20, 30), np.float32)
    params = {'kernel': jnp.asarray(noise), 'bias': jnp.ones(7, jnp.bfloat16)}
    optimizer = optax.adam(1e-3)
    made = TrainState(jnp.int32(step), params, optimizer.init(params), keys.root_keys(3, 'rbg'))
    return jax.device_put(made, layout.replicated)


def wait(keeper: Checkpoints) -> None:
    """Until nothing is being saved."""
    manager = keeper._open()
    while manager.is_saving_in_progress():
        time.sleep(0.01)


@pytest.fixture
def saved(tmp_path: Path, layout: Any) -> tuple[Path, Any]:
    """A workdir with checkpoints of steps 1 and 2."""
    keeper = Checkpoints(epath.Path(tmp_path), keep_newest=2, keep_best=0, metric='accuracy')
    for step in (1, 2):
        keeper.save(small_state(layout(8), step), HEADER, None)
    keeper.close()
    return tmp_path, layout(2)


def restore(workdir: Path, layout: Any) -> TrainState:
    """The newest whole checkpoint, on two devices."""
    keeper = Checkpoints(epath.Path(workdir), keep_newest=2, keep_best=0, metric='accuracy')
    target = abstract_state(lambda _: small_state(layout, 0), 'rbg', layout)
    found = keeper.restore(target)
    keeper.close()
    gc.collect()  # what a failed read left behind complains here, not in a later test
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
    assert keeper.check() == 1

    rename = epath.gpath.PosixGPath.rename

    def slow(path: Any, target: Any) -> Any:
        may_commit.wait(20)
        return rename(path, target)

    def none(path: Any, target: Any) -> Any:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(epath.gpath.PosixGPath, 'rename', slow)
    keeper.save(small_state(layout(2), 2), HEADER, None)
    assert keeper.check() == 1
    may_commit.set()
    wait(keeper)
    assert keeper.check() == 2
    monkeypatch.setattr(epath.gpath.PosixGPath, 'rename', none)
    keeper.save(small_state(layout(2), 3), HEADER, None)
    wait(keeper)
    assert keeper.check() == 2
    with pytest.raises(SaveFailed):
        keeper.close()


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


def test_another_model_is_refused_and_no_checkpoint_is_moved(saved: Any) -> None:
    workdir, layout = saved
    keeper = Checkpoints(epath.Path(workdir), keep_newest=2, keep_best=0, metric='accuracy')
    target = abstract_state(lambda _: small_state(layout, 0), 'rbg', layout)
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
