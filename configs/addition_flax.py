"""The task and sizes of flax's examples/seq2seq: an LSTM of 512 that reads its own samples.

Command:  make train CONFIG=configs/addition_flax.py
Measured: 2,480 and 2,680 examples/s on 2 idle cores (docs/performance.md); not trained to its end
"""

from configs.schema import Config, OptimizerConfig
from tasks.seq2seq import DataConfig, ModelConfig


def get_config() -> Config:
    """Returns sums of up to two and three digits, by Adam, with every input sampled."""
    return Config(
        num_steps=10_000,
        batch_size=128,
        eval_batch_size=1000,
        eval_every=1000,
        checkpoint_every=1000,
        log_every=200,
        data=DataConfig(bucket_lengths=(7,)),
        model=ModelConfig(hidden_size=512, forcing_floor=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule='constant', clip_norm=0.0),
    )
