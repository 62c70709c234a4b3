"""The task and sizes of flax's examples/seq2seq: an LSTM of 512 that reads its own samples.

Command:  make train CONFIG=configs/addition_flax.py
"""

from configs.schema import Config, OptimizerConfig
from tasks.seq2seq import DataConfig, ModelConfig


def get_config() -> Config:
    """Returns sums of two numbers below 1,000, by Adam, with every input sampled."""
    return Config(
        num_steps=10_000,
        batch_size=128,
        eval_batch_size=1000,
        eval_every=1000,
        checkpoint_every=1000,
        log_every=200,
        data=DataConfig(operand_digits=(3, 3), num_train=400_000, bucket_lengths=(8,)),
        model=ModelConfig(hidden_size=512, forcing_floor=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule='constant', clip_norm=0.0),
    )
