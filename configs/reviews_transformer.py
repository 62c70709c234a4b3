"""Classifies generated film reviews with a Transformer, trained from scratch.

Command:  make train CONFIG=configs/reviews_transformer.py
Expected: 97.67% of 1,500 held-out sentences right (seed 0)
Time:     2 min 49 s with the compiled programs in the cache, on 2 cores of an x86-64 CPU with
          AVX-512 (jax 0.10.2)
"""

from configs.schema import Config, OptimizerConfig
from tasks.classification import DataConfig, ModelConfig


def get_config() -> Config:
    """Returns 8,000 steps."""
    return Config(
        num_steps=8000,
        num_shards=2,
        eval_every=1000,
        checkpoint_every=1000,
        log_every=200,
        data=DataConfig(source='reviews', bucket_lengths=(12, 20, 28, 42)),
        model=ModelConfig(
            encoder='transformer',
            hidden_size=64,
            word_dropout=0.0,
            embedding_dropout=0.05,
            dropout=0.05,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=400),
    )
