"""Sequence to sequence: from one text another, by an encoder-decoder with scheduled sampling."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.schema import Config
from configs.sections import PairsConfig, Seq2SeqConfig
from input_pipeline import addition, text_files, tfds_source
from input_pipeline.examples import PairDataset, PairSplit
from input_pipeline.pairs import EncodedPairs, encode_sources
from input_pipeline.vocabulary import BOS, EOS, FIRST_WORD, PAD, UNK, Vocabulary
from model.seq2seq import Seq2Seq
from tasks.task import Batch, Predictor, Rngs, Sums, Task

SAMPLES = 5  # examples shown at each evaluation


def make_task(config: Config) -> Task:
    """The encoder-decoder task of a config. Raises BadInput for data that can not be read."""
    data, knobs = config.data, config.model
    assert isinstance(data, PairsConfig)
    assert isinstance(knobs, Seq2SeqConfig)
    pairs = read_pairs(data)
    source = Vocabulary.of(pairs.train.sources, data.min_frequency, data.unit)
    target = Vocabulary.of(pairs.train.targets, data.min_frequency, data.unit)
    max_length = data.bucket_lengths[-1]

    def encode(split: PairSplit) -> EncodedPairs:
        return EncodedPairs(split, source, target, max_length, data.too_long == 'cut')

    train, evaluation = encode(pairs.train), encode(pairs.evaluation)
    model = make_model(knobs, len(source), len(target))
    return Task(
        train=train,
        evaluation=evaluation,
        init=seq2seq_init(model),
        loss_sums=seq2seq_loss_sums(model, forcing_schedule(knobs)),
        eval_sums=seq2seq_eval_sums(model),
        sum_names=('correct', 'loss', 'tokens', 'weight'),
        metrics=seq2seq_metrics,
        best_metric='exact_match',
        facts={
            'source_vocabulary': list(source.words),
            'target_vocabulary': list(target.words),
            'training_data': train.fingerprint(),
            'evaluation_data': evaluation.fingerprint(),
        },
        files={
            'source_vocabulary.txt': source.file_text(),
            'target_vocabulary.txt': target.file_text(),
        },
        summary=(
            f'{len(train)} training and {len(evaluation)} evaluation pairs, {len(source)} source '
            f'and {len(target)} target ids ({data.unit}s), '
            f'{train.num_truncated + evaluation.num_truncated} pairs cut to {max_length} ids'
        ),
        samples=make_samples(model, evaluation, source, target, max_length),
    )


def read_pairs(data: PairsConfig) -> PairDataset:
    """The pairs that a config names."""
    if data.source == 'tfds':
        return tfds_source.read_tfds_pairs(
            data.name,
            data.train,
            data.evaluation,
            data.source_feature,
            data.target_feature,
            data.data_dir,
        )
    if data.source == 'files':
        return text_files.read_pair_files(
            data.train, data.evaluation, data.source_feature, data.target_feature
        )
    return addition.make_additions(data)


def make_model(knobs: Seq2SeqConfig, source_size: int, target_size: int) -> Seq2Seq:
    """The model of a config, for vocabularies of these sizes."""
    return Seq2Seq(
        source_vocab_size=source_size,
        target_vocab_size=target_size,
        embedding_size=knobs.embedding_size,
        hidden_size=knobs.hidden_size,
        word_dropout=knobs.word_dropout,
        embedding_dropout=knobs.embedding_dropout,
        dropout=knobs.dropout,
        pad_id=PAD,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        first_word_id=FIRST_WORD,
        dtype=jnp.dtype(knobs.compute_dtype),
        remat=knobs.remat,
    )


def make_predictor(config: Config, facts: dict[str, Any]) -> Predictor:
    """Greedily decoded texts."""
    data, knobs = config.data, config.model
    assert isinstance(data, PairsConfig)
    assert isinstance(knobs, Seq2SeqConfig)
    source, target = (
        Vocabulary(facts[f'{side}_vocabulary'], data.unit) for side in ('source', 'target')
    )
    width = data.bucket_lengths[-1]
    model = make_model(knobs, len(source), len(target))

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        # Where training had rare units, it has learned what an unknown one looks like.
        sources, lengths = encode_sources(texts, source, width, data.min_frequency > 1)
        return {'sources': sources, 'source_lengths': lengths}

    def apply(params: Any, rows: Batch) -> Any:
        rows_of = rows['sources'], rows['source_lengths']
        return model.apply({'params': params}, *rows_of, width, method='greedy')

    def show(decoded: Any, row: int) -> dict[str, Any]:
        return {'prediction': target.decode(decoded[row])}

    return Predictor(seq2seq_init(model), encode, apply, show)


def seq2seq_init(model: Seq2Seq) -> Callable[[jax.Array], Any]:
    """key -> parameters. No parameter's shape depends on the width of a batch."""

    def init(key: jax.Array) -> Any:
        tokens, lengths = jnp.zeros((1, 2), jnp.int32), jnp.full(1, 2)
        return model.init({'params': key}, tokens, lengths, tokens, train=False)['params']

    return init


def forcing_schedule(knobs: Seq2SeqConfig) -> Callable[[jax.Array], jax.Array] | None:
    """step -> probability float32[] of teacher forcing; None where it is always 1.

    The decays of Bengio et al. (2015): 1 - step / steps, and k / (k + exp(step / k)).
    """
    floor, steps = knobs.forcing_floor, knobs.forcing_steps
    if floor == 1.0:
        return None

    def probability(step: jax.Array) -> jax.Array:
        progress = step.astype(jnp.float32) / steps
        if knobs.forcing == 'constant':
            return jnp.float32(floor)
        if knobs.forcing == 'linear':
            return jnp.maximum(floor, 1 - progress)
        return jnp.maximum(floor, steps / (steps + jnp.exp(progress)))

    return probability


def seq2seq_loss_sums(
    model: Seq2Seq, probability: Callable[[jax.Array], jax.Array] | None
) -> Callable[[Any, Batch, Rngs, jax.Array], Sums]:
    """Sums of the training loss, as `token_sums` has them."""

    def loss_sums(params: Any, batch: Batch, rngs: Rngs, step: jax.Array) -> Sums:
        logits = model.apply(
            {'params': params},
            batch['sources'],
            batch['source_lengths'],
            batch['targets'],
            probability(step) if probability else None,
            train=True,
            rngs=rngs,
        )
        return token_sums(jnp.asarray(logits), batch)

    return loss_sums


def seq2seq_eval_sums(model: Seq2Seq) -> Callable[[Any, Batch], Sums]:
    """`token_sums` with true tokens read; pairs, and pairs whose greedy decoding is all right."""

    def eval_sums(params: Any, batch: Batch) -> Sums:
        sources = batch['sources'], batch['source_lengths']
        targets, weights = batch['targets'], batch['weights']
        logits = model.apply({'params': params}, *sources, targets, train=False)
        decoded = model.apply({'params': params}, *sources, targets.shape[1], method='greedy')
        # Both end with padding after EOS. An unknown unit is never right: it is not the text.
        exact = jnp.all((decoded == targets) & (targets != UNK), axis=1)
        return token_sums(jnp.asarray(logits), batch) | {
            'exact': jnp.sum(weights * exact),
            'pairs': jnp.sum(weights),
        }

    return eval_sums


def token_sums(logits: jax.Array, batch: Batch) -> Sums:
    """logits: float32[B, U, V] -> sums over real target tokens, EOS among them."""
    targets, lengths = batch['targets'], batch['target_lengths']
    real = jnp.arange(targets.shape[1]) < lengths[:, None]
    weights = batch['weights'][:, None] * real
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return {
        'correct': jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
        'loss': jnp.sum(weights * losses),
        'tokens': jnp.sum(batch['weights'] * (batch['source_lengths'] + lengths)),
        'weight': jnp.sum(weights),
    }


def seq2seq_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Mean loss and accuracy per target token; in evaluation the share of exact pairs too."""
    metrics = {
        'loss': totals['loss'] / totals['weight'],
        'token_accuracy': totals['correct'] / totals['weight'],
    }
    if 'exact' in totals:
        metrics['exact_match'] = totals['exact'] / totals['pairs']
    return metrics


def make_samples(
    model: Seq2Seq, split: EncodedPairs, source: Vocabulary, target: Vocabulary, width: int
) -> Callable[[Any], list[str]]:
    """parameters -> greedy decodings of the first evaluation pairs, each in a line."""
    batch = split.batch(np.arange(min(SAMPLES, len(split))), width)
    decode = jax.jit(
        lambda params: model.apply(
            {'params': params}, batch['sources'], batch['source_lengths'], width, method='greedy'
        )
    )

    def samples(params: Any) -> list[str]:
        rows = zip(batch['sources'], batch['targets'], jax.device_get(decode(params)), strict=True)
        lines = []
        for question, answer, given in rows:
            right, found = target.decode(answer), target.decode(given)
            verdict = 'right' if found == right else f'expected {right}'
            lines.append(f'{source.decode(question)} -> {found}  ({verdict})')
        return lines

    return samples
