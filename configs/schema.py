"""One run: every knob with its checks, to and from a dictionary.

A run is a file with `get_config() -> Config` beside this one. A knob decides the trajectory of
the run (its bits) unless it is marked `free`: on resume a trajectory knob must be what it was.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from configs.checks import at_least, knob, one_of, uint32
from configs.sections import DataConfig, ModelConfig, OptimizerConfig, PairsConfig, Seq2SeqConfig


class BadInput(Exception):
    """A mistake the user can mend, in one line: what was found, what is expected, what to do."""

    exit_code = 2


class NoAnswer(BadInput):
    """No mistake of the user's: another process, or a store, is not there. Worth another try."""

    exit_code = 1


@dataclasses.dataclass
class Config:
    """One run. The type of `model` says which task is learned (tasks/)."""

    seed: int = knob(
        0, 'makes the root key of a new run; a resumed run keeps its own', uint32(), free=True
    )
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
    if config.optimizer.shard_state and config.reduction != 'tree':
        raise BadInput("config.optimizer.shard_state = True: expected config.reduction = 'tree'")
    if config.data.source == 'tfds' and not config.data.name:
        raise BadInput(
            "config.data.name = '': expected the name of a TFDS data set, as in glue/sst2"
        )


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` gave. Raises BadInput where its names are of no task's config."""
    for data, model in (
        (DataConfig, ModelConfig),
        (PairsConfig, Seq2SeqConfig),  # seq2seq
    ):
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
