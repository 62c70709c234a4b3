"""The commands of docs/seq2seq.md run as they are."""

from pathlib import Path

import pytest

from tests import runs
from tests.test_docs import FENCE, without_comments

SMALL = """

whole = get_config


def get_config() -> Config:
    config = whole()
    config.num_steps, config.batch_size, config.eval_batch_size = 8, 16, 32
    config.data.num_train, config.data.num_eval = 300, 64
    config.model.embedding_size = config.model.hidden_size = 8
    return config
"""


@pytest.mark.long
def test_commands_run_as_they_are(tmp_path: Path) -> None:
    """In a copy of the project whose configs/addition.py is small."""
    project = runs.copied(tmp_path)
    with (project / 'configs' / 'addition.py').open('a') as config:
        config.write(SMALL)
    page = (runs.ROOT / 'docs' / 'seq2seq.md').read_text()
    (block,) = (text for language, text in FENCE.findall(page) if language == 'sh')
    train, predict, exactness = without_comments(block)
    assert 'finished at step 8' in runs.shell(project, train)
    assert '"prediction": ' in runs.shell(project, predict)
    assert 'the same bits' in runs.shell(project, exactness)
