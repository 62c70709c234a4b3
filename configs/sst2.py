"""GLUE SST-2 through TFDS: sentences of film reviews, positive or negative.

Command:  make train CONFIG=configs/sst2.py

The model of flax's sst2 example (5.46 million parameters), its faults corrected: decay on the
right side of the learning rate, word dropout that leaves marks and padding alone, keys that are
never used twice. TFDS finds the data in TFDS_DATA_DIR or downloads it.
"""

from configs.schema import Config
from configs.sections import DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Five epochs of 67,349 sentences."""
    return Config(
        num_steps=5260,
        eval_every=526,
        checkpoint_every=526,
        log_every=100,
        data=DataConfig(
            source='tfds',
            name='glue/sst2',
            text_features=('sentence',),
            bucket_lengths=(8, 12, 16, 24, 32, 64),
        ),
        model=ModelConfig(
            embedding_size=300,
            hidden_size=256,
            word_dropout=0.1,
            embedding_dropout=0.5,
            dropout=0.5,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    )
