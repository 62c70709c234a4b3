"""The real data set, where TFDS_DATA_DIR holds it: GLUE SST-2 as ArrayRecord."""

import os
from pathlib import Path

import pytest

from tests import runs

HELD = Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / 'glue' / 'sst2'
OVERRIDES = {
    'config': 'configs/sst2.py',
    'num_steps': 60,
    'batch_size': 64,
    'eval_every': 60,
    'checkpoint_every': 20,
    'data__min_frequency': 3,
    'data__bucket_lengths': '(16,32,64)',
    'model__embedding_size': 32,
    'model__hidden_size': 32,
    'optimizer__clip_norm': 1.0,
}


@pytest.mark.long
@pytest.mark.skipif(not HELD.exists(), reason='TFDS_DATA_DIR holds no glue/sst2')
def test_sst2_killed_and_resumed_on_8_devices_equals_undisturbed_run(tmp_path: Path) -> None:
    printed = runs.finish(tmp_path / 'undisturbed', **OVERRIDES)
    assert '67349 training and 872 evaluation examples' in printed
    process = runs.start(tmp_path / 'killed', **OVERRIDES)
    while process.poll() is None and not (tmp_path / 'killed' / 'checkpoints' / '20').exists():
        pass
    process.kill()
    process.communicate()
    assert 'resumed after step' in runs.finish(tmp_path / 'killed', devices=8, **OVERRIDES)
    assert runs.outcome(tmp_path / 'killed') == runs.outcome(tmp_path / 'undisturbed')
