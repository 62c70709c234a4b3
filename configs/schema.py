"""Every knob of a run, declared once: default, meaning, unit, check.

A run is a file with `get_config() -> Config` beside this one. A knob decides the trajectory of
the run (its bits) unless it is marked `free`: on resume a trajectory knob must be what it was.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from configs.checks import (
    Check,
    at_least,
    digit_counts,
    fraction,
    increasing_lengths,
    names,
    one_of,
    probability,
)


class BadInput(Exception):
    """A mistake the user can mend, in one line: what was found, what is expected, what to do."""

    exit_code = 2


def knob(default: Any, meaning: str, check: Check | None = None, *, free: bool = False) -> Any:
    """A dataclass field with its meaning, its check, and whether it may change on resume."""
    return dataclasses.field(
        default=default, metadata={'meaning': meaning, 'check': check, 'free': free}
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
class ModelConfig:
    """The word-dropout classifier (model/classifier.py)."""

    embedding_size: int = knob(64, 'width of a word vector', at_least(1))
    hidden_size: int = knob(64, 'width of each LSTM direction, attention and head', at_least(1))
    word_dropout: float = knob(0.1, 'probability that a word becomes the unknown word', fraction())
    embedding_dropout: float = knob(0.2, 'dropout after the embedding', fraction())
    dropout: float = knob(0.2, 'dropout after LSTM, attention and hidden layer', fraction())
    compute_dtype: str = knob(
        'float32', 'dtype of activations (parameters stay float32)', one_of('float32', 'bfloat16')
    )


@dataclasses.dataclass
class Seq2SeqConfig:
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
    compute_dtype: str = knob(
        'float32', 'dtype of activations (parameters stay float32)', one_of('float32', 'bfloat16')
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
    on_nonfinite: str = knob(
        'stop', 'at a step that is not finite', one_of('stop', 'skip'), free=True
    )


@dataclasses.dataclass
class Config:
    """One run. The type of `model` says which task is learned (tasks/)."""

    seed: int = knob(0, 'makes the root key of a new run; a resumed run keeps its own', free=True)
    prng_impl: str = knob(
        'threefry2x32', 'PRNG implementation of every key', one_of('threefry2x32', 'rbg')
    )
    num_steps: int = knob(1000, 'training steps', at_least(1))
    num_shards: int = knob(
        0, 'data shards, a power of two (0 = device count of the first launch)', at_least(0)
    )
    batch_size: int = knob(64, 'global batch, examples per step', at_least(1))
    eval_batch_size: int = knob(256, 'global batch of evaluation', at_least(1))
    reduction: str = knob(
        'tree',
        "how shards are added: 'tree' is exact on every device count",
        one_of('tree', 'psum'),
    )
    eval_every: int = knob(200, 'steps between evaluations', at_least(1), free=True)
    checkpoint_every: int = knob(200, 'steps between checkpoints', at_least(1), free=True)
    log_every: int = knob(50, 'steps between log lines', at_least(1), free=True)
    keep_newest: int = knob(2, 'newest checkpoints kept', at_least(1), free=True)
    keep_best: int = knob(1, 'best checkpoints kept, by evaluation metric', at_least(0), free=True)
    data: DataConfig | PairsConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig | Seq2SeqConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


def knobs(config: Any, prefix: str = '') -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted name, value, field) of every knob, in order of declaration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from knobs(value, f'{prefix}{field.name}.')
        else:
            yield prefix + field.name, value, field


def check(config: Config) -> None:
    """Raises BadInput for the first knob whose value makes no sense."""
    for name, value, field in knobs(config):
        test = field.metadata['check']
        if test is not None and not test[0](value):
            raise BadInput(f'config.{name} = {value!r}: expected {test[1]}')
    if not 0 <= config.seed < 2**32:
        raise BadInput(f'config.seed = {config.seed}: expected a whole number in [0, 2**32)')
    if config.data.source == 'tfds' and not config.data.name:
        raise BadInput(
            "config.data.name = '': expected the name of a TFDS data set, as in glue/sst2"
        )


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` gave. Raises BadInput where its names are of no task's config."""
    for data, model in ((DataConfig, ModelConfig), (PairsConfig, Seq2SeqConfig)):
        config = Config(data=data(), model=model())
        if to_dict(config).keys() == values.keys():
            for name, default, field in knobs(config):
                *sections, _ = name.split('.')
                holder = getattr(config, sections[0]) if sections else config
                value = values[name]
                setattr(holder, field.name, tuple(value) if isinstance(default, tuple) else value)
            return config
    raise BadInput('the config in the checkpoint has other fields; use the code that wrote it')


def to_dict(config: Config) -> dict[str, Any]:
    """Dotted name -> value, as JSON has it (tuples become lists)."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value, _ in knobs(config)
    }


def trajectory_changes(config: Config, saved: dict[str, Any]) -> list[str]:
    """'field: then -> now' for every knob that decides the run's bits and is not as in `saved`."""
    now = to_dict(config)
    free = {name for name, _, field in knobs(config) if field.metadata['free']}
    if config.optimizer.schedule == 'constant' or config.optimizer.decay_steps:
        free.add('num_steps')  # the schedule does not depend on it: a run may be prolonged
    return [
        f'{name}: {saved.get(name)!r} -> {now.get(name)!r}'
        for name in sorted(saved.keys() | now.keys())
        if name not in free and saved.get(name) != now.get(name)
    ]
