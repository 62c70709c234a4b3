"""Gives texts of my own any number of labels.

Command:  make train CONFIG=configs/multilabel.py

A line of my/train.jsonl:   {"text": "great food , slow service", "labels": ["food", "service"]}
A table instead has a column `labels`, such as food,service (--config.data.label_separator).
"""

from configs.schema import Config
from tasks.multilabel import DataConfig, ModelConfig


def get_config() -> Config:
    """Returns a config for files with a text and its labels in each row."""
    return Config(
        num_shards=8,
        data=DataConfig(train='my/train.jsonl', evaluation='my/dev.jsonl'),
        model=ModelConfig(embedding_size=64, hidden_size=64),
    )
