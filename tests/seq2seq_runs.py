"""Small runs of the sequence-to-sequence task, for tests/runs.py."""

from tests import runs

ADDITION = 'configs/addition.py'
runs.SMALL[ADDITION] = runs.STEPS | {
    'data.num_train': 300,
    'data.num_eval': 100,
    'data.bucket_lengths': '(6,7)',
    'data.window_batches': 8,
    'model.word_dropout': 0.1,
    'model.embedding_dropout': 0.1,
    'model.dropout': 0.2,
    'model.forcing': 'linear',
    'model.forcing_floor': 0.2,
    'model.forcing_steps': 20,
}
