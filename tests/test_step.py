"""The promises of training/step.py, optimizer.py and evaluation.py.

The reference beside which a step is held is written here anew: gradients of plain losses on one
device, everything after them in NumPy at double precision.
"""

import collections
import dataclasses
import functools
import logging
import math
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.flatten_util import ravel_pytree

from configs.schema import Config, OptimizerConfig
from input_pipeline.batches import eval_batches, train_batches
from input_pipeline.encoded import LabelledTexts
from model.classifier import TextClassifier
from runtime.ledger import Ledger, is_finite
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from training import evaluation, keys
from training.evaluation import make_evaluate
from training.fingerprint import fingerprint
from training.mesh import Layout
from training.optimizer import (
    make_optimizer,
    make_schedule,
    norm_and_finite,
    sum_of_squares,
    updates_made,
)
from training.row import make_row, row_columns
from training.state import TrainState, make_create_state, state_fingerprint
from training.step import make_train_step, make_update

SHARDS, STEPS, ROWS, WIDTH = 8, 5, 32, 10
DRAWING = ('dropout', 'classifier', 'zero')  # variants that draw masks
SUM_NAMES = ('correct', 'loss', 'tokens', 'weight')
ADAMW = OptimizerConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=0.05)
SGD = dataclasses.replace(ADAMW, name='sgd', learning_rate=0.5, schedule='constant')
ZERO = dataclasses.replace(ADAMW, shard_state=True)
TokenBatch = Callable[..., dict[str, np.ndarray]]
MakeLayout = Callable[..., Layout]


def constants(_: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Starts a parameter without its key: draws would take longer to compile than all the rest."""
    rng = np.random.default_rng(math.prod(shape))
    return jnp.asarray(rng.normal(0.0, shape[0] ** -0.5, shape), dtype)


class BagOfWords(nn.Module):
    """A classifier that compiles in no time."""

    dropout: float = 0.0
    size: int = 8

    @nn.compact
    def __call__(self, token_ids: jax.Array, lengths: jax.Array, *, train: bool) -> jax.Array:
        """token_ids: int32[B, T], lengths: int32[B] -> logits float32[B, 3]."""
        words = nn.Embed(30, self.size, embedding_init=constants, name='embedding')(token_ids)
        words = nn.Dropout(self.dropout, deterministic=not train, name='dropout')(words)
        mask = jnp.arange(token_ids.shape[1])[None] < lengths[:, None]
        dense = functools.partial(nn.Dense, kernel_init=constants)
        hidden = nn.tanh(dense(self.size, name='hidden')((words * mask[..., None]).mean(axis=1)))
        return dense(3, name='logits')(hidden)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A model, its optimizer and its step on a layout."""

    model: Any
    config: OptimizerConfig
    layout: Layout
    step: Callable[[TrainState, Any], tuple[TrainState, jax.Array]]
    create_state: Callable[[jax.Array], TrainState]

    def start(self) -> TrainState:
        """The state before the first step."""
        return self.create_state(keys.root_keys(0, 'threefry2x32'))


def make_trainer(model: Any, config: OptimizerConfig, layout: Layout) -> Trainer:
    """Binds what train.py binds."""
    layout = dataclasses.replace(layout, shard_state=config.shard_state)
    optimizer = make_optimizer(config, STEPS)
    step = make_train_step(
        classification.classifier_sums(model), optimizer, config.clip_norm, layout
    )
    create_state = make_create_state(classification.classifier_init(model), optimizer, layout)
    return Trainer(model, config, layout, step, create_state)


@pytest.fixture(scope='module')
def trainer(
    layout: MakeLayout, classifier: Callable[..., TextClassifier]
) -> Callable[[str, int], Trainer]:
    """(variant, devices) -> its trainer, the same one each time."""
    variants = {
        'adamw': (BagOfWords(), ADAMW),
        'sgd': (BagOfWords(), SGD),
        'dropout': (BagOfWords(0.3), ADAMW),
        # With 1,024 values in a slice, a smaller kernel would be one slice and zeros.
        'zero': (BagOfWords(0.3, size=90), ZERO),
        'zero sgd': (BagOfWords(size=90), dataclasses.replace(SGD, shard_state=True)),
        'classifier': (classifier(word_dropout=0.2, embedding_dropout=0.2, dropout=0.2), ADAMW),
    }
    return functools.cache(
        lambda variant, devices: make_trainer(*variants[variant], layout(devices))
    )


@pytest.fixture(scope='module')
def batches(token_batch: TokenBatch) -> list[dict[str, np.ndarray]]:
    """Batches of unequal weights, the last of them padded with rows of no weight."""
    made = [token_batch(ROWS, WIDTH, seed) for seed in range(STEPS)]
    made[-1]['weights'] *= np.arange(ROWS) < 19  # the last three shards have none at all
    return made


def row_of(words: jax.Array) -> np.ndarray:
    """A step's row as the ledger has it."""
    return np.asarray(words).astype('<u4').view(list(row_columns(SUM_NAMES).items()))[0]


def run(trainer: Trainer, batches: list[dict[str, np.ndarray]]) -> tuple[TrainState, np.ndarray]:
    """The state after these batches, and the rows of their steps."""
    state, rows = trainer.start(), []
    for batch in batches:
        state, row = trainer.step(state, trainer.layout.put(batch))
        rows.append(row_of(row))
    return state, np.array(rows)


# The reference.


@functools.partial(jax.jit, static_argnums=0)
def gradient_of_rows(
    model: Any, params: Any, rows: dict[str, jax.Array], rngs: dict[str, jax.Array] | None
) -> tuple[Any, jax.Array, jax.Array]:
    """Gradient and value of the weighted sum of losses, and the logits."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        inputs = rows['token_ids'], rows['lengths']
        logits = model.apply({'params': params}, *inputs, train=rngs is not None, rngs=rngs)
        chosen = jnp.take_along_axis(nn.log_softmax(logits), rows['labels'][:, None], axis=1)
        return -(rows['weights'] * chosen[:, 0]).sum(), logits

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, value, logits


def mean_gradient(
    model: Any, params: Any, batch: dict[str, np.ndarray], rngs_of_parts: list[Any]
) -> tuple[Any, dict[str, float]]:
    """Gradient of the weighted mean loss over a batch in equal parts, and the sums of its row."""
    grads = jax.tree.map(lambda p: np.zeros(p.shape), params)
    sums = dict.fromkeys(SUM_NAMES, 0.0)
    for part, rngs in enumerate(rngs_of_parts):
        size = ROWS // len(rngs_of_parts)
        rows = {name: x[part * size : (part + 1) * size] for name, x in batch.items()}
        part_grads, loss, logits = gradient_of_rows(model, params, rows, rngs)
        grads = jax.tree.map(lambda a, b: a + np.float64(b), grads, part_grads)
        sums['loss'] += float(loss)
        sums['correct'] += rows['weights'] @ (np.argmax(logits, axis=1) == rows['labels'])
        sums['tokens'] += rows['lengths'][rows['weights'] > 0].sum()
        sums['weight'] += rows['weights'].sum()
    return jax.tree.map(lambda g: g / sums['weight'], grads), sums


class ReferenceOptimizer:
    """Clipping, Adam or momentum, decay of matrices, learning rate, as their papers have them."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config, self.step = config, 0
        self.first: Any = 0.0
        self.second: Any = 0.0

    def rate(self) -> float:
        """The learning rate of this step."""
        config, after = self.config, self.step - self.config.warmup_steps
        if after < 0:
            return config.learning_rate * self.step / config.warmup_steps
        if config.schedule == 'constant':
            return config.learning_rate
        part = after / (STEPS - config.warmup_steps)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * part))

    def update(self, params: np.ndarray, grads: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """The next parameters, all of them as one vector; `matrix` says which ones decay."""
        config = self.config
        grads = grads * min(1.0, config.clip_norm / np.linalg.norm(grads))
        rate = self.rate()
        self.step += 1
        if config.name == 'adamw':
            self.first = 0.9 * self.first + 0.1 * grads
            self.second = 0.999 * self.second + 0.001 * grads**2
            unbiased = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
            direction = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        else:
            direction = self.first = config.momentum * self.first + grads
        return params - rate * (direction + config.weight_decay * params * matrix)


@pytest.fixture(scope='module')
def reference(
    trainer: Callable[[str, int], Trainer], batches: list[dict[str, np.ndarray]]
) -> Callable[[str], tuple[Any, list[dict[str, float]]]]:
    """variant -> parameters after the batches, and what the rows of their steps should say."""

    def run(variant: str) -> tuple[Any, list[dict[str, float]]]:
        ours = trainer(variant, 8)
        start = jax.device_get(ours.start().params)
        params, unravel = ravel_pytree(start)
        matrix, _ = ravel_pytree(jax.tree.map(lambda p: np.full(p.shape, p.ndim > 1), start))
        params, optimizer, facts = np.float64(params), ReferenceOptimizer(ours.config), []
        root = keys.root_keys(0, 'threefry2x32')
        for step, batch in enumerate(batches):
            drawing = variant in DRAWING
            rngs = [keys.shard_rngs(root, step, s) for s in range(SHARDS)] if drawing else [None]
            grads, sums = mean_gradient(ours.model, unravel(np.float32(params)), batch, rngs)
            grads = np.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
            facts.append({'grad_norm': float(np.linalg.norm(grads)), **sums})
            params = optimizer.update(params, grads, np.asarray(matrix))
        return unravel(np.float32(params)), facts

    return functools.cache(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('variant', 'devices'),
    [
        *(('adamw', 2), ('sgd', 4), ('adamw', 8)),
        *(('dropout', 2), ('dropout', 4), ('dropout', 8), ('classifier', 8)),
        *(('zero', 2), ('zero', 8), ('zero sgd', 4)),
    ],
)
def test_sharded_step_equals_single_device_reference(
    trainer: Callable[[str, int], Trainer],
    batches: list[dict[str, np.ndarray]],
    reference: Callable[[str], tuple[Any, list[dict[str, float]]]],
    variant: str,
    devices: int,
) -> None:
    ours = trainer(variant, devices)
    state, rows = run(ours, batches)
    params, facts = reference(variant)
    assert all(fact['grad_norm'] > ours.config.clip_norm for fact in facts)
    for name in facts[0]:
        np.testing.assert_allclose(rows[name], [fact[name] for fact in facts], rtol=1e-5)

    def compare(found: jax.Array, expected: np.ndarray, before: jax.Array) -> None:
        moved = float(np.abs(expected - before).max())
        assert moved > 0
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * moved)

    jax.tree.map(compare, state.params, params, ours.start().params)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['dropout', 'zero'])
def test_sub_meshes_of_one_process_give_the_same_bits(
    trainer: Callable[[str, int], Trainer], batches: list[dict[str, np.ndarray]], variant: str
) -> None:
    """A first look only: layouts share a thread pool here; separate processes are the proof."""
    runs = [run(trainer(variant, devices), batches) for devices in (1, 2, 4, 8)]
    assert len({state_fingerprint(state) for state, _ in runs}) == 1
    assert len({rows.tobytes() for _, rows in runs}) == 1


def test_row_says_what_the_step_did(
    trainer: Callable[[str, int], Trainer], batches: list[dict[str, np.ndarray]]
) -> None:
    ours = trainer('adamw', 8)
    names = ('step', 'batch', 'keys', 'parameters', 'grad_norm', *SUM_NAMES)
    assert tuple(row_columns(SUM_NAMES)) == names
    assert tuple(row_columns(tuple(reversed(SUM_NAMES)))) == names
    state, rows = run(ours, batches[:2])
    assert rows['step'].tolist() == [1, 2]
    assert rows['parameters'][-1] == jax.jit(fingerprint)(state.params)
    other = dict(batches[0], labels=(batches[0]['labels'] + 1) % 3)
    _, again = run(ours, [other, batches[0]])
    assert again['batch'][0] != rows['batch'][0]
    assert again['batch'][1] == rows['batch'][0]
    assert again['keys'].tolist() == rows['keys'].tolist()
    assert len({*rows['keys'], *rows['batch']}) == 4
    exchanged = {name: np.roll(x, ROWS // SHARDS, axis=0) for name, x in batches[0].items()}
    _, moved = run(ours, [exchanged])
    assert moved['batch'][0] != rows['batch'][0]
    assert again['loss'][0] != rows['loss'][0]


@pytest.mark.parametrize('devices', [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_sharded_optimizer_state_is_one_slice_for_each_shard(
    trainer: Callable[[str, int], Trainer], batches: list[dict[str, np.ndarray]], devices: int
) -> None:
    ours = trainer('zero', devices)
    state, _ = run(ours, batches[:1])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert any(leaf.any(axis=1).all() for leaf in moments)
    for leaf, parameter in zip(moments, 2 * jax.tree.leaves(state.params), strict=True):
        assert leaf.shape[0] == SHARDS
        assert leaf.addressable_shards[0].data.shape[0] == SHARDS // devices
        assert not leaf.reshape(-1)[parameter.size :].any()


@pytest.mark.parametrize('variant', ['adamw', 'zero'])
def test_state_is_donated(
    trainer: Callable[[str, int], Trainer], batches: list[dict[str, np.ndarray]], variant: str
) -> None:
    ours = trainer(variant, 8)
    before = ours.start()
    after, _ = ours.step(before, ours.layout.put(batches[0]))
    donated = before if variant == 'adamw' else before.params
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    for leaf in jax.tree.leaves(before.opt_state):
        with pytest.raises(RuntimeError, match='deleted'):
            np.asarray(leaf)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize('variant', ['adamw', 'sgd', 'zero'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_step_that_is_not_finite_counts_and_changes_nothing_else(
    trainer: Callable[[str, int], Trainer],
    batches: list[dict[str, np.ndarray]],
    variant: str,
    bad: float,
) -> None:
    ours = trainer(variant, 8)
    state, _ = run(ours, batches[:2])
    before = jax.device_get((state.params, state.opt_state))
    weights = np.where(np.arange(ROWS) == 3, bad, batches[2]['weights']).astype(np.float32)
    state, _ = ours.step(state, ours.layout.put(batches[2] | {'weights': weights}))
    assert int(state.step) == 3
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old, new, strict=True),
        before,
        jax.device_get((state.params, state.opt_state)),
    )
    assert updates_made(state.opt_state) == 2


def test_step_is_finite_to_update_and_ledger_only_if_loss_and_gradient_are() -> None:
    for squares, loss in ((4, 1), (np.nan, 1), (np.inf, 1), (4, np.nan), (4, np.inf)):
        sums = {'weight': jnp.float32(2), 'loss': jnp.float32(loss)}
        norm, finite = norm_and_finite(jnp.float32(squares), sums)
        row = make_row(jnp.int32(1), 3 * [jnp.uint32(0)], norm, dict.fromkeys(SUM_NAMES, loss))
        assert bool(finite) == bool(is_finite(row_of(row))) == (squares + loss == 5)


def test_update_writes_over_the_state_and_copies_no_array(layout: MakeLayout) -> None:
    """Copies made the update ten times slower than it has to be."""
    for config in (ADAMW, SGD):
        optimizer = make_optimizer(config, STEPS)
        create = make_create_state(lambda _: {'kernel': jnp.ones((512, 512))}, optimizer, layout(1))
        state = create(keys.root_keys(0, 'threefry2x32'))
        sums = dict.fromkeys(SUM_NAMES, jnp.float32(1))
        update = make_update(optimizer, config.clip_norm, layout(1))
        compiled = update.lower(state, state.params, sums, jnp.zeros(2, jnp.uint32)).compile()
        # An eighth of an array is temporary: what the norm and the fingerprint reduce.
        assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * state.params['kernel'].nbytes
        assert not re.search(r'f32\[512,512\]\S* copy\(', compiled.as_text())


def test_norm_counts_every_value_of_the_gradient_once() -> None:
    """Of any size: small whole numbers add up exactly, in any order."""
    rng = np.random.default_rng(0)
    trees = [
        [rng.integers(1, 9, shape).astype(np.float32) for shape in shapes]
        for shapes in ([()], [(7,)], [(8,), (9,)], [(3, 5), (64,), (2, 1, 41)])
    ]
    found = jax.jit(lambda trees: [sum_of_squares(tree) for tree in trees])(trees)
    assert found == [sum(float(np.sum(leaf**2)) for leaf in tree) for tree in trees]


def test_loop_makes_no_implicit_transfers(
    trainer: Callable[[str, int], Trainer], batches: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    ours = trainer('adamw', 8)
    state, ledger = ours.start(), Ledger(epath.Path(tmp_path), row_columns(SUM_NAMES), 0)
    finished = []
    with jax.transfer_guard('disallow'):
        for batch in batches:
            state, row = ours.step(state, ours.layout.put(batch))
            finished += ledger.add(row)
        finished += ledger.drain()
    assert [row['step'] for row in finished] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_zero_gradient_step_shrinks_weights_and_leaves_biases(
    layout: MakeLayout, name: str
) -> None:
    config = OptimizerConfig(name, 0.5, 'constant', weight_decay=0.25)
    start = {
        'kernel': np.array([[1.0, -2.0]]),
        'bias': np.array([3.0, 0.0]),
        'scale': np.array(4.0),
    }
    optimizer = make_optimizer(config, STEPS)

    def loss_sums(params: Any, batch: Any, rngs: Any, _: Any) -> dict[str, jax.Array]:
        zero = sum(0.0 * leaf.sum() for leaf in jax.tree.leaves(params))
        return {'loss': zero, 'weight': batch['weights'].sum()}

    create = make_create_state(lambda _: jax.tree.map(jnp.float32, start), optimizer, layout(8))
    state = create(keys.root_keys(0, 'threefry2x32'))
    step = make_train_step(loss_sums, optimizer, config.clip_norm, layout(8))
    state, _ = step(state, layout(8).put({'weights': np.ones(8, np.float32)}))
    expected = start | {'kernel': start['kernel'] * (1 - 0.5 * 0.25)}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), expected)


def test_schedules_start_at_zero_reach_the_peak_and_end_where_they_should() -> None:
    def rates(steps: list[int], **fields: Any) -> list[float]:
        schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **fields), 100)
        return [float(schedule(step)) for step in steps]

    assert rates([0, 50, 100, 200]) == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert rates([0, 5, 10, 55, 100], warmup_steps=10) == pytest.approx([0, 1, 2, 1, 0])
    # A schedule of its own length does not follow num_steps, so a run may be prolonged.
    assert rates([0, 20, 40, 100], decay_steps=40) == pytest.approx([2, 1, 0, 0])
    assert rates([0, 10**6], schedule='constant') == [2, 2]
    found = rates([0, 5, 10, 10**6], schedule='constant', warmup_steps=10)
    assert found == pytest.approx([0, 1, 2, 2])


def test_train_step_compiles_once_per_bucket(
    layout: MakeLayout, random_texts: Callable[..., LabelledTexts], caplog: pytest.LogCaptureFixture
) -> None:
    """And the update and the evaluation once, and nothing else, over epochs and evaluations."""
    texts, held_out = random_texts(50, 14), random_texts(17, 14, seed=8)
    buckets = (5, 9, 14)
    assert held_out.lengths[16] <= 5 < held_out.lengths.max()  # a last batch that fits in less
    data = DataConfig(bucket_lengths=buckets, window_batches=4)
    config = Config(num_steps=24, batch_size=16, eval_batch_size=8, data=data, model=ModelConfig())
    ours = make_trainer(BagOfWords(), ADAMW, layout(8))
    evaluate = make_evaluate(
        classification.classifier_sums(ours.model),
        classification.classifier_metrics,
        ours.layout,
        lambda: eval_batches(held_out, config, slice(0, 8)),
    )
    state, widths = ours.start(), set()
    epoch_seed = functools.partial(keys.epoch_seed, keys.local_copy(state.root_keys))
    epoch_seed(0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for step, batch in enumerate(train_batches(texts, config, epoch_seed, slice(0, 16), 0)):
            widths.add(batch['token_ids'].shape[1])
            state, _ = ours.step(state, ours.layout.put(batch))
            if step % 8 == 0:
                evaluate(state.params)
    compiled = re.findall(r'Compiling (?:jit\()?(\w+)', caplog.text)
    assert widths == set(buckets)
    assert collections.Counter(compiled) == {'device_gradient': 3, 'update': 1, 'device_sums': 1}


@pytest.mark.parametrize('devices', [1, 8])
def test_evaluation_is_the_mean_over_all_examples(
    layout: MakeLayout, random_texts: Callable[..., LabelledTexts], devices: int
) -> None:
    texts, model = random_texts(21, 14), BagOfWords()
    config = Config(eval_batch_size=8, data=DataConfig(bucket_lengths=(9, 14)), model=ModelConfig())
    params = jax.jit(classification.classifier_init(model))(jax.random.key(0))
    evaluate = make_evaluate(
        classification.classifier_sums(model),
        classification.classifier_metrics,
        layout(devices),
        lambda: eval_batches(texts, config, slice(0, 8)),
    )
    _, _, logits = gradient_of_rows(model, params, texts.batch(np.arange(21), 14), None)
    texts.labels[20] = np.argmax(logits[20])  # padding repeats this row: it must not count again
    batch = texts.batch(np.arange(21), 14)
    _, loss, _ = gradient_of_rows(model, params, batch, None)
    right = np.argmax(logits, axis=1) == batch['labels']
    expected = {'loss': float(loss) / 21, 'accuracy': float(right.mean())}
    found = evaluate(jax.device_put(params, layout(devices).replicated))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_evaluation_counts_exactly_beyond_the_whole_numbers_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, 'make_eval_step', lambda *_: lambda _, batch: batch)
    place: Any = types.SimpleNamespace(put=lambda batch: batch)
    batches: Any = [{'weight': np.float32(count)} for count in (2**24, 1, 1)]
    totals = evaluation.make_totals(lambda *_: {}, place, lambda: iter(batches))
    assert totals({})['weight'] == 2**24 + 2
