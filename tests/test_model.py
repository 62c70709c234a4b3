"""The promises of model/classifier.py."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import Config
from input_pipeline.encoded import LabelledTexts
from input_pipeline.vocabulary import BOS, EOS, FIRST_WORD, PAD, UNK, Vocabulary
from model.classifier import KeysOnlyAttention, TextClassifier
from model.dropout import WordDropout
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from tests.parameters import random_params
from training import keys

Classifier = Callable[..., TextClassifier]
TokenBatch = Callable[..., dict[str, np.ndarray]]
ROWS, WIDTH = 16, 12


@pytest.fixture(scope='module')
def params(classifier: Classifier) -> Any:
    """Parameters of the tiny classifier."""
    return random_params(classification.classifier_init(classifier()))


@functools.partial(jax.jit, static_argnums=0)
def logits(model: TextClassifier, params: Any, ids: Any, lengths: Any) -> jax.Array:
    """What the model says in evaluation, without any key."""
    return jnp.asarray(model.apply({'params': params}, ids, lengths, train=False))


def other_padding(batch: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """The token ids with arbitrary ids where padding was."""
    ids = batch['token_ids']
    noise = np.random.default_rng(seed).integers(0, 30, ids.shape, np.int32)
    return np.where(np.arange(ids.shape[1]) < batch['lengths'][:, None], ids, noise)


def test_word_dropout_never_touches_padding_or_marks() -> None:
    ids = np.tile(np.arange(30, dtype=np.int32), (200, 1))
    layer = WordDropout(0.5, UNK, FIRST_WORD)
    drop = jax.jit(lambda key: layer.apply({}, ids, deterministic=False, rngs={'dropout': key}))
    dropped = np.asarray(drop(jax.random.key(1)))
    for special in (PAD, UNK, BOS, EOS):
        assert (dropped[:, special] == special).all()
    words = dropped[:, FIRST_WORD:]
    assert ((words == ids[:, FIRST_WORD:]) | (words == UNK)).all()
    assert (words == UNK).any(axis=0).all()
    assert dropped.dtype == np.int32


def test_word_dropout_is_the_identity_in_evaluation_and_at_rate_zero() -> None:
    ids = jnp.tile(jnp.arange(30, dtype=jnp.int32), (5, 1))
    evaluation = WordDropout(0.5, UNK, FIRST_WORD).apply({}, ids, deterministic=True)
    no_rate = WordDropout(0.0, UNK, FIRST_WORD).apply({}, ids, deterministic=False)
    np.testing.assert_array_equal(evaluation, ids)
    np.testing.assert_array_equal(no_rate, ids)


def test_what_stands_in_padding_does_not_change_a_bit_of_logits(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    model, batch = classifier(), token_batch(ROWS, WIDTH)
    expected = logits(model, params, batch['token_ids'], batch['lengths'])
    for seed in range(2):
        ids = other_padding(batch, seed)
        assert (ids != batch['token_ids']).any()
        np.testing.assert_array_equal(logits(model, params, ids, batch['lengths']), expected)


def test_what_stands_in_padding_does_not_change_a_bit_of_training(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    model = classifier(word_dropout=0.3, embedding_dropout=0.3, dropout=0.3)
    rngs = keys.shard_rngs(keys.root_keys(0, 'threefry2x32'), 0, 0)
    sums = classification.classifier_sums(model)
    gradient = jax.jit(jax.grad(lambda params, batch: sums(params, batch, rngs)['loss']))
    batch = token_batch(ROWS, WIDTH)
    expected = gradient(params, batch)
    found = gradient(params, batch | {'token_ids': other_padding(batch, 0)})
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_longer_bucket_changes_logits_by_rounding_only(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    model, batch = classifier(), token_batch(ROWS, WIDTH)
    short = logits(model, params, batch['token_ids'], batch['lengths'])
    wide = np.pad(batch['token_ids'], ((0, 0), (0, 9)))
    long = logits(model, params, wide, batch['lengths'])
    np.testing.assert_allclose(long, short, rtol=1e-5, atol=1e-6)


def test_attention_is_zero_on_padding_and_sums_to_one() -> None:
    words = np.random.default_rng(0).normal(size=(4, WIDTH, 16)).astype(np.float32)
    mask = np.arange(WIDTH) < np.array([1, 2, 7, WIDTH])[:, None]
    layer = KeysOnlyAttention(8, jnp.float32)
    weights = np.asarray(
        jax.jit(layer.apply)(random_params(lambda key: layer.init(key, words, mask)), words, mask)
    )
    assert weights.dtype == jnp.float32
    assert (weights[~mask] == 0.0).all()
    assert (weights[mask] > 0.0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)


def test_the_shortest_rows_give_finite_logits(classifier: Classifier, params: Any) -> None:
    ids = np.full((ROWS, WIDTH), PAD, np.int32)
    ids[1:, :2] = BOS, EOS
    lengths = np.full(ROWS, 2, np.int32)
    lengths[0] = 0
    assert np.isfinite(logits(classifier(), params, ids, lengths)).all()


@pytest.mark.parametrize('num_classes', [2, 5])
def test_any_number_of_classes(classifier: Classifier, num_classes: int) -> None:
    model = classifier(num_classes=num_classes)
    params = jax.eval_shape(classification.classifier_init(model), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((3, WIDTH), jnp.int32)
    lengths = jax.ShapeDtypeStruct((3,), jnp.int32)
    found = jax.eval_shape(
        lambda p, ids, lengths: model.apply({'params': p}, ids, lengths, train=False),
        params, ids, lengths,
    )  # fmt: skip
    assert (found.shape, found.dtype) == ((3, num_classes), jnp.float32)


def test_the_sst2_model_has_the_parameters_of_its_reference(classifier: Classifier) -> None:
    """flax's example has 5,460,548 with one logit; ours has one logit of 256 weights more."""
    model = classifier(vocab_size=13_523, num_classes=2, embedding_size=300, hidden_size=256)
    params = jax.eval_shape(classification.classifier_init(model), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 5_460_548 + 256


def test_evaluation_draws_nothing(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    model = classifier(word_dropout=0.5, embedding_dropout=0.5, dropout=0.5)
    batch = token_batch(ROWS, WIDTH)
    program = jax.make_jaxpr(
        lambda params: classification.classifier_sums(model)(params, batch, None)
    )(params)
    assert 'random_bits' not in str(program)
    expected = logits(classifier(), params, batch['token_ids'], batch['lengths'])
    found = logits(model, params, batch['token_ids'], batch['lengths'])
    np.testing.assert_array_equal(found, expected)


def test_bfloat16_is_for_activations_alone(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    model, batch = classifier(dtype=jnp.bfloat16), token_batch(ROWS, WIDTH)
    shapes = jax.eval_shape(classification.classifier_init(model), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
    exact = logits(classifier(), params, batch['token_ids'], batch['lengths'])
    rounded = logits(model, params, batch['token_ids'], batch['lengths'])
    assert rounded.dtype == jnp.float32
    assert (rounded != exact).any()
    np.testing.assert_allclose(rounded, exact, atol=0.03)


def test_loss_sums_add_over_rows_and_follow_their_weights(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    loss_sums = classification.classifier_sums(classifier())
    sums = jax.jit(lambda batch: loss_sums(params, batch, None))
    batch = token_batch(ROWS, WIDTH)
    whole = sums(batch)
    # The same shapes thrice: rows without weight do not count.
    first = sums(batch | {'weights': batch['weights'] * (np.arange(ROWS) < 5)})
    rest = sums(batch | {'weights': batch['weights'] * (np.arange(ROWS) >= 5)})
    for name, value in whole.items():
        np.testing.assert_allclose(first[name] + rest[name], value, rtol=1e-5)
    assert whole['tokens'] == batch['lengths'][batch['weights'] > 0].sum()
    assert whole['weight'] == pytest.approx(float(batch['weights'].sum()), rel=1e-5)


def test_label_smoothing_spreads_a_part_of_the_target_in_training_alone(
    classifier: Classifier, params: Any, token_batch: TokenBatch
) -> None:
    batch = token_batch(ROWS, WIDTH)
    found = logits(classifier(), params, batch['token_ids'], batch['lengths'])
    log_p = np.asarray(jax.nn.log_softmax(found))
    right = np.take_along_axis(log_p, batch['labels'][:, None], 1)[:, 0]

    @jax.jit
    def losses(params: Any) -> list[jax.Array]:
        variants = (classification.classifier_sums(classifier(), s) for s in (0.0, 0.3))
        return [sums(params, batch)['loss'] for sums in variants]

    for smoothing, loss in zip((0.0, 0.3), losses(params), strict=True):
        expected = -(1 - smoothing) * right - smoothing * np.mean(log_p, axis=1)
        np.testing.assert_allclose(loss, batch['weights'] @ expected, rtol=1e-5)
    data = DataConfig(num_train=200, num_eval=20)
    smoothed = ModelConfig(embedding_size=8, hidden_size=8, label_smoothing=0.3)
    task = classification.make_task(Config(data=data, model=smoothed))
    plain = classification.make_task(
        Config(data=data, model=ModelConfig(embedding_size=8, hidden_size=8))
    )
    rows, start = task.train.batch(np.arange(4), 48), random_params(task.init)
    one, other = (jax.jit(made.eval_sums)(start, rows)['loss'] for made in (task, plain))
    np.testing.assert_array_equal(one, other)


def test_unknown_words_differ_by_their_affixes_and_word_dropout_leaves_these(
    classifier: Classifier,
) -> None:
    affixes = [
        Vocabulary(['un', 're'], letters=slice(2)),
        Vocabulary(['ny'], letters=slice(-2, None)),
    ]
    texts = LabelledTexts(['unfunny', 'refunny', 'xx'], np.zeros(3), Vocabulary([]), 3, affixes)
    batch = texts.batch(np.arange(3), 3)
    first = FIRST_WORD
    np.testing.assert_array_equal(batch['token_ids'][:, 1], UNK)
    np.testing.assert_array_equal(
        batch['affix_ids'][:, 1], [[first, first], [first + 1, first], [UNK, UNK]]
    )
    model = classifier(affix_sizes=(6, 5), word_dropout=0.9)
    params = random_params(classification.classifier_init(model, 2))
    rows = classification.inputs(batch)

    @jax.jit
    def in_evaluation_and_training(params: Any, key: jax.Array) -> list[jax.Array]:
        apply = functools.partial(model.apply, {'params': params}, **rows)
        return [apply(train=False), apply(train=True, rngs={'dropout': key})]

    for found in in_evaluation_and_training(params, jax.random.key(1)):
        assert len(np.unique(np.asarray(found), axis=0)) == 3


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.long)])
def test_remat_saves_memory_and_changes_no_parameter_and_no_mask(
    classifier: Classifier, token_batch: TokenBatch, dtype: Any
) -> None:
    batch, found = token_batch(ROWS, 40), {}
    for remat in (False, True):
        model = classifier(word_dropout=0.2, dropout=0.3, hidden_size=16, remat=remat, dtype=dtype)
        params = jax.jit(classification.classifier_init(model))(jax.random.key(0))
        sums = classification.classifier_sums(model)

        def loss(params: Any, sums: Any = sums) -> Any:
            return sums(params, batch, keys.shard_rngs(keys.root_keys(1, 'threefry2x32'), 0, 0))[
                'loss'
            ]

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        memory = program.memory_analysis().temp_size_in_bytes
        found[remat] = (params, *program(params), memory)
    (params, value, grads, memory), (params_, value_, grads_, memory_) = found.values()
    jax.tree.map(np.testing.assert_array_equal, params, params_)
    np.testing.assert_array_equal(value, value_)  # other masks would give another loss
    rounding = 1e-4 if dtype == jnp.float32 else 0.02
    close = functools.partial(np.testing.assert_allclose, rtol=rounding, atol=rounding)
    jax.tree.map(close, grads, grads_)
    if dtype == jnp.float32:  # XLA for CPUs computes bfloat16 in copies
        assert memory_ < 0.9 * memory
