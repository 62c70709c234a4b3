"""Sums of two numbers, 'a+b' read and a + b written, digit by digit.

Command:  make train CONFIG=configs/addition.py
"""

from configs.schema import Config, OptimizerConfig, PairsConfig, Seq2SeqConfig


def get_config() -> Config:
    """The task of flax's seq2seq example, with held-out operands."""
    return Config(
        num_steps=6000,
        num_shards=2,
        batch_size=128,
        eval_batch_size=1000,
        eval_every=1000,
        checkpoint_every=1000,
        log_every=100,
        data=PairsConfig(source='addition', operand_digits=(2, 3), bucket_lengths=(7,)),
        model=Seq2SeqConfig(embedding_size=32, hidden_size=256),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=100),
    )
