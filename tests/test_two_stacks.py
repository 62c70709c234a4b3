"""Rung 4: another Python with another JAX draws the same batches, keys and masks.

Needs a second environment, in which `make setup PYTHON=... VENV=...` has installed the other stack:

    export KEYFOLD_OTHER_PYTHON=.venv-other/bin/python
    python -m pytest tests/test_two_stacks.py
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from runtime import ledger
from tests import runs

OTHER = os.environ.get('KEYFOLD_OTHER_PYTHON', '')
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not OTHER, reason='KEYFOLD_OTHER_PYTHON names no second environment'),
]

# Float32 rounding differs and training amplifies it; 1.2e-7 was measured after these 24 steps.
LOSS_TOLERANCE = 1e-5

MASKS = """
import jax, numpy as np
from model.dropout import drop_mask
from training import keys
for impl in ('threefry2x32', 'rbg'):
    root = keys.root_keys(7, impl)
    for step, shard in ((0, 0), (3, 5), (1000, 63)):
        for name, key in keys.shard_rngs(root, step, shard).items():
            for rate in (0.1, 0.25, 0.5):
                mask = np.asarray(drop_mask(key, rate, (7, 33)))
                print(impl, step, shard, name, rate, np.packbits(mask).tobytes().hex())
"""


def run(python: str, arguments: Sequence[str], devices: int = 2) -> str:
    """Runs a program of the project under a Python, and returns what it printed."""
    cache = str(Path(runs.COMPILED) / Path(python).parent.parent.name)
    env = runs.environment(devices, JAX_COMPILATION_CACHE_DIR=cache)
    return runs.printed([python, *arguments], runs.ROOT, env, timeout=300)


def train(python: str, workdir: Path, devices: int = 2, **overrides: object) -> str:
    """Trains a small run under a Python."""
    return run(python, runs.command(workdir, **overrides)[1:], devices)


def jax_version(python: str) -> str:
    """Returns the version of JAX that a Python has."""
    return run(python, ['-c', 'import jax; print(jax.__version__)']).strip()


def test_the_two_environments_have_two_versions_of_jax() -> None:
    assert jax_version(sys.executable) != jax_version(OTHER)


def test_both_stacks_draw_the_same_masks() -> None:
    here, there = (run(python, ['-c', MASKS]) for python in (sys.executable, OTHER))
    assert len(here.splitlines()) == 36
    # `rbg` is XLA's generator of the platform, which no version promises to keep.
    threefry = [[x for x in text.splitlines() if 'threefry' in x] for text in (here, there)]
    assert threefry[0] == threefry[1]


def test_both_stacks_train_on_the_same_batches_and_keys_and_agree_to_rounding(
    tmp_path: Path,
) -> None:
    books = []
    for name, python in (('here', sys.executable), ('there', OTHER)):
        train(python, tmp_path / name)
        books.append(ledger.read(epath.Path(tmp_path / name) / 'ledger'))
    here, there = books
    for column in ('step', 'batch', 'keys', 'tokens', 'weight'):
        np.testing.assert_array_equal(here[column], there[column], err_msg=column)
    np.testing.assert_allclose(here['loss'], there['loss'], rtol=LOSS_TOLERANCE)


@pytest.mark.parametrize('first', ['here', 'there'])
def test_a_checkpoint_of_one_stack_is_resumed_by_the_other_with_a_warning(
    tmp_path: Path, first: str
) -> None:
    order = (sys.executable, OTHER) if first == 'here' else (OTHER, sys.executable)
    train(order[0], tmp_path / 'whole')
    train(order[0], tmp_path / 'moved', num_steps=12, optimizer__decay_steps=24)
    printed = train(order[1], tmp_path / 'moved', devices=4, optimizer__decay_steps=24)
    assert 'rung 4' in printed
    whole, moved = (
        ledger.read(epath.Path(tmp_path / name) / 'ledger') for name in ('whole', 'moved')
    )
    for column in ('step', 'batch', 'keys'):
        np.testing.assert_array_equal(whole[column], moved[column], err_msg=column)
    np.testing.assert_allclose(whole['loss'], moved['loss'], rtol=LOSS_TOLERANCE)
