"""Defines sequence to sequence: an encoder-decoder writes one text for another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrays import Batch, HostBatch, Params, Rngs, Sums
from configs import schema
from configs.checks import Check, at_least, fraction, one_of
from configs.schema import Config, option
from input_pipeline import addition, checks
from input_pipeline.encoded import unknown_share
from input_pipeline.examples import Features, read_splits
from input_pipeline.library_tokenizer import restored
from input_pipeline.pairs import EncodedPairs, Pairs, encode_sources
from input_pipeline.tokenizer import make_vocabulary, tokenizer_option
from input_pipeline.vocabulary import PAD, Vocabulary
from model.seq2seq import Seq2Seq
from tasks.task import Json, Predictor, Task

SAMPLES = 5  # examples shown at each evaluation


@dataclasses.dataclass
class DataConfig(schema.DataConfig):
    """Declares what the encoder-decoder reads: pairs of a source and a target text."""

    source: str = option(
        'addition', 'where the pairs come from', one_of('addition', 'tfds', 'files')
    )
    source_feature: str = option('source', 'tfds, files: feature or column with the source text')
    target_feature: str = option('target', 'tfds, files: feature or column with the target text')
    tokenizer: str = tokenizer_option('characters')
    vocab_size: int = option(8000, 'wordpiece, bpe: most tokens of each side', at_least(300))
    min_frequency: int = option(
        1, 'tfds, files: tokens seen less often in the training split are unknown', at_least(1)
    )
    too_long: str = option(
        'error', 'tfds, files: a side longer than the last bucket', one_of('error', 'cut')
    )
    operand_digits: tuple[int, ...] = option(
        (2, 3),
        'addition: digits of the smaller and of the larger operand',
        Check(
            lambda value: len(value) == 2 and 1 <= value[0] <= value[1] <= 4,
            'two whole numbers from 1 to 4, the smaller first, such as (2,3)',
        ),
    )
    num_train: int = option(85_000, 'addition: training pairs', at_least(1))
    num_eval: int = option(5_000, 'addition: evaluation pairs, none in training', at_least(1))
    split_seed: int = option(0, 'addition: which pairs are held out', at_least(0))


@dataclasses.dataclass
class ModelConfig(schema.ModelConfig):
    """Declares the encoder-decoder (model/seq2seq.py)."""

    embedding_size: int = option(32, 'size of a token embedding', at_least(1))
    hidden_size: int = option(128, 'size of the encoder and of the decoder', at_least(1))
    word_dropout: float = option(
        0.0, 'probability that a source token is replaced by the unknown token', fraction()
    )
    embedding_dropout: float = option(0.0, 'dropout after the source embedding', fraction())
    dropout: float = option(0.0, 'dropout before the logits', fraction())
    forcing: str = option(
        'constant',
        'schedule by which the probability of feeding the true token falls over training steps',
        one_of('constant', 'linear', 'inverse_sigmoid'),
    )
    forcing_floor: float = option(
        1.0,
        'probability of feeding the true token that the schedule ends at',
        Check(lambda value: 0 <= value <= 1, 'a number in [0, 1]'),
    )
    forcing_steps: int = option(
        1000,
        'linear: steps from 1 to the floor; inverse_sigmoid: k, one half after k ln k steps',
        at_least(1),
    )


def read_pairs(data: DataConfig) -> tuple[Pairs, Pairs, tuple[str, ...]]:
    """Reads training pairs, evaluation pairs, and the problems of bad rows that were skipped.

    Raises UserError for a pair with an empty side.
    """
    if data.source == 'addition':
        sizes = data.num_train, data.num_eval, data.split_seed, data.bucket_lengths[-1]
        return *addition.make_additions(data.operand_digits, *sizes), ()
    features = Features((data.source_feature, data.target_feature), pairs=True)
    train, evaluation = read_splits(data, features)
    return train.texts, evaluation.texts, train.skipped + evaluation.skipped


def make_model(options: ModelConfig, source: Vocabulary, target: Vocabulary) -> Seq2Seq:
    """Makes the model of a config, for a source and a target vocabulary with the same marks."""
    return Seq2Seq(
        source_vocab_size=len(source),
        target_vocab_size=len(target),
        embedding_size=options.embedding_size,
        hidden_size=options.hidden_size,
        word_dropout=options.word_dropout,
        embedding_dropout=options.embedding_dropout,
        dropout=options.dropout,
        pad_id=PAD,
        unk_id=target.unk,
        bos_id=target.bos,
        eos_id=target.eos,
        first_word_id=target.first_word,
        dtype=jnp.dtype(options.compute_dtype),
        remat=options.remat,
    )


def seq2seq_init(model: Seq2Seq) -> Callable[[jax.Array], Params]:
    """Returns key -> parameters, whose shapes do not depend on the width of a batch."""

    def init(key: jax.Array) -> Params:
        tokens, lengths = jnp.zeros((1, 2), jnp.int32), jnp.full(1, 2)
        return model.init({'params': key}, tokens, lengths, tokens, train=False)['params']

    return init


def forcing_schedule(options: ModelConfig) -> Callable[[jax.Array], jax.Array] | None:
    """Returns step -> probability float32[] of teacher forcing; None if it is always 1.

    These are decays of Bengio et al. (2015): 1 - step / steps, and k / (k + exp(step / k)).
    """
    floor, steps = options.forcing_floor, options.forcing_steps
    if floor == 1.0:
        return None

    def probability(step: jax.Array) -> jax.Array:
        progress = step.astype(jnp.float32) / steps
        if options.forcing == 'constant':
            return jnp.float32(floor)
        if options.forcing == 'linear':
            return jnp.maximum(floor, 1 - progress)
        return jnp.maximum(floor, steps / (steps + jnp.exp(progress)))

    return probability


def seq2seq_sums(
    model: Seq2Seq, probability: Callable[[jax.Array], jax.Array] | None = None
) -> Callable[..., Sums]:
    """Returns the sums of `token_sums`, which in training feed the true token by a schedule.

    Without rngs nothing is drawn: that is evaluation, with teacher forcing, which also counts pairs
    and the pairs decoded without a mistake.
    """

    def sums(params: Params, batch: Batch, rngs: Rngs | None = None, step: Any = None) -> Sums:
        sources, targets = (batch['sources'], batch['source_lengths']), batch['targets']
        train = rngs is not None
        forcing = probability(step) if train and probability else None
        logits = model.apply({'params': params}, *sources, targets, forcing, train=train, rngs=rngs)
        of_tokens = token_sums(jnp.asarray(logits), batch)
        if train:
            return of_tokens
        decoded = model.apply({'params': params}, *sources, targets.shape[1], method='greedy')
        # Both are padded after EOS. An unknown unit is never right: it does not spell the text.
        exact = jnp.all((decoded == targets) & (targets != model.unk_id), axis=1)
        weights = batch['weights']
        return of_tokens | {'exact': jnp.sum(weights * exact), 'pairs': jnp.sum(weights)}

    return sums


def token_sums(logits: jax.Array, batch: Batch) -> Sums:
    """Sums over real target tokens, EOS included. logits: float32[B, U, V]."""
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
    """Returns mean loss and accuracy per target token; in evaluation also of exact pairs."""
    weight = totals['weight']
    metrics = {'loss': totals['loss'] / weight, 'token_accuracy': totals['correct'] / weight}
    if 'exact' in totals:
        metrics['exact_match'] = totals['exact'] / totals['pairs']
    return metrics


def make_task(config: Config, facts: Json | None = None) -> Task:
    """Makes the task of a config, or with the tokenizers of another run, whose facts are given.

    Raises UserError for data that cannot be used.
    """
    data, options = config.data, config.model
    assert isinstance(data, DataConfig)
    assert isinstance(options, ModelConfig)
    train_pairs, eval_pairs, skipped = read_pairs(data)
    source, target = (
        restored(facts, data.tokenizer, name)
        if facts
        else make_vocabulary(data.tokenizer, side, data.min_frequency, data.vocab_size)
        for name, side in zip(('source_', 'target_'), zip(*train_pairs, strict=True), strict=True)
    )
    known = min(len(source.words), len(target.words))
    checks.require_known(known, len(train_pairs), 'token', data.min_frequency)
    max_length = data.bucket_lengths[-1]
    train, evaluation = (
        EncodedPairs(pairs, source, target, max_length, data.too_long == 'cut')
        for pairs in (train_pairs, eval_pairs)
    )
    model = make_model(options, source, target)
    return Task(
        train=train,
        evaluation=evaluation,
        init=seq2seq_init(model),
        loss_sums=seq2seq_sums(model, forcing_schedule(options)),
        eval_sums=seq2seq_sums(model),
        sum_names=('correct', 'loss', 'tokens', 'weight'),
        metrics=seq2seq_metrics,
        best_metric='exact_match',
        resume_facts={
            **source.facts('source_'),
            **target.facts('target_'),
            'training_data': train.fingerprint(),
            'evaluation_data': evaluation.fingerprint(),
        },
        files={
            'source_vocabulary.txt': source.file_text(),
            'target_vocabulary.txt': target.file_text(),
            **checks.skipped_file(skipped),
        },
        summary=(
            f'{len(train)} training and {len(evaluation)} evaluation pairs, {len(source)} source '
            f'and {len(target)} target ids ({data.tokenizer}), {train.unknown:.1%} of training and '
            f'{evaluation.unknown:.1%} of evaluation tokens unknown, '
            f'{f"{len(skipped)} bad rows skipped, " if skipped else ""}'
            f'{train.num_truncated + evaluation.num_truncated} pairs cut to {max_length} ids'
        ),
        warnings=(
            *checks.unknown_warnings(training=train.unknown, evaluation=evaluation.unknown),
            *checks.shared_warnings(train_pairs, eval_pairs),
        ),
        samples=make_samples(model, evaluation, source, target, max_length),
    )


def make_samples(
    model: Seq2Seq, split: EncodedPairs, source: Vocabulary, target: Vocabulary, width: int
) -> Callable[[Params], list[str]]:
    """Returns parameters -> greedy decodings of the first evaluation pairs, one in a line."""
    batch = split.batch(np.arange(min(SAMPLES, len(split))), width)
    decode = jax.jit(
        lambda params: model.apply(
            {'params': params}, batch['sources'], batch['source_lengths'], width, method='greedy'
        )
    )

    def samples(params: Params) -> list[str]:
        rows = zip(batch['sources'], batch['targets'], jax.device_get(decode(params)), strict=True)
        lines = []
        for question, answer, given in rows:
            right, found = target.decode(answer), target.decode(given)
            verdict = 'right' if found == right else f'expected {right}'
            lines.append(f'{source.decode(question)} -> {found}  ({verdict})')
        return lines

    return samples


def make_predictor(config: Config, resume_facts: Json) -> Predictor:
    """Makes what decodes texts greedily."""
    data, options = config.data, config.model
    assert isinstance(data, DataConfig)
    assert isinstance(options, ModelConfig)
    source, target = (
        restored(resume_facts, data.tokenizer, side) for side in ('source_', 'target_')
    )
    width = data.bucket_lengths[-1]
    model = make_model(options, source, target)

    def encode(texts: list[str]) -> HostBatch:
        # If training had rare units, the model has learned what an unknown one means.
        rare, cut = data.min_frequency > 1, data.too_long == 'cut'
        sources, lengths = encode_sources(texts, source, width, rare, cut)
        return {'sources': sources, 'source_lengths': lengths}

    def apply(params: Params, rows: Batch) -> Any:
        rows_of = rows['sources'], rows['source_lengths']
        return model.apply({'params': params}, *rows_of, width, method='greedy')

    def show(decoded: Any, row: int, _: str) -> Json:
        return {'prediction': target.decode(decoded[row])}

    def notes(text: str) -> Json:
        if data.min_frequency == 1 and data.too_long == 'error':
            return {}  # what could be noted is refused
        ids = source.ids(text)
        return {'unknown': unknown_share([ids], source.unk), 'cut': len(ids) >= width}

    return Predictor(seq2seq_init(model), encode, apply, show, notes, (data.source_feature,))
