"""Sums of two numbers, 'a+b' read and a + b written, digit by digit.

Command:  make train CONFIG=configs/addition.py
Expected: of 5,000 held-out sums 99.94, 99.80 and 99.60% exactly right with seeds 0, 1 and 2
          (with --config.num_steps=4000: 99.84, 99.38 and 99.26%, in 3 minutes)
Time:     4 min 50 s, compilation included, on 2 cores of an x86-64 CPU with AVX-512 (jax 0.10.2)
"""

from configs.schema import Config, OptimizerConfig
from tasks.seq2seq import DataConfig, ModelConfig


def get_config() -> Config:
    """Returns the task of flax's seq2seq example, with held-out operands."""
    return Config(
        num_steps=6000,
        num_shards=2,
        batch_size=128,
        eval_batch_size=1000,
        eval_every=1000,
        checkpoint_every=1000,
        log_every=100,
        data=DataConfig(source='addition', operand_digits=(2, 3), bucket_lengths=(7,)),
        model=ModelConfig(embedding_size=32, hidden_size=256),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=100),
    )
