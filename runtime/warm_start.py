"""What a new run starts from other than its root key: weights, another run, or word vectors.

All of it is decided by `config.init`, before the first checkpoint. A resume reads none of it again.
"""

import dataclasses
import functools
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from arrays import Tree
from configs import schema
from configs.schema import Config
from errors import UserError
from runtime.checkpoints import Checkpoints
from runtime.resume import readable_record
from runtime.run_record import RunRecord
from runtime.storage import open_location
from training.fingerprint import on_host
from training.mesh import Layout
from training.optimizer import make_optimizer
from training.state import TrainState, abstract_state, make_create_state

Arrays = Mapping[str, np.ndarray]  # by path, such as 'layer_0/query/kernel'
HEAD = 'logits/'  # may start anew: its size is the number of classes
BERT = {  # our modules -> the names of Hugging Face's BertModel
    'embedding': 'embeddings.word_embeddings',
    'positions': 'embeddings.position_embeddings',
    'embedding_norm': 'embeddings.LayerNorm',
    'query': 'attention.self.query',
    'key': 'attention.self.key',
    'value': 'attention.self.value',
    'mixed': 'attention.output.dense',
    'attention_norm': 'attention.output.LayerNorm',
    'inner': 'intermediate.dense',
    'outer': 'output.dense',
    'outer_norm': 'output.LayerNorm',
}
TYPES = 'embeddings.token_type_embeddings.weight'


def apply_init(
    state: TrainState,
    config: Config,
    names: Sequence[str],
    layout: Layout,
    predictor_from_record: Callable[[RunRecord], tuple[Config, Any]],
) -> TrainState:
    """Returns the state of a new run with the parameters that `config.init` names.

    `names` are the tokens by id. `predictor_from_record` is that of tasks/, which this package
    cannot import.
    """
    init = config.init
    if not (init.weights or init.run or init.vectors):
        return state
    arrays = traverse_util.flatten_dict(jax.tree.map(on_host, state.params), sep='/')
    if init.weights:
        arrays |= from_bert(init.weights, arrays, schema.to_dict(config))
    elif init.run:
        read, saved = open_run(init.run)
        other, predictor = predictor_from_record(saved)
        shards, sharded = saved['manifest']['num_shards'], other.optimizer.shard_state
        if sharded and shards % layout.mesh.size:
            raise UserError(
                f'config.init.run = {init.run}: its optimizer state has {shards} shards, which '
                f'{layout.mesh.size} devices do not divide; expected to start on fewer'
            )
        there = dataclasses.replace(
            layout, num_shards=shards, shard_state=sharded, frozen=other.init.freeze
        )
        params = read(restore_target(other, predictor.init, there))[0].params
        given = traverse_util.flatten_dict(jax.tree.map(on_host, params), sep='/')
        arrays |= fitting(f'config.init.run = {init.run}', arrays, given)
    else:
        arrays |= from_vectors(init.vectors, arrays, names)
    params = traverse_util.unflatten_dict(arrays, sep='/')
    return state.replace(params=jax.device_put(params, layout.replicated))


def origin_record(config: Config, workdir: epath.Path | None = None) -> RunRecord | None:
    """Returns the record with the tokenizer of `config.init.run`: a resumed run's own has it too.

    A new run needs no `workdir`. Returns None without `config.init.run`, and raises UserError if
    that is no run.
    """
    if not config.init.run:
        return None
    return (workdir and readable_record(workdir)) or open_run(config.init.run)[1]


def open_run(
    workdir: str,
) -> tuple[Callable[[TrainState], tuple[TrainState, RunRecord]], RunRecord]:
    """Returns what restores the newest checkpoint of another run, and its run record.

    Raises UserError if there is none.
    """
    folder = open_location(workdir)
    run = Checkpoints(folder)
    if not (steps := folder.is_dir() and run.steps()):
        raise UserError(f'config.init.run = {workdir}: expected the workdir of a run')
    return functools.partial(run.read, steps[-1]), run.record(steps[-1])


def restore_target(config: Config, init: Callable[[jax.Array], Tree], layout: Layout) -> TrainState:
    """Returns the shapes and shardings of a run's state; `init` makes its parameters."""
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    return abstract_state(make_create_state(init, optimizer, layout), config.prng_impl)


def fitting(source: str, arrays: Arrays, given: Arrays) -> dict[str, np.ndarray]:
    """Returns the given arrays; the head may be missing or of another shape, and starts anew.

    Raises UserError for any other array that does not fit.
    """
    found, anew = {}, []
    for path, start in arrays.items():
        value = given.get(path)
        if value is not None and value.shape == start.shape:
            found[path] = np.asarray(value, start.dtype)
            if not np.isfinite(found[path]).all():
                raise UserError(f'{source}: {path} has values that are not finite')
        elif path.startswith(HEAD):
            anew.append(path)
        else:
            there = 'missing' if value is None else list(value.shape)
            raise UserError(
                f'{source}: {path} is {there}, expected {list(start.shape)}; '
                'give config.model the sizes, and config.data the tokenizer, that belong to it'
            )
    unused = sorted(given.keys() - arrays.keys())
    logging.info(
        'start        %d arrays of %s; not used: %s; started anew: %s',
        len(found), source, ', '.join(unused) or 'none', ', '.join(anew) or 'none',
    )  # fmt: skip
    return found


def from_bert(file: str, arrays: Arrays, options: RunRecord) -> dict[str, np.ndarray]:
    """Returns the arrays of a BERT-family model.safetensors, by our paths."""
    source = f'config.init.weights = {file}'
    beside = Path(file).with_name('config.json')
    try:
        saved = safetensors.numpy.load_file(file)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f'{source}: cannot be read ({error}), expected safetensors') from error
    try:
        facts = json.loads(beside.read_text()) if beside.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f'{beside}: cannot be read ({error}), expected JSON') from error
    if not isinstance(facts, dict):
        raise UserError(f'{beside}: holds a {type(facts).__name__}, expected a JSON object')
    # No shape shows a wrong one of these.
    heads = options.get('model.num_heads')
    for name, here in (('num_attention_heads', heads), ('hidden_act', 'gelu')):
        if (there := facts.get(name, here)) != here:
            raise UserError(f'{source}: its config.json has {name} {there!r}, this model {here!r}')
    given = {plain_name(name): array for name, array in saved.items()}
    by_path = {bert_name(path): path for path in arrays if not path.startswith(HEAD)}
    renamed = {}
    for name, array in given.items():
        path = by_path.get(name, name)
        renamed[path] = array.T if path.endswith('/kernel') else array
    if TYPES in renamed and 'positions/embedding' in renamed:
        # A text is one segment here, so every token has the vector of the first type.
        renamed['positions/embedding'] = renamed['positions/embedding'] + renamed.pop(TYPES)[0]
    return fitting(source, arrays, renamed)


def plain_name(name: str) -> str:
    """Returns a name as BertModel has it, without the prefix and the spelling of older files."""
    return name.removeprefix('bert.').replace('.gamma', '.weight').replace('.beta', '.bias')


def bert_name(path: str) -> str:
    """Returns the name that a parameter has in BertModel; its own where there is none."""
    *layer, module, kind = path.split('/')
    if module not in BERT:
        return path
    prefix = f'encoder.layer.{layer[0].removeprefix("layer_")}.' if layer else ''
    return f'{prefix}{BERT[module]}.{"bias" if kind == "bias" else "weight"}'


def from_vectors(file: str, arrays: Arrays, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the embedding with the vectors of a file in fastText's or GloVe's text form.

    Raises UserError for a file without a vector of this size for any of the `names`.
    """
    source, path = f'config.init.vectors = {file}', 'embedding/embedding'
    if path not in arrays or not names:
        raise UserError(f'{source}: this model has no words with vectors')
    embedding, ids = arrays[path].copy(), {name: index for index, name in enumerate(names)}
    size, covered, number, header = embedding.shape[1], set(), 0, 0
    try:
        opened = gzip.open if file.endswith('.gz') else open
        with opened(file, 'rt', encoding='utf-8', errors='replace') as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 and len(line.split()) == 2:
                    header = 1  # fastText's counts of words and numbers
                    continue
                if line == '\n':
                    continue
                # From the right, since some words of GloVe have spaces in them; not the first.
                word, *values = line.rstrip().rsplit(' ', size)
                if len(values) != size or (number == 1 + header and ' ' in word):
                    count = len(line.split(' ')) - 1
                    raise ValueError(f'{count} numbers, the embedding has {size}')
                if word in ids and word not in covered:
                    covered.add(word)
                    vector = embedding[ids[word]] = np.array(values, np.float32)
                    if not np.isfinite(vector).all():
                        raise ValueError('a number that is not finite')
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f'{source}: line {number}: {error}; expected a word and numbers, with one space between'
        ) from error
    if not covered:
        raise UserError(f'{source}: none of the {len(names)} tokens has a vector in it')
    logging.info(
        'start        vectors of %d of the %d tokens (%.1f%%) from %s',
        len(covered), len(names), 100 * len(covered) / len(names), source,
    )  # fmt: skip
    return {path: embedding}
