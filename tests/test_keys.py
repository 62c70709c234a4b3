"""The promises of training/keys.py: key format v1, and what is drawn from its keys."""

import ast
import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import Config, OptimizerConfig
from input_pipeline.batches import batch_order, train_batches
from input_pipeline.encoded import LabelledTexts
from input_pipeline.vocabulary import FIRST_WORD, UNK
from model.classifier import TextClassifier
from model.dropout import Dropout, WordDropout, levels
from runtime import backend
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from training import keys
from training.mesh import AXIS, Layout
from training.optimizer import make_optimizer
from training.state import make_create_state
from training.step import make_gradient, make_train_step

MakeLayout = Callable[..., Layout]
SHARDS = 8


def hex_words(key: jax.Array | np.ndarray) -> str:
    """The words of a key as one hexadecimal number."""
    words = keys.key_words(key) if isinstance(key, jax.Array) else key
    return ''.join(f'{word:08x}' for word in words.tolist())


@pytest.fixture
def root() -> keys.RootKeys:
    """Returns root keys that are all the same."""
    return keys.root_keys(0, 'threefry2x32')


# The format.


def test_key_format_1_is_pinned() -> None:
    roots = keys.root_keys(42, 'threefry2x32')
    assert (keys.KEY_FORMAT, keys.MASK_FORMAT) == (1, 2)
    assert list(keys.Stream) == [0, 1, 2, 3]
    assert [stream.name.lower() for stream in keys.Stream] == list(keys.RootKeys._fields)
    assert [hex_words(root) for root in roots] == 4 * ['000000000000002a']
    assert hex_words(keys.stream_key(roots, keys.Stream.PARAMS)) == '6d3e048f1022172d'
    shards = {
        (0, 0): {'dropout': 'aba4c4b591dc4e05', 'sample': 'ac8088fcfc3696b6'},
        (0, 1): {'dropout': '05e5423aea7e4640', 'sample': '0e3e75eae88aec75'},
        (1, 0): {'dropout': 'e095c904c68e0109', 'sample': 'e408d810dec69621'},
        (1, 7): {'dropout': 'f51b34e199707c0b', 'sample': '1f91d3923eafb8fb'},
        (10_000, 63): {'dropout': '8a7da70881bc0983', 'sample': '9f310e8c61c4728a'},
    }
    for (step, shard), expected in shards.items():
        rngs = keys.shard_rngs(roots, step, shard)
        assert {name: hex_words(key) for name, key in rngs.items()} == expected
    epochs = {0: '92d0d25df1469f5a', 1: '7221891667d344be', 1000: 'bbb3be68504a73e8'}
    assert {epoch: hex_words(keys.epoch_seed(roots, epoch)) for epoch in epochs} == epochs


def test_streams_come_before_steps_and_steps_before_shards(root: keys.RootKeys) -> None:
    """Counts fold one after the other: none is added to another, and none comes first by value."""
    fold_in = jax.random.fold_in
    for name, stream in (('dropout', keys.Stream.DROPOUT), ('sample', keys.Stream.SAMPLE)):
        for step, shard in ((0, 0), (2, 3), (3, 2)):
            expected = hex_words(fold_in(fold_in(fold_in(root[0], stream), step), shard))
            assert hex_words(keys.shard_rngs(root, step, shard)[name]) == expected
            traced = jax.jit(keys.shard_rngs)(root, step, shard)
            assert hex_words(traced[name]) == expected


def test_a_stream_with_a_seed_of_its_own_leaves_the_others_alone() -> None:
    alike = keys.root_keys(5, 'threefry2x32')
    for stream in keys.Stream:
        roots = keys.root_keys(5, 'threefry2x32', {stream.name.lower(): 9})
        same = [hex_words(one) == hex_words(other) for one, other in zip(roots, alike, strict=True)]
        assert same == [other != stream for other in keys.Stream]
        assert hex_words(roots[stream]) == hex_words(keys.root_keys(9, 'threefry2x32')[stream])
    # The run's own seed, given by name, changes nothing.
    again = keys.root_keys(5, 'threefry2x32', {'dropout': 5, 'data': -1})
    assert list(map(hex_words, again)) == list(map(hex_words, alike))


def test_the_root_key_of_every_implementation_is_pinned() -> None:
    roots = {
        ('threefry2x32', 0): '0000000000000000',
        ('threefry2x32', 2**32 - 1): '00000000ffffffff',
        ('rbg', 42): '000000000000002a000000000000002a',
        ('rbg', 2**32 - 1): '00000000ffffffff00000000ffffffff',
    }
    made = {(impl, seed): hex_words(keys.root_keys(seed, impl)[0]) for impl, seed in roots}
    assert made == roots
    words = keys.epoch_seed(keys.root_keys(42, 'rbg'), 1)
    assert hex_words(words) == '7221891667d344be7221891667d344be'


def test_the_masks_of_a_key_are_pinned(root: keys.RootKeys) -> None:
    """Linen's part of the format: module path and call counter, folded into the shard's key."""
    bits = np.asarray(mask(keys.shard_rngs(root, 3, 2)), bool)
    assert np.packbits(bits).tobytes().hex() == '35875167e182c0ec'


def test_local_copy_is_the_same_key(root: keys.RootKeys) -> None:
    for roots in (root, keys.root_keys(5, 'rbg')):
        for copy, key in zip(keys.local_copy(roots), roots, strict=True):
            assert hex_words(copy) == hex_words(key)
            assert copy.dtype == key.dtype


def test_all_keys_of_a_small_run_are_distinct(
    layout: MakeLayout,
    classifier: Callable[..., TextClassifier],
    token_batch: Callable[..., dict[str, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every key that three steps of eight shards fold or draw from, as the trainer runs them."""
    folds: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
    drawn: list[str] = []
    fold_in, make_rng = jax.random.fold_in, flax.core.Scope.make_rng

    def record_fold(parent: np.ndarray, data: np.ndarray, key: np.ndarray) -> None:
        folds[hex_words(parent), int(data)].add(hex_words(key))

    def recorded_fold_in(key: jax.Array, data: Any) -> jax.Array:
        result = fold_in(key, data)
        words = jax.random.key_data(key), jnp.uint32(data), jax.random.key_data(result)
        jax.debug.callback(record_fold, *words)
        return result

    def recorded_make_rng(scope: flax.core.Scope, name: str = 'params') -> jax.Array:
        key = make_rng(scope, name)
        jax.debug.callback(lambda words: drawn.append(hex_words(words)), jax.random.key_data(key))
        return key

    monkeypatch.setattr(jax.random, 'fold_in', recorded_fold_in)
    monkeypatch.setattr(flax.core.Scope, 'make_rng', recorded_make_rng)
    model = classifier(word_dropout=0.2, embedding_dropout=0.2, dropout=0.2)
    optimizer = make_optimizer(OptimizerConfig('sgd', schedule='constant'), 3)  # compiles sooner
    seed_key = keys.root_keys(0, 'threefry2x32')
    root = hex_words(seed_key[0])
    state = make_create_state(classification.classifier_init(model), optimizer, layout(8))(seed_key)
    step = make_train_step(classification.classifier_sums(model), optimizer, 1.0, layout(8))
    parameters = len(jax.tree.leaves(state.params))
    for _ in range(3):
        state, _ = step(state, layout(8).put(token_batch(8, 6)))
    for epoch in range(4):
        drawn.append(hex_words(keys.epoch_seed(state.root_keys, epoch)))
    jax.effects_barrier()

    derived = [key for results in folds.values() for key in results]
    assert len(derived) == len(folds), 'a fold gave two keys'
    assert len({root, *derived}) == 1 + len(derived), 'two folds gave one key'
    assert len(set(drawn)) == len(drawn), 'a key was drawn from twice'
    assert set(drawn).isdisjoint(parent for parent, _ in folds), 'a key was drawn from and folded'
    assert set(drawn) <= set(derived)
    assert len(drawn) == 3 * SHARDS * 5 + parameters + 4  # five modules draw, word dropout first


def test_missing_dropout_stream_is_an_error_not_a_fallback(
    root: keys.RootKeys,
    classifier: Callable[..., TextClassifier],
    token_batch: Callable[..., dict[str, np.ndarray]],
) -> None:
    model = classifier(dropout=0.5)
    params = jax.eval_shape(classification.classifier_init(model), root.params)
    rngs = keys.shard_rngs(root, 0, 0)
    assert 'params' not in rngs  # which is what Linen falls back to
    del rngs['dropout']
    with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
        jax.eval_shape(classification.classifier_sums(model), params, token_batch(2, 6), rngs)


def test_keys_are_derived_in_one_module() -> None:
    """Elsewhere no call makes or derives a key, and `jax.random` goes by its full name."""
    deriving = {'key', 'PRNGKey', 'split', 'fold_in', 'wrap_key_data', 'clone'}
    project = Path(keys.__file__).parents[1]
    folders = (*backend.CORE, 'configs', 'tools', 'launch', 'benchmarks')
    files = [
        *project.glob('*.py'),
        *(file for name in folders for file in project.glob(f'{name}/**/*.py')),
    ]
    assert len(files) > 20
    found = []
    for file in set(files) - {Path(keys.__file__)}:
        shape_alone = 'jax.eval_shape(jax.random.key, 0)'  # makes no key
        for node in ast.walk(ast.parse(file.read_text().replace(shape_alone, 'None'))):
            if isinstance(node, ast.ImportFrom):
                names = {f'{node.module}.{alias.name}' for alias in node.names}
                wrong = any(name.startswith('jax.random') for name in names)
            elif isinstance(node, ast.Import):
                wrong = any(alias.name == 'jax.random' for alias in node.names)
            else:
                wrong = isinstance(node, ast.Attribute) and ast.unparse(node) in {
                    f'jax.random.{name}' for name in deriving
                }
            if wrong:
                found.append(f'{file.relative_to(project)}: {ast.unparse(node)}')
    assert not found


# The masks.


class Masks(nn.Module):
    """What word dropout and dropout draw for a shard: float32[64], 1 where a value is dropped."""

    @nn.compact
    def __call__(self) -> jax.Array:
        word_dropout = WordDropout(0.5, UNK, FIRST_WORD, name='word_dropout')
        words = word_dropout(jnp.full(32, FIRST_WORD), deterministic=False)
        values = Dropout(0.5, name='dropout')(jnp.ones(32), deterministic=False)
        return jnp.concatenate([words == UNK, values == 0.0]).astype(jnp.float32)


def mask(rngs: dict[str, jax.Array]) -> jax.Array:
    """The masks that these keys draw."""
    return jnp.asarray(Masks().apply({}, rngs=rngs))


def trainer_masks(layout: Layout, root: keys.RootKeys, step: int) -> np.ndarray:
    """float32[shards, 64]: the masks of the trainer's own step, as the gradient of what it sums.

    A row of the batch holds its shard's index; its loss is that shard's parameters times its mask.
    """

    def loss_sums(
        params: Any, rows: dict[str, jax.Array], rngs: Any, _: jax.Array
    ) -> dict[str, jax.Array]:
        return {'loss': params['masked'][rows['shard'][0]] @ mask(rngs)}

    gradient = make_gradient(loss_sums, layout)
    batch = layout.put({'shard': np.arange(layout.num_shards, dtype=np.int32)})
    params = {'masked': jnp.zeros((layout.num_shards, 64))}
    root, step_, params = jax.device_put((root, jnp.int32(step), params), layout.replicated)
    return np.asarray(gradient(params, root, step_, batch)[0]['masked'])


@pytest.mark.parametrize(
    'devices',
    [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8],
)
def test_masks_of_the_trainers_step_do_not_depend_on_the_devices(
    layout: MakeLayout, root: keys.RootKeys, devices: int
) -> None:
    expected = [mask(keys.shard_rngs(root, 5, shard)) for shard in range(SHARDS)]
    np.testing.assert_array_equal(trainer_masks(layout(devices), root, 5), expected)


def shard_keys(root: keys.RootKeys, step: int) -> dict[str, jax.Array]:
    """The keys of all shards of a step, stacked."""
    return jax.vmap(lambda shard: keys.shard_rngs(root, step, shard))(jnp.arange(SHARDS))


def test_jit_with_sharded_keys_draws_the_trainers_masks(
    layout: MakeLayout, root: keys.RootKeys
) -> None:
    sharding = NamedSharding(layout(8).mesh, P(AXIS))
    rngs = jax.device_put(shard_keys(root, 5), sharding)
    masks = jax.jit(jax.vmap(mask), in_shardings=sharding, out_shardings=sharding)(rngs)
    assert len(masks.sharding.device_set) == SHARDS
    np.testing.assert_array_equal(masks, trainer_masks(layout(8), root, 5))


def test_pmap_draws_the_trainers_masks(layout: MakeLayout, root: keys.RootKeys) -> None:
    masks = jax.pmap(mask)(shard_keys(root, 5))
    np.testing.assert_array_equal(masks, trainer_masks(layout(8), root, 5))


def test_masks_differ_between_shards_steps_and_streams(root: keys.RootKeys) -> None:
    def stream_masks(step: jax.Array, shard: jax.Array) -> jax.Array:
        rngs = keys.shard_rngs(root, step, shard)
        return jnp.stack([mask({'dropout': key}) for key in rngs.values()])

    steps, shards = np.meshgrid(np.arange(SHARDS), np.arange(SHARDS))
    masks = jax.jit(jax.vmap(stream_masks))(steps.ravel(), shards.ravel()).reshape(-1, 64)
    assert len(masks) == 2 * SHARDS * SHARDS
    assert len(np.unique(masks, axis=0)) == len(masks)


RATE, DRAWS = 0.1, 20_000


@pytest.fixture(scope='module')
def dropped() -> np.ndarray:
    """bool[shards, draws]: the words that word dropout replaces on every shard of a step."""
    layer, words = WordDropout(RATE, UNK, FIRST_WORD), jnp.full((DRAWS // 20, 20), FIRST_WORD)
    root = keys.root_keys(0, 'threefry2x32')

    def shard_words(shard: jax.Array) -> jax.Array:
        rngs = keys.shard_rngs(root, 0, shard)
        return layer.apply({}, words, deterministic=False, rngs=rngs) == UNK

    return np.asarray(jax.jit(jax.vmap(shard_words))(jnp.arange(SHARDS))).reshape(SHARDS, DRAWS)


def test_word_dropout_has_its_rate(dropped: np.ndarray) -> None:
    rate = levels(RATE) / 256  # 0.1016
    deviation = (rate * (1 - rate) / dropped.size) ** 0.5
    assert abs(dropped.mean() - rate) < 2.58 * deviation  # 99% of a binomial's mass
    each = (rate * (1 - rate) / DRAWS) ** 0.5
    assert np.abs(dropped.mean(axis=1) - rate).max() < 3.5 * each


def test_masks_of_different_shards_are_uncorrelated(dropped: np.ndarray) -> None:
    between = np.corrcoef(dropped)[np.triu_indices(SHARDS, 1)]
    assert np.abs(between).max() < 3.5 / DRAWS**0.5


# The order of the data.


def order_of(
    root: keys.RootKeys, examples: int = 40, batch_size: int = 1, window_batches: int = 1
) -> Callable[[int], np.ndarray]:
    """step -> rows, for examples of arbitrary lengths."""
    lengths = np.random.default_rng(0).integers(2, 15, examples)
    words = functools.partial(keys.epoch_seed, root)
    return batch_order(lengths, batch_size, window_batches, words)


def test_the_order_of_examples_is_pinned(root: keys.RootKeys) -> None:
    stream = order_of(root, 10)
    assert [int(stream(step)[0]) for step in range(10)] == [6, 8, 3, 9, 5, 7, 4, 0, 2, 1]
    assert [int(stream(step)[0]) for step in range(10, 20)] == [0, 9, 5, 3, 2, 7, 1, 6, 8, 4]
    windows = order_of(root, 10, batch_size=4, window_batches=2)
    expected = [[3, 4, 9, 0], [6, 5, 7, 8], [2, 1, 9, 0]]
    assert [windows(step).tolist() for step in range(3)] == expected


def test_every_epoch_has_every_example_once_in_an_order_of_its_own(root: keys.RootKeys) -> None:
    stream = order_of(root)
    epochs = [[int(stream(40 * epoch + i)[0]) for i in range(40)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(40)) not in epochs


def test_epochs_of_different_seeds_do_not_coincide() -> None:
    """As they do where the order of an epoch comes from seed + epoch."""
    orders = set()
    for seed in range(4):
        stream = order_of(keys.root_keys(seed, 'threefry2x32'))
        orders |= {tuple(int(stream(40 * e + i)[0]) for i in range(40)) for e in range(4)}
    assert len(orders) == 16


def test_a_batch_far_on_is_the_one_reached_from_the_start(root: keys.RootKeys) -> None:
    walked, jumped = (order_of(root, 1500, batch_size=8, window_batches=16) for _ in range(2))
    for step in range(10_001):
        reached = walked(step)
    np.testing.assert_array_equal(jumped(10_000), reached)
    np.testing.assert_array_equal(walked(0), jumped(0))


def batches_from(
    texts: LabelledTexts, root: keys.RootKeys, start: int, rows: slice
) -> list[dict[str, np.ndarray]]:
    """The batches of steps start .. 11."""
    data = DataConfig(bucket_lengths=(5, 8, 11, 14), window_batches=2)
    config = Config(num_steps=12, batch_size=8, data=data, model=ModelConfig())
    epoch_seed = functools.partial(keys.epoch_seed, root)
    return list(train_batches(texts, config, epoch_seed, rows, start))


def test_batches_do_not_depend_on_where_a_run_was_resumed(
    root: keys.RootKeys, random_texts: Callable[..., LabelledTexts]
) -> None:
    texts = random_texts(30, 14)
    whole = batches_from(texts, root, 0, slice(0, 8))
    resumed = batches_from(texts, root, 7, slice(0, 8))
    assert (len(whole), len(resumed)) == (12, 5)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole[7:])


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_together_read_the_same_batch(
    root: keys.RootKeys, random_texts: Callable[..., LabelledTexts], processes: int
) -> None:
    texts, size = random_texts(30, 14), 8 // processes
    parts = [
        batches_from(texts, root, 0, slice(start, start + size)) for start in range(0, 8, size)
    ]
    for batch, *rows in zip(batches_from(texts, root, 0, slice(0, 8)), *parts, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([r[name] for r in rows]), values)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_one_process_reads_all_rows_on_any_number_of_devices(
    layout: MakeLayout, devices: int
) -> None:
    assert layout(devices).process_rows(32) == slice(0, 32)
