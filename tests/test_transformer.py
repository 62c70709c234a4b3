"""The promises of model/transformer.py: its masks and bits are those of any other model here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from configs.schema import Config, OptimizerConfig
from errors import UserError
from input_pipeline.vocabulary import FIRST_WORD, UNK
from model.transformer import Transformer
from tasks import classification
from tasks.classification import DataConfig, ModelConfig
from tests.parameters import random_params
from training import keys
from training.mesh import Layout
from training.optimizer import make_optimizer
from training.state import make_create_state, state_fingerprint
from training.step import make_train_step

TokenBatch = Callable[..., dict[str, np.ndarray]]
ROWS, WIDTH, VOCAB_SIZE = 16, 12, 30
SIZES = {'hidden_size': 16, 'num_layers': 2, 'num_heads': 4, 'num_positions': 24}


def transformer(norm: str = 'pre', rate: float = 0.0, **fields: Any) -> Transformer:
    """Returns a tiny Transformer, with dropout everywhere or nowhere."""
    rates = dict.fromkeys(('word_dropout', 'embedding_dropout', 'dropout'), rate)
    ids = {'unk_id': UNK, 'first_word_id': FIRST_WORD}
    sizes = {'vocab_size': VOCAB_SIZE, 'num_classes': 3} | SIZES
    return Transformer(norm=norm, **(sizes | ids | rates | fields))


def start(model: Transformer) -> Any:
    """Returns parameters of its shapes."""
    return random_params(classification.classifier_init(model))


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Transformer, params: Any, ids: Any, lengths: Any) -> jax.Array:
    """What the model says in evaluation, without any key."""
    return jnp.asarray(model.apply({'params': params}, ids, lengths, train=False))


@functools.partial(jax.jit, static_argnums=0)
def gradient(model: Transformer, params: Any, batch: Any) -> Any:
    """The loss and its gradient in training."""
    rngs = keys.shard_rngs(keys.root_keys(1, 'threefry2x32'), 0, 0)
    sums = classification.classifier_sums(model)
    return jax.value_and_grad(lambda params: sums(params, batch, rngs)['loss'])(params)


def other_padding(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with arbitrary ids where padding was."""
    noise = np.random.default_rng(3).integers(0, VOCAB_SIZE, batch['token_ids'].shape, np.int32)
    real = np.arange(WIDTH) < batch['lengths'][:, None]
    return batch | {'token_ids': np.where(real, batch['token_ids'], noise)}


@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_what_stands_in_padding_does_not_change_a_bit_of_logits_or_of_training(
    token_batch: TokenBatch, norm: str
) -> None:
    model, batch = transformer(norm, 0.3), token_batch(ROWS, WIDTH)
    params, noisy = start(model), other_padding(batch)
    one, other = (logits(model, params, b['token_ids'], b['lengths']) for b in (batch, noisy))
    np.testing.assert_array_equal(one, other)
    model = transformer(norm, 0.3, num_layers=1)  # compiles in half the time
    params = start(model)
    one, other = (gradient(model, params, b) for b in (batch, noisy))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_longer_bucket_changes_logits_by_rounding_only(token_batch: TokenBatch) -> None:
    model, batch = transformer(), token_batch(ROWS, WIDTH)
    params = start(model)
    short = logits(model, params, batch['token_ids'], batch['lengths'])
    wide = np.pad(batch['token_ids'], ((0, 0), (0, 9)))
    np.testing.assert_allclose(logits(model, params, wide, batch['lengths']), short, atol=1e-5)


def test_words_are_read_in_their_order_and_an_empty_row_is_finite(token_batch: TokenBatch) -> None:
    model, batch = transformer(), token_batch(ROWS, WIDTH)
    params, lengths = start(model), np.full(ROWS, WIDTH, np.int32)
    one = logits(model, params, batch['token_ids'], lengths)
    other = logits(model, params, batch['token_ids'][:, ::-1], lengths)
    assert np.abs(one - other).max() > 1e-3
    assert np.isfinite(logits(model, params, batch['token_ids'], 0 * lengths)).all()


def test_every_dropout_draws_a_mask_of_its_own(
    token_batch: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's dropouts: embedding; in each layer attention and both branches; and the head."""
    drawn: dict[tuple[Any, ...], jax.Array] = {}
    make_rng = transformer().make_rng.__func__  # type: ignore[attr-defined]

    def recorded(module: Any, name: str) -> jax.Array:
        key = make_rng(module, name)
        assert module.path not in drawn
        drawn[module.path] = jax.random.key_data(key)
        return key

    batch = token_batch(ROWS, WIDTH)
    model, params = transformer(rate=0.3), start(transformer())
    monkeypatch.setattr('flax.linen.Module.make_rng', recorded)
    inputs = batch['token_ids'], batch['lengths']

    @functools.partial(jax.jit, static_argnums=0)
    def words_of_keys(train: bool, key: jax.Array) -> dict[tuple[Any, ...], jax.Array]:
        drawn.clear()
        model.apply({'params': params}, *inputs, train=train, rngs={'dropout': key})
        return dict(drawn)

    found = words_of_keys(True, jax.random.key(2))
    inner = ('attention_dropout', 'mixed_dropout', 'outer_dropout')
    assert set(found) == {
        *(('word_dropout',), ('embedding_dropout',), ('mean_dropout',)),
        *((f'layer_{layer}', name) for layer in range(2) for name in inner),
    }
    assert len({np.asarray(words).tobytes() for words in found.values()}) == len(found)
    assert not words_of_keys(False, jax.random.key(2))


def test_remat_keeps_less_for_the_backward_pass_and_changes_no_mask(
    token_batch: TokenBatch,
) -> None:
    """Counts what the backward pass is given: XLA for CPUs recomputes early, and saves nothing."""
    batch, found, kept = token_batch(ROWS, WIDTH), {}, {}
    for remat in (False, True):
        model = transformer('post', 0.3, num_layers=1, remat=remat)
        params = start(model)
        sums = classification.classifier_sums(model)
        rngs = keys.shard_rngs(keys.root_keys(1, 'threefry2x32'), 0, 0)

        def backward(params: Any, sums: Any = sums, rngs: Any = rngs) -> Any:
            return jax.vjp(lambda params: sums(params, batch, rngs)['loss'], params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, params))
        kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)
        found[remat] = gradient(model, params, batch)
    np.testing.assert_array_equal(found[True][0], found[False][0])  # the loss, by the same masks
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found[True], found[False])
    assert kept[True] < 0.5 * kept[False]


def test_bfloat16_is_for_activations_alone(token_batch: TokenBatch) -> None:
    batch, params = token_batch(ROWS, WIDTH), start(transformer(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    inputs = params, batch['token_ids'], batch['lengths']
    exact, rounded = (
        logits(transformer(dtype=dtype), *inputs) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.float32
    assert (rounded != exact).any()
    np.testing.assert_allclose(rounded, exact, atol=0.05)


@pytest.mark.long
@pytest.mark.parametrize('norm', ['post', 'pre'])
@pytest.mark.parametrize('small', [False, True], ids=['float32', 'bfloat16 zero remat'])
def test_same_bits_on_1_2_4_8_devices_with_attention_dropout(
    layout: Callable[..., Layout], token_batch: TokenBatch, norm: str, small: bool
) -> None:
    model = transformer(norm, 0.2, dtype=jnp.bfloat16 if small else jnp.float32, remat=small)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=0.5, shard_state=small)
    batches = [token_batch(32, WIDTH, seed) for seed in range(3)]
    found = set()
    for devices in (1, 2, 4, 8):
        on = dataclasses.replace(layout(devices), shard_state=small)
        optimizer = make_optimizer(config, 3)
        init = classification.classifier_init(model)
        state = make_create_state(init, optimizer, on)(keys.root_keys(0, 'threefry2x32'))
        sums = classification.classifier_sums(model)
        step = make_train_step(sums, optimizer, config.clip_norm, on)
        rows = []
        for batch in batches:
            state, row = step(state, on.put(batch))
            rows.append(np.asarray(row).tobytes())
        found.add((state_fingerprint(state), b''.join(rows)))
    assert len(found) == 1


@pytest.mark.parametrize(
    ('model', 'data', 'expected'),
    [
        ({'num_heads': 3}, {}, 'config.model.num_heads = 3: expected a divisor of config.model.hi'),
        ({'num_positions': 8}, {}, 'config.model.num_positions = 8: expected at least the longest'),
        ({}, {'affixes': (4, 3)}, r'config.data.affixes: expected \(\), since a Transf'),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(
    model: dict[str, Any], data: dict[str, Any], expected: str
) -> None:
    data_config = DataConfig(num_train=20, num_eval=10, **data)
    config = Config(data=data_config, model=ModelConfig(encoder='transformer', **model))
    with pytest.raises(UserError, match=expected):
        tasks.make_task(config)
