"""The promises of tools/replay.py: any step of a run again, with the bits of its ledger."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tools import replay

pytestmark = pytest.mark.slow
Trained = tuple[Path, dict[str, Any]]


def test_step_is_replayed_from_the_checkpoint_before_or_else_from_the_root_keys(
    classifier_run: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one device, where the run was trained on eight."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda: one)
    run = tmp_path / 'run'
    shutil.copytree(classifier_run[0], run)
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['12', '6']
    assert replay.main([str(run)]) == 0
    output = capsys.readouterr().out
    assert 'training from checkpoint 6 up to step 12, on 1 device(s)' in output
    assert 'the same bits as the ledger' in output.splitlines()

    segment = min((run / 'ledger').glob('*.npy'))
    rows = np.load(segment)
    rows['keys'][2] ^= 1
    np.save(segment, rows)
    assert replay.main([str(run), '--step=3']) == 1
    output = capsys.readouterr().out
    assert 'training from the root keys up to step 3' in output
    assert output.endswith('other bits than the ledger: keys\n')  # and no other column


def test_step_that_the_run_does_not_have_is_refused(
    classifier_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (0, 13):
        with pytest.raises(SystemExit) as end:
            replay.main([str(classifier_run[0]), f'--step={step}'])
        assert end.value.code == 2
        assert f'--step={step}: expected 1 to 12' in capsys.readouterr().err


def test_damaged_ledger_is_found_before_the_work(
    classifier_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / 'run'
    shutil.copytree(classifier_run[0], run)
    min((run / 'ledger').glob('*.npy')).write_bytes(b'x')
    with pytest.raises(SystemExit) as end:
        replay.main([str(run), '--step=3'])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert 'damaged' in printed.err
