"""The sections of a config: data, model and optimizer, every knob with its meaning and check."""

import dataclasses

from configs.checks import (
    at_least,
    digit_counts,
    fraction,
    increasing_lengths,
    knob,
    letter_counts,
    names,
    one_of,
    probability,
)


@dataclasses.dataclass
class BatchingConfig:
    """How examples become batches, whatever the task."""

    bucket_lengths: tuple[int, ...] = knob(
        (8, 16, 24, 32, 48),
        'padded widths of training batches, tokens with marks; no example is wider than the last',
        increasing_lengths(),
    )
    window_batches: int = knob(16, 'global batches that are sorted by length together', at_least(1))
    loader_threads: int = knob(
        2, 'threads that assemble batches ahead of the step', at_least(1), free=True
    )


@dataclasses.dataclass
class DataConfig(BatchingConfig):
    """What the classifier reads."""

    source: str = knob(
        'reviews', 'where the examples come from', one_of('reviews', 'tfds', 'files')
    )
    name: str = knob('', 'tfds: data set, as in glue/sst2')
    data_dir: str = knob(
        '', "tfds: folder of prepared data sets ('' = TFDS_DATA_DIR or TFDS's default)", free=True
    )
    train: str = knob('train', 'tfds: training split; files: path of the .tsv, .csv or .jsonl file')
    evaluation: str = knob('validation', 'tfds: evaluation split; files: path')
    text_features: tuple[str, ...] = knob(
        ('text',), 'tfds, files: features or columns to read, joined', names()
    )
    label_feature: str = knob('label', 'tfds, files: feature or column with the class')
    num_train: int = knob(10_000, 'reviews: training sentences', at_least(1))
    num_eval: int = knob(1_500, 'reviews: evaluation sentences', at_least(1))
    min_frequency: int = knob(3, 'words seen less often in training are unknown', at_least(1))
    affixes: tuple[int, ...] = knob(
        (),
        'letters at the start and at the end of a word that have vectors too, known word or not',
        letter_counts(),
    )


@dataclasses.dataclass
class ComputeConfig:
    """How a model computes, whatever it is."""

    compute_dtype: str = knob(
        'float32', 'dtype of activations (parameters stay float32)', one_of('float32', 'bfloat16')
    )
    remat: bool = knob(
        False, 'compute the gates of LSTM steps again in the backward pass, for less memory'
    )


@dataclasses.dataclass
class ModelConfig(ComputeConfig):
    """The word-dropout classifier (model/classifier.py)."""

    embedding_size: int = knob(64, 'width of a word vector', at_least(1))
    hidden_size: int = knob(64, 'width of each LSTM direction, attention and head', at_least(1))
    word_dropout: float = knob(
        0.1, 'probability that a word becomes the unknown one, of which affixes stay', fraction()
    )
    embedding_dropout: float = knob(0.2, 'dropout after the embedding', fraction())
    dropout: float = knob(0.2, 'dropout after LSTM, attention and hidden layer', fraction())
    label_smoothing: float = knob(
        0.0, 'part of the training target that is spread over all classes', fraction()
    )


@dataclasses.dataclass
class OptimizerConfig:
    """The update rule (training/optimizer.py)."""

    name: str = knob('adamw', 'update rule', one_of('adamw', 'sgd'))
    learning_rate: float = knob(1e-3, 'peak learning rate', at_least(0))
    schedule: str = knob('cosine', 'learning rate after warm-up', one_of('constant', 'cosine'))
    warmup_steps: int = knob(0, 'steps of linear warm-up from zero', at_least(0))
    decay_steps: int = knob(
        0, 'step at which the cosine schedule reaches zero (0 = num_steps)', at_least(0)
    )
    momentum: float = knob(0.9, 'sgd: momentum', fraction())
    weight_decay: float = knob(
        0.0, 'decoupled decay of matrices, multiplied by the learning rate', at_least(0)
    )
    clip_norm: float = knob(1.0, 'global gradient norm is clipped to this (0 = off)', at_least(0))
    shard_state: bool = knob(
        False, 'ZeRO-1: a shard keeps one slice of the optimizer state, not all of it'
    )
    on_nonfinite: str = knob(
        'stop', 'at a step that is not finite', one_of('stop', 'skip'), free=True
    )


# seq2seq: from here to the end (docs/fork.md)


@dataclasses.dataclass
class PairsConfig(BatchingConfig):
    """What the encoder-decoder reads: pairs of a source and a target text."""

    source: str = knob('addition', 'where the pairs come from', one_of('addition', 'tfds', 'files'))
    name: str = knob('', 'tfds: data set, as in para_crawl/ende')
    data_dir: str = knob(
        '', "tfds: folder of prepared data sets ('' = TFDS_DATA_DIR or TFDS's default)", free=True
    )
    train: str = knob('train', 'tfds: training split; files: path of the .tsv, .csv or .jsonl file')
    evaluation: str = knob('validation', 'tfds: evaluation split; files: path')
    source_feature: str = knob('source', 'tfds, files: feature or column with the source')
    target_feature: str = knob('target', 'tfds, files: feature or column with the target')
    unit: str = knob('character', 'tfds, files: what has an id', one_of('character', 'word'))
    min_frequency: int = knob(
        1, 'tfds, files: units seen less often in training are unknown', at_least(1)
    )
    too_long: str = knob(
        'error', 'tfds, files: a side wider than the last bucket', one_of('error', 'cut')
    )
    operand_digits: tuple[int, ...] = knob(
        (2, 3), 'addition: digits of the smaller and of the larger operand', digit_counts()
    )
    num_train: int = knob(85_000, 'addition: training pairs', at_least(1))
    num_eval: int = knob(5_000, 'addition: evaluation pairs, none in training', at_least(1))
    split_seed: int = knob(0, 'addition: which pairs are held out', at_least(0))


@dataclasses.dataclass
class Seq2SeqConfig(ComputeConfig):
    """The encoder-decoder (model/seq2seq.py)."""

    embedding_size: int = knob(32, 'width of a token vector', at_least(1))
    hidden_size: int = knob(128, 'width of the encoder and of the decoder', at_least(1))
    word_dropout: float = knob(
        0.0, 'probability that a source token becomes the unknown one', fraction()
    )
    embedding_dropout: float = knob(0.0, 'dropout after the source embedding', fraction())
    dropout: float = knob(0.0, 'dropout before the logits', fraction())
    forcing: str = knob(
        'constant',
        'teacher forcing: how the probability to read the true token falls from step to step',
        one_of('constant', 'linear', 'inverse_sigmoid'),
    )
    forcing_floor: float = knob(
        1.0, 'probability that teacher forcing stays at, or comes down to', probability()
    )
    forcing_steps: int = knob(
        1000, 'linear: steps from 1 to the floor; inverse_sigmoid: k, half after k ln k steps',
        at_least(1),
    )  # fmt: skip
