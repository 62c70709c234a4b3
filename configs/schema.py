"""Every option of a run that all tasks share: its default, its meaning and its check.

A run is a file beside this one with `get_config() -> Config`. Options are assumed to affect a run's
bits, so a resume may change only those declared `resumable`. Those leave finished steps unchanged;
`seed`, `seeds` and `cpu_threads` are ignored on a resume, with a warning. A task adds the options
of its data and model in tasks/, in subclasses of `DataConfig` and `ModelConfig`.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterator
from typing import Any

from configs import checks
from configs.checks import SEED, STREAM_SEED, WORDS, Check, at_least, fraction, one_of
from errors import UserError

MOST_CPU_THREADS = 1024


def option(
    default: Any,
    meaning: str,
    check: Check | None = None,
    *,
    resumable: bool = False,
    chosen: bool = False,
) -> Any:
    """Declares a dataclass field with its meaning, its check, and whether a resume may change it.

    Value check, --help and the resume rule follow from it. If `chosen`, '' or 0 stands for what the
    first launch chose.
    """
    metadata = {'meaning': meaning, 'check': check, 'resumable': resumable, 'chosen': chosen}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataConfig:
    """What every task reads, and how examples become batches."""

    source: str = option('files', 'where the examples come from', one_of('tfds', 'files'))
    name: str = option('', 'tfds: data set, such as glue/sst2')
    data_dir: str = option(
        '',
        "tfds: folder of prepared data sets ('' = $TFDS_DATA_DIR or the TFDS default)",
        resumable=True,
    )
    train: str = option(
        'train',
        'tfds: training split; files: path of .tsv, .csv or .jsonl, also .gz; * for several files',
        Check(bool, 'some text'),
    )
    evaluation: str = option(
        'validation',
        'tfds: evaluation split; files: path; either: a share to hold out, such as 10%',
        Check(bool, 'some text'),
    )
    columns: tuple[str, ...] = option(
        (), 'files: names of the columns of tables without a header line, in order', resumable=True
    )
    delimiter: str = option(
        '',
        "files: what separates the columns of tables ('' = tab in .tsv, comma in .csv)",
        Check(lambda x: len(x) < 2 and x not in [*'"\r\n\0'], "one character, such as ';'"),
        resumable=True,
    )
    bad_rows: str = option(
        'stop',
        'a row that cannot be used: stop, or skip it and list it in WORKDIR/skipped_rows.txt',
        one_of('stop', 'skip'),
        resumable=True,
    )
    bucket_lengths: tuple[int, ...] = option(
        (8, 16, 32, 64, 128),
        'padded lengths of training batches, in tokens, start and end marks included',
        Check(
            lambda value: bool(value) and list(value) == sorted({n for n in value if n >= 3}),
            'increasing whole numbers >= 3, such as (8,16,32)',
        ),
    )
    window_batches: int = option(
        16, 'global batches whose examples are sorted by length together', at_least(1)
    )
    loader_threads: int = option(
        2, 'threads that prepare batches ahead of the step', at_least(1), resumable=True
    )


@dataclasses.dataclass
class ModelConfig:
    """How every model computes."""

    compute_dtype: str = option(
        'float32', 'dtype of activations (parameters stay float32)', one_of('float32', 'bfloat16')
    )
    remat: bool = option(
        False,
        'recompute LSTM gates, or the layers of a Transformer, in the backward pass to save memory',
    )


@dataclasses.dataclass
class OptimizerConfig:
    """The update rule (training/optimizer.py)."""

    name: str = option('adamw', 'update rule', one_of('adamw', 'sgd'))
    learning_rate: float = option(2e-3, 'peak learning rate', at_least(0))
    schedule: str = option('cosine', 'learning rate after warm-up', one_of('constant', 'cosine'))
    warmup_steps: int = option(0, 'steps of linear warm-up from zero', at_least(0))
    decay_steps: int = option(
        0, 'step at which the cosine schedule reaches zero (0 = num_steps)', at_least(0)
    )
    momentum: float = option(0.9, 'sgd: momentum', fraction())
    weight_decay: float = option(
        0.0, 'decoupled decay of matrices, multiplied by the learning rate', at_least(0)
    )
    clip_norm: float = option(1.0, 'global gradient norm is clipped to this (0 = off)', at_least(0))
    shard_state: bool = option(
        False, 'ZeRO-1: each device keeps the optimizer state of its own slices alone'
    )
    on_nonfinite: str = option(
        'stop',
        'when a loss or gradient is not finite: stop, or skip the update',
        one_of('stop', 'skip'),
        resumable=True,
    )


@dataclasses.dataclass
class InitConfig:
    """What a new run starts from, other than its root key (runtime/warm_start.py)."""

    weights: str = option('', 'BERT-family model.safetensors to take the encoder from')
    run: str = option('', 'workdir of a run whose parameters and tokenizer start this one')
    vectors: str = option('', 'word vectors as text: .txt, .vec, also .gz')
    freeze: tuple[str, ...] = option(
        (), "parts of the model that are not trained, such as ('embedding',)"
    )


@dataclasses.dataclass
class SeedsConfig:
    """Seeds of single streams, to vary one source of randomness and keep the others."""

    params: int = option(-1, 'initial parameters (-1 = seed)', STREAM_SEED, resumable=True)
    dropout: int = option(-1, 'dropout masks (-1 = seed)', STREAM_SEED, resumable=True)
    sample: int = option(-1, 'sampled tokens (-1 = seed)', STREAM_SEED, resumable=True)
    data: int = option(-1, 'order of the examples (-1 = seed)', STREAM_SEED, resumable=True)


@dataclasses.dataclass(kw_only=True)
class Config:
    """Configures a run. Its task is the module of tasks/ that defines `data` and `model`."""

    seed: int = option(
        0, 'makes the root key of a new run; a resumed run keeps its own', SEED, resumable=True
    )
    prng_impl: str = option(
        'threefry2x32', 'PRNG implementation of every key', one_of('threefry2x32', 'rbg')
    )
    num_steps: int = option(1000, 'training steps', at_least(1))
    num_shards: int = option(
        0,
        'data shards, a power of two: the most devices this run can ever use '
        '(0 = device count of the first launch)',
        Check(lambda n: n >= 0 and n & (n - 1) == 0, '0 or a power of two'),
        chosen=True,
    )
    batch_size: int = option(64, 'global batch, examples per step', at_least(1))
    eval_batch_size: int = option(256, 'global batch of evaluation', at_least(1))
    cpu_threads: int = option(
        0,
        'size of the CPU thread pool, the most CPU devices this run can ever use; a resumed run '
        'keeps its own (0 = the larger of the cores and the CPU devices of the first launch)',
        Check(lambda value: 0 <= value <= MOST_CPU_THREADS, f'a number in [0, {MOST_CPU_THREADS}]'),
        resumable=True,
    )
    matmul_precision: str = option(
        'highest',
        "float32 matrix products: 'highest' is float32; 'high' is TF32 on GPUs, three bfloat16 "
        "passes on TPUs; 'default' is TF32 or one bfloat16 pass",
        one_of('default', 'high', 'highest'),
    )
    reduction: str = option(
        'tree',
        "how gradients are summed: 'tree' gives the same bits on every device count",
        one_of('tree', 'psum'),
    )
    eval_every: int = option(200, 'steps between evaluations', at_least(1), resumable=True)
    checkpoint_every: int = option(200, 'steps between checkpoints', at_least(1), resumable=True)
    checkpoint_minutes: float = option(
        0.0, 'maximum minutes between checkpoints (0 = no limit)', at_least(0), resumable=True
    )
    log_every: int = option(50, 'steps between log lines', at_least(1), resumable=True)
    keep_newest: int = option(2, 'newest checkpoints to keep', at_least(1), resumable=True)
    keep_best: int = option(
        1, 'best checkpoints to keep, by evaluation metric', at_least(0), resumable=True
    )
    best_metric: str = option(
        '',
        "evaluation metric that ranks checkpoints: larger is better, except for 'loss' "
        "('' = the task's choice)",
        resumable=True,
    )
    patience: int = option(
        0,
        'stop after this many evaluations without improvement (0 = never)',
        at_least(0),
        resumable=True,
    )
    seeds: SeedsConfig = dataclasses.field(default_factory=SeedsConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


def is_section(value: object) -> bool:
    """Returns whether a value is an instance that holds options."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def sections(section: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yields (prefix of its options' names, section) for a config and the sections in it."""
    yield prefix, section
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if is_section(value):
            yield from sections(value, f'{prefix}{field.name}.')


def options(config: Config) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yields (dotted name, value, field) of every option, those of a section together."""
    for prefix, section in sections(config):
        for field in dataclasses.fields(section):
            if not is_section(value := getattr(section, field.name)):
                yield prefix + field.name, value, field


def check(config: Config) -> None:
    """Checks every option, after lossless conversions in place, such as 20.0 to 20.

    Raises UserError for unknown options or the first invalid value.
    """
    known = [name for name, _, _ in options(config)]
    if unknown := [
        f'config.{prefix}{name}: no such option{checks.did_you_mean(prefix + name, known)}'
        for prefix, section in sections(config)
        for name in vars(section).keys() - {field.name for field in dataclasses.fields(section)}
    ]:
        raise UserError('; '.join(sorted(unknown)))
    for prefix, section in list(sections(config)):
        kinds = typing.get_type_hints(type(section))
        for field in dataclasses.fields(section):
            kind, value = kinds[field.name], getattr(section, field.name)
            name = f'config.{prefix}{field.name}'
            rule: Check | None = field.metadata.get('check')
            try:
                value = checks.converted(value, kind)
            except (TypeError, OverflowError) as error:
                expected = WORDS.get(kind) or (rule.expected if rule else f'{kind.__name__}(...)')
                raise UserError(f'{name} = {value!r}: expected {expected}') from error
            if rule and not rule.test(value):
                raise UserError(f'{name} = {value!r}: expected {rule.expected}')
            setattr(section, field.name, value)
    optimizer = config.optimizer
    if optimizer.shard_state and config.reduction != 'tree':
        raise UserError("config.optimizer.shard_state = True: expected config.reduction = 'tree'")
    if optimizer.schedule == 'cosine' and 0 < optimizer.decay_steps <= optimizer.warmup_steps:
        raise UserError(
            f'config.optimizer.decay_steps = {optimizer.decay_steps}: expected 0 for num_steps, or '
            f'more than the {optimizer.warmup_steps} of warmup_steps'
        )
    given = [name for name in ('weights', 'run', 'vectors') if getattr(config.init, name)]
    if len(given) > 1:
        raise UserError(f'config.init.{" and config.init.".join(given)}: expected at most one')
    if config.data.source == 'tfds' and not config.data.name:
        raise UserError("config.data.name = '': expected a TFDS data set, such as glue/sst2")


def task_name(config: Config) -> str:
    """Returns the name of the module in tasks/ that the config's sections are from."""
    names = {type(section).__module__ for section in (config.data, config.model)}
    if len(names) != 1:
        raise UserError(
            f'config.data and config.model are from {" and ".join(sorted(names))}: expected two '
            'sections of one task'
        )
    return names.pop().removeprefix('tasks.')


def to_dict(config: Config) -> dict[str, Any]:
    """Returns dotted name -> value, as JSON holds it: tuples become lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value, _ in options(config)
    }


def fill(config: Config, values: dict[str, Any]) -> Config:
    """Sets the options of `config` to `values`, as `to_dict` gave them, and returns it.

    Options missing in `values` are newer and keep their default. Raises UserError for a name that
    this code lacks.
    """
    known = {name: default for name, default, _ in options(config)}
    values = renamed(values, known)
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(
            f'config.{unknown[0]} is in the run record, but this code has no such option; '
            'use the code that wrote the checkpoint'
        )
    for name, value in values.items():
        section, _, field = name.rpartition('.')
        holder = getattr(config, section) if section else config
        setattr(holder, field, tuple(value) if isinstance(known[name], tuple) else value)
    return config


def renamed(saved: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the options of a run record by today's names.

    Before data.tokenizer, texts were split into words or, with data.unit, into characters.
    """
    if 'data.tokenizer' in saved or 'data.tokenizer' not in known:
        return saved
    kept = {name: value for name, value in saved.items() if name != 'data.unit'}
    return kept | {'data.tokenizer': f'{saved.get("data.unit", "word")}s'}


def trajectory_changes(config: Config, saved: dict[str, Any]) -> list[str]:
    """Returns 'name: then -> now' for every option that decides the run's bits and has changed.

    An option missing from `saved`, a run record's config, had its default.
    """
    changed = []
    known = {name for name, _, _ in options(config)}
    saved = renamed(saved, known)
    # Without a schedule that depends on it, num_steps only says when to stop.
    open_end = config.optimizer.schedule == 'constant' or config.optimizer.decay_steps > 0
    for name, value, field in options(config):
        then = saved.get(name, field.default)
        same = list(then) == list(value) if isinstance(value, tuple) else then == value
        resumable = field.metadata['resumable'] or (name == 'num_steps' and open_end)
        # Files may move: the fingerprints in the task's facts say whether the data is the same.
        moved = name in ('data.train', 'data.evaluation') and config.data.source == 'files'
        kept = field.metadata['chosen'] and not value
        if not (same or resumable or moved or kept):
            changed.append(f'{name}: {then!r} -> {value!r}')
    gone = [f'{name}: {saved[name]!r} -> no such option' for name in sorted(saved.keys() - known)]
    return changed + gone
