"""The promises of the sequence-to-sequence task: its streams, its causality, its figures."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import train
from configs import addition as addition_config
from configs.schema import Config
from errors import UserError
from input_pipeline import addition
from input_pipeline.pairs import EncodedPairs, Pairs, encode_sources
from input_pipeline.vocabulary import BOS, EOS, FIRST_WORD, PAD, UNK, Vocabulary
from model.seq2seq import Seq2Seq
from tasks import make_task, seq2seq
from tasks.classification import DataConfig
from tasks.seq2seq import DataConfig as PairsConfig
from tasks.seq2seq import ModelConfig as Seq2SeqConfig
from tests.parameters import random_params
from training import keys
from training.mesh import Layout
from training.step import make_eval_step, make_gradient

VOCAB, ROWS, WIDTH = 20, 16, 9
UNITS = Vocabulary([str(n) for n in range(FIRST_WORD, VOCAB)])
Variables = dict[str, Any]


def small_config(**top: Any) -> Config:
    """A tiny addition run that draws everything that can be drawn."""
    config = dataclasses.replace(
        addition_config.get_config(),
        num_steps=8,
        num_shards=8,
        batch_size=16,
        eval_batch_size=64,
        eval_every=4,
        checkpoint_every=4,
        log_every=4,
        data=PairsConfig(num_train=300, num_eval=70, bucket_lengths=(6, 7), window_batches=8),
        model=Seq2SeqConfig(
            embedding_size=8,
            hidden_size=8,
            word_dropout=0.1,
            embedding_dropout=0.1,
            dropout=0.2,
            forcing='linear',
            forcing_floor=0.2,
            forcing_steps=5,
        ),
    )
    return dataclasses.replace(config, **top)


def make_model(**fields: Any) -> Seq2Seq:
    """A tiny model, without dropout unless a rate is given."""
    return seq2seq.make_model(
        Seq2SeqConfig(embedding_size=8, hidden_size=8, **fields), UNITS, UNITS
    )


def make_variables(model: Seq2Seq, scale: float = 8.0) -> Variables:
    """Parameters so large that predictions differ from row to row."""
    params = random_params(seq2seq.seq2seq_init(model))
    return {'params': jax.tree.map(lambda leaf: scale * leaf, params)}


def make_batch(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Random pairs of all lengths, with unequal weights."""
    rng = np.random.default_rng(seed)

    def side() -> tuple[np.ndarray, np.ndarray]:
        lengths = rng.integers(1, width + 1, rows, np.int32)
        ids = rng.integers(FIRST_WORD, VOCAB, (rows, width), np.int32)
        position, end = np.arange(width), lengths[:, None] - 1
        ids = np.where(position < end, ids, np.where(position == end, EOS, PAD))
        return ids.astype(np.int32), lengths

    (sources, source_lengths), (targets, target_lengths) = side(), side()
    return {
        'sources': sources,
        'source_lengths': source_lengths,
        'targets': targets,
        'target_lengths': target_lengths,
        'weights': rng.uniform(0.1, 2.0, rows).astype(np.float32),
    }


@functools.partial(jax.jit, static_argnums=0)
def in_training(model: Seq2Seq, variables: Variables, *inputs: Any, rngs: Any) -> jax.Array:
    """The logits of a model in training."""
    return jnp.asarray(model.apply(variables, *inputs, train=True, rngs=rngs))


@functools.partial(jax.jit, static_argnames=('model', 'width'))
def greedy(
    model: Seq2Seq, variables: Variables, sources: Any, lengths: Any, width: int = WIDTH
) -> jax.Array:
    """What a model decodes greedily."""
    return jnp.asarray(model.apply(variables, sources, lengths, width, method='greedy'))


def logits_of(
    model: Seq2Seq,
    variables: Variables,
    forcing: float | None,
    root: int = 0,
    dropout_root: int = 0,
    **batch: Any,
) -> jax.Array:
    """Training logits, with rngs of step 0 and shard 0; `batch` replaces some of its arrays.

    The roots are seeds of the root keys that either stream is taken from.
    """
    rows = make_batch() | batch
    sample, dropout = (
        keys.shard_rngs(keys.root_keys(seed, 'threefry2x32'), 0, 0) for seed in (root, dropout_root)
    )
    return in_training(
        model,
        variables,
        rows['sources'],
        rows['source_lengths'],
        rows['targets'],
        None if forcing is None else np.float32(forcing),
        rngs={'sample': sample['sample'], 'dropout': dropout['dropout']},
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two arrays have the same bits."""
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


# What the decoder may see


@pytest.mark.parametrize('forcing', [None, 1.0])
def test_decoder_cannot_see_the_future(forcing: float | None) -> None:
    """With a token of its own in each place, the gradient of logits t with respect to the row of
    the embedding that stands for token u is zero for u >= t, and it is not for u < t.
    """
    model = make_model()
    variables = make_variables(model, scale=2.0)
    targets = np.arange(FIRST_WORD, FIRST_WORD + WIDTH, dtype=np.int32)[None]
    sources = {'sources': targets, 'source_lengths': np.full(1, WIDTH)}

    def logit_sums(table: jax.Array) -> jax.Array:
        params = variables['params']
        decoder = params['decoder'] | {'embedding': {'embedding': table}}
        changed = {'params': params | {'decoder': decoder}}
        logits = logits_of(model, changed, forcing, targets=targets, **sources)
        return jnp.sum(logits * jnp.arange(1, VOCAB + 1), axis=(0, 2))

    table = variables['params']['decoder']['embedding']['embedding']
    gradient = np.asarray(jax.jit(jax.jacrev(logit_sums))(table))[
        :, FIRST_WORD : FIRST_WORD + WIDTH
    ]
    seen = np.any(gradient != 0, axis=2)  # [t, u]
    assert np.array_equal(seen, np.tri(WIDTH, k=-1, dtype=bool))


def test_padding_does_not_change_a_bit() -> None:
    model = make_model()
    variables, rows = make_variables(model, scale=2.0), make_batch()
    past = np.arange(WIDTH) >= rows['source_lengths'][:, None]
    other = np.where(past, 7, rows['sources'])
    assert equal(logits_of(model, variables, 1.0), logits_of(model, variables, 1.0, sources=other))
    wide = make_batch() | {'sources': np.pad(rows['sources'], ((0, 0), (0, 5)))}
    decoded = [
        greedy(model, variables, batch['sources'], batch['source_lengths'])
        for batch in (rows, wide)
    ]
    assert equal(*decoded)


# The SAMPLE stream


@pytest.mark.slow
def test_teacher_forced_logits_do_not_depend_on_the_sample_stream_and_free_running_ones_do() -> (
    None
):
    model = make_model()
    variables = make_variables(model)
    never = logits_of(model, variables, None)
    assert equal(never, logits_of(model, variables, 1.0, root=0))
    assert equal(never, logits_of(model, variables, 1.0, root=1))
    free = logits_of(model, variables, 0.0, root=0)
    assert equal(free, logits_of(model, variables, 0.0, root=0, dropout_root=1))
    assert not equal(free, logits_of(model, variables, 0.0, root=1))
    assert equal(free[:, 0], never[:, 0])  # there is nothing before the first token to sample


def test_free_running_logits_do_not_depend_on_the_targets() -> None:
    model = make_model()
    variables = make_variables(model)
    other = make_batch(seed=1)['targets']
    free = logits_of(model, variables, 0.0)
    assert equal(free, logits_of(model, variables, 0.0, targets=other))
    half = logits_of(model, variables, 0.5)
    assert not equal(half, logits_of(model, variables, 0.5, targets=other))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What was drawn by `categorical` and `bernoulli` on the SAMPLE stream: (key, values)."""
    seen: list[tuple[bytes, bytes]] = []

    def spy(real: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def draw(key: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            values = real(key, *args, **kwargs)
            shape = jax.ShapeDtypeStruct(values.shape, values.dtype)
            # Pure: flax's scan refuses an effect in its body since JAX 0.12.
            return jax.pure_callback(record, shape, jax.random.key_data(key), values)

        return draw

    def record(words: np.ndarray, values: np.ndarray) -> np.ndarray:
        seen.append((np.asarray(words).tobytes(), np.asarray(values).tobytes()))
        return values

    for name in ('categorical', 'bernoulli', 'bits'):
        monkeypatch.setattr(jax.random, name, spy(getattr(jax.random, name)))
    return seen


def draw_in_trainer(
    drawn: list[tuple[bytes, bytes]], layout: Layout, step: int, dropout: float = 0.0
) -> set[tuple[bytes, bytes]]:
    """All that the trainer's own step draws, from logits that say nothing."""
    config = Seq2SeqConfig(embedding_size=8, hidden_size=8, dropout=dropout, forcing_floor=0.5)
    model = seq2seq.make_model(config, UNITS, UNITS)
    sums = seq2seq.seq2seq_sums(model, seq2seq.forcing_schedule(config))
    params = jax.tree.map(jnp.zeros_like, make_variables(model)['params'])
    drawn.clear()
    gradient = make_gradient(sums, layout)
    args = jax.device_put(
        (params, keys.root_keys(0, 'threefry2x32'), jnp.int32(step)), layout.replicated
    )
    jax.block_until_ready(gradient(*args, layout.put(make_batch())))
    jax.effects_barrier()
    return set(drawn)


@pytest.mark.slow
def test_samples_differ_between_shards_and_steps_and_follow_the_root_key_on_any_device_count(
    drawn: list[tuple[bytes, bytes]], layout: Callable[..., Layout]
) -> None:
    first = draw_in_trainer(drawn, layout(1), step=0)
    assert len(drawn) == len(first) == 8 * WIDTH * 2  # shards, time steps, a coin and a token
    assert len({key for key, _ in first}) == len(first)
    rows = ROWS // 8  # each has a coin (one byte) and a token (four) of its own
    assert sorted({len(values) for _, values in first}) == [rows, 4 * rows]
    for devices in (2, 4, 8):
        assert draw_in_trainer(drawn, layout(devices), step=0) == first
    later = draw_in_trainer(drawn, layout(2), step=1)
    assert not {key for key, _ in first} & {key for key, _ in later}


@pytest.mark.slow
def test_samples_do_not_depend_on_dropout_being_on(
    drawn: list[tuple[bytes, bytes]], layout: Callable[..., Layout]
) -> None:
    plain = draw_in_trainer(drawn, layout(2), step=0)
    with_dropout = draw_in_trainer(drawn, layout(2), step=0, dropout=0.5)
    masks = with_dropout - plain  # drawn as raw bits: one for each shard and time step
    assert len({key for key, _ in masks}) == 8 * WIDTH
    assert plain <= with_dropout


def test_evaluation_draws_nothing(
    drawn: list[tuple[bytes, bytes]], layout: Callable[..., Layout]
) -> None:
    model = make_model(dropout=0.5, word_dropout=0.5, embedding_dropout=0.5)
    params = jax.device_put(make_variables(model)['params'], layout(2).replicated)
    step = make_eval_step(seq2seq.seq2seq_sums(model), layout(2))
    jax.block_until_ready(step(params, layout(2).put(make_batch())))
    jax.effects_barrier()
    assert not drawn


def test_teacher_forcing_falls_as_the_schedule_says() -> None:
    def at(step: int, **fields: Any) -> float:
        probability = seq2seq.forcing_schedule(Seq2SeqConfig(**fields))
        assert probability is not None
        return float(probability(jnp.int32(step)))

    assert seq2seq.forcing_schedule(Seq2SeqConfig(forcing='linear', forcing_floor=1.0)) is None
    assert at(0, forcing_floor=0.0) == at(9999, forcing_floor=0.0) == 0.0
    assert at(50, forcing_floor=0.3) == pytest.approx(0.3)
    linear = {'forcing': 'linear', 'forcing_floor': 0.25, 'forcing_steps': 100}
    assert [at(step, **linear) for step in (0, 50, 75, 1000)] == [1.0, 0.5, 0.25, 0.25]
    sigmoid = {'forcing': 'inverse_sigmoid', 'forcing_floor': 0.0, 'forcing_steps': 100}
    assert at(0, **sigmoid) == pytest.approx(100 / 101)
    assert at(round(100 * np.log(100)), **sigmoid) == pytest.approx(0.5, abs=0.01)
    assert at(10**6, **sigmoid) == 0.0


# Evaluation


def plain_greedy(params: Any, source: np.ndarray, width: int) -> list[int]:
    """One source without padding, in NumPy and float64, one number after the other."""

    def lstm(cell: Any, state: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> Any:
        def gate(name: str) -> np.ndarray:
            hidden = cell[f'h{name}']
            return np.asarray(
                x @ cell[f'i{name}']['kernel'] + state[1] @ hidden['kernel'] + hidden['bias']
            )

        def sigmoid(value: np.ndarray) -> np.ndarray:
            return np.asarray(1 / (1 + np.exp(-value)))

        c = sigmoid(gate('f')) * state[0] + sigmoid(gate('i')) * np.tanh(gate('g'))
        return c, sigmoid(gate('o')) * np.tanh(c)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    state = np.zeros(8), np.zeros(8)
    for token in source[::-1]:
        state = lstm(params['encoder']['cell'], state, params['embedding']['embedding'][token])
    decoder, token, decoded = params['decoder'], BOS, []
    while token != EOS and len(decoded) < width:
        state = lstm(decoder['lstm'], state, decoder['embedding']['embedding'][token])
        logits = state[1] @ decoder['logits']['kernel'] + decoder['logits']['bias']
        token = int(np.argmax(logits))
        decoded.append(token)
    return decoded + [PAD] * (width - len(decoded))


def test_greedy_decoding_equals_a_slow_plain_reference() -> None:
    model = make_model(dropout=0.5, word_dropout=0.5)
    params = make_variables(model)['params']
    bias = params['decoder']['logits']['bias']  # so that EOS comes, sooner or later
    params['decoder']['logits']['bias'] = bias.at[EOS].set(2.0).at[PAD].set(-100.0)
    rows = make_batch(rows=64)
    sources = rows['sources'], rows['source_lengths']
    decoded = np.asarray(greedy(model, {'params': params}, *sources))
    expected = [
        plain_greedy(params, source[:length], WIDTH)
        for source, length in zip(*sources, strict=True)
    ]
    ends = {row.index(EOS) if EOS in row else WIDTH for row in expected}
    assert len(ends) > 3
    assert len({tuple(row) for row in expected}) > 10
    assert decoded.tolist() == expected


@pytest.mark.slow
def test_exact_match_wants_the_whole_text_and_no_unknown_unit() -> None:
    model = make_model()
    params = make_variables(model)['params']
    params['decoder']['logits']['bias'] = jnp.zeros(VOCAB).at[UNK].set(-100.0)
    sums, rows = jax.jit(seq2seq.seq2seq_sums(model)), make_batch()
    sources = rows['sources'], rows['source_lengths']
    rows['targets'] = np.array(greedy(model, {'params': params}, *sources))
    total = float(sums(params, rows)['exact'])
    assert total == pytest.approx(float(rows['weights'].sum()))
    rows['targets'][3, 2] += 1
    assert float(sums(params, rows)['exact']) == pytest.approx(total - rows['weights'][3])
    params['decoder']['logits']['bias'] = jnp.zeros(VOCAB).at[UNK].set(1e6)
    rows['targets'][:] = UNK
    assert float(sums(params, rows)['exact']) == 0


def test_padding_and_rows_of_no_weight_count_nothing() -> None:
    rows = make_batch()
    logits = np.random.default_rng(5).normal(size=(ROWS, WIDTH, VOCAB)).astype(np.float32)
    token_sums = jax.jit(seq2seq.token_sums)
    sums = token_sums(logits, rows)
    real = np.arange(WIDTH) < rows['target_lengths'][:, None]
    logs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    losses = -np.take_along_axis(logs, rows['targets'][..., None], axis=2)[..., 0]
    weights = rows['weights'][:, None] * real
    assert float(sums['loss']) == pytest.approx(float((losses * weights).sum()), rel=1e-5)
    assert float(sums['weight']) == pytest.approx(float(weights.sum()), rel=1e-6)
    other = np.where(real[..., None], logits, 100.0)
    rows['weights'][5] = 0.0
    changed, before = other.copy(), token_sums(logits, rows)
    changed[5] = 50.0
    after = token_sums(changed, rows)
    assert all(equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_last_partial_batch_is_counted_exactly_and_each_shape_compiles_once(
    tmp_path: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(size: int) -> dict[str, float]:
        workdir = epath.Path(tmp_path / str(size))
        return dict(train.train(small_config(eval_batch_size=size), workdir)['eval'])

    jax.config.update('jax_log_compiles', True)
    try:
        with caplog.at_level(logging.WARNING):
            partial = run(64)  # 70 pairs: 64 and 6
    finally:
        jax.config.update('jax_log_compiles', False)
    compiled = [m for m in caplog.messages if m.startswith('Finished XLA compilation')]
    gradients = sum('device_gradient' in message for message in compiled)
    assert gradients == 2  # two buckets
    assert sum('device_sums' in message for message in compiled) == 1
    whole = run(72)
    assert whole['exact_match'] == partial['exact_match']
    assert whole['token_accuracy'] == partial['token_accuracy']
    assert whole['loss'] == pytest.approx(partial['loss'], rel=1e-6)


# Addition


@pytest.mark.parametrize('digits', [(1, 1), (1, 3), (2, 2), (2, 3)])
def test_every_pair_of_operands_comes_up_once(digits: tuple[int, int]) -> None:
    small, large = (10**n for n in digits)
    count = addition.num_pairs(small, large)
    order = [addition.shuffled(index, count, seed=1) for index in range(count)]
    assert sorted(order) == list(range(count))
    found = {tuple(sorted(addition.operands(index, small, large))) for index in range(count)}
    assert found == {(a, b) for a in range(small) for b in range(a, large)}


def test_addition_is_seeded_right_and_held_out_in_either_order() -> None:
    pairs = addition.make_additions((2, 2), 3000, 1500, split_seed=0, longest=7)
    assert pairs == addition.make_additions((2, 2), 3000, 1500, split_seed=0, longest=7)
    train_pairs, eval_pairs = pairs
    assert eval_pairs[7] == addition.pair((2, 2), 3007, 0)
    assert pairs != addition.make_additions((2, 2), 3000, 1500, split_seed=1, longest=7)
    for source, target in train_pairs:
        assert sum(map(int, source.split('+'))) == int(target)

    def operands(pairs: Pairs) -> set[frozenset[str]]:
        return {frozenset(source.split('+')) for source, _ in pairs}

    assert not operands(train_pairs) & operands(eval_pairs)
    ascending = [int(a) <= int(b) for a, b in (source.split('+') for source, _ in train_pairs)]
    assert 0.4 < np.mean(ascending) < 0.6


def test_addition_refuses_operands_too_large_for_the_field_and_more_pairs_than_there_are() -> None:
    with pytest.raises(UserError, match=r'bucket_lengths: the longest is 6, .* end mark need 7'):
        seq2seq.read_pairs(PairsConfig(bucket_lengths=(6,)))
    with pytest.raises(UserError, match='expected at most 55, which is all pairs of 1 and 1'):
        seq2seq.read_pairs(PairsConfig(operand_digits=(1, 1)))


# Pairs


def test_pairs_too_long_are_refused_or_cut_and_counted() -> None:
    pairs = [('ab', 'ab'), ('abcdef', 'a'), ('a', 'abcde')]
    letters = Vocabulary.of(['abcdef'], 1, list)
    with pytest.raises(UserError, match=r"2 of 3 pairs .* 'abcdef' -> 'a' needs 7"):
        EncodedPairs(pairs, letters, letters, max_length=5, cut=False)
    cut = EncodedPairs(pairs, letters, letters, max_length=5, cut=True)
    assert cut.num_truncated == 2
    batch = cut.batch(np.arange(3), 5)
    assert [letters.decode(ids) for ids in batch['sources']] == ['ab', 'abcd', 'a']
    assert [letters.decode(ids) for ids in batch['targets']] == ['ab', 'a', 'abcd']
    assert batch['source_lengths'].tolist() == [3, 5, 2]
    assert (batch['sources'] == EOS).sum(axis=1).tolist() == [1, 1, 1]


def test_words_and_characters_come_back_from_their_ids() -> None:
    words = Vocabulary.of(['the cat', 'the dog'], 1)
    letters = Vocabulary.of(['the cat', 'the dog'], 1, list)
    for vocabulary in (words, letters):
        assert vocabulary.decode(vocabulary.ids('the dog')) == 'the dog'
    assert words.decode(words.ids('the cow')) == 'the <unk>'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('1a+2', r"text 2, '1a\+2': 'a' is not in the vocabulary of the run"),
        ('123456+7', 'needs a width of 9, expected at most 7'),
        (' ', 'expected some text'),
    ],
)
def test_texts_that_can_not_be_predicted_from_are_named(text: str, message: str) -> None:
    vocabulary = Vocabulary(tuple('0123456789+'), list)
    sources, lengths = encode_sources(['1+2'], vocabulary, 7)
    assert sources.shape == (1, 7)
    assert lengths.tolist() == [4]
    with pytest.raises(UserError, match=message):
        encode_sources(['1+2', text], vocabulary, 7)


def test_text_to_predict_from_is_tokenized_once() -> None:
    units = mock.Mock(side_effect=list)
    sources, _ = encode_sources(['1+2', '3'], Vocabulary(tuple('0123456789+'), units), 7)
    assert [call.args for call in units.call_args_list] == [('1+2',), ('3',)]
    assert sources.tolist() == [[5, 14, 6, 3, 0, 0, 0], [7, 3, 0, 0, 0, 0, 0]]


def test_task_follows_the_type_of_the_model_section() -> None:
    assert make_task(small_config()).best_metric == 'exact_match'
    with pytest.raises(UserError, match=r'from tasks.classification and tasks.seq2seq: expected'):
        make_task(dataclasses.replace(small_config(), data=DataConfig()))
