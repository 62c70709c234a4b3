"""Defines text classification: one label for each text."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrays import Batch, HostBatch, Metrics, Params, Rngs, Sums, Totals
from configs import schema
from configs.checks import Check, at_least, fraction, names, one_of
from configs.schema import Config, option
from errors import UserError
from input_pipeline import checks, reviews
from input_pipeline.encoded import LabelledTexts, unknown_share
from input_pipeline.examples import Features, Rows, brief, not_among, read_splits
from input_pipeline.labels import class_names
from input_pipeline.library_tokenizer import SEPARATOR, restored
from input_pipeline.tokenizer import make_vocabulary, tokenizer_option
from input_pipeline.vocabulary import Vocabulary
from model.classifier import TextClassifier
from tasks.encoder import TransformerOptions, make_transformer, require_positions
from tasks.label_weights import label_weights, weights_of_examples
from tasks.scores import averages, confusion_lines, label_counts
from tasks.task import Json, Predictor, Task


@dataclasses.dataclass
class DataConfig(schema.DataConfig):
    """Declares what the classifier reads."""

    source: str = option(
        'reviews', 'where the examples come from', one_of('reviews', 'tfds', 'files')
    )
    text_features: tuple[str, ...] = option(
        ('text',), 'tfds, files: features or columns to read, joined', names()
    )
    label_feature: str = option(
        'label', 'tfds, files: feature or column with the class', Check(bool, 'a name')
    )
    num_train: int = option(10_000, 'reviews: training sentences', at_least(1))
    num_eval: int = option(1_500, 'reviews: evaluation sentences', at_least(1))
    tokenizer: str = tokenizer_option('', " ('' = basic for files, otherwise words)")
    vocab_size: int = option(8000, 'wordpiece, bpe: vocabulary size', at_least(300))
    min_frequency: int = option(
        3, 'tokens seen less often in the training split are unknown', at_least(1)
    )
    affixes: tuple[int, ...] = option(
        (),
        'lengths of the prefix and suffix to embed, also of unknown words; () = none',
        Check(
            lambda value: not value or (len(value) == 2 and min(value) >= 1),
            'two whole numbers >= 1, such as (4,3), or ()',
        ),
    )
    class_weights: tuple[str, ...] = option(
        (),
        "loss weight by label, default 1; 'balanced' gives every label the same total",
        label_weights(),
    )
    sampling_weights: tuple[str, ...] = option(
        (), 'how often training draws a label, same format as class_weights', label_weights()
    )


@dataclasses.dataclass
class ModelConfig(TransformerOptions):
    """Options of the classifier; tasks/encoder.py adds those of the Transformer."""

    embedding_size: int = option(64, 'lstm: size of a word embedding', at_least(1))
    hidden_size: int = option(64, 'size of each LSTM direction, attention and head', at_least(1))
    word_dropout: float = option(
        0.3,
        'probability that a word is replaced by the unknown token; its affix embeddings are kept',
        fraction(),
    )
    embedding_dropout: float = option(0.5, 'dropout after the embedding', fraction())
    dropout: float = option(0.5, 'dropout after LSTM, attention and hidden layer', fraction())
    label_smoothing: float = option(
        0.0, 'share of the training target that is spread over all classes', fraction()
    )


class LabelledSplit(NamedTuple):
    """Holds one split, read whole: N texts and their labels."""

    texts: list[str]
    labels: np.ndarray  # int32[N], indices of the label names
    skipped: tuple[str, ...] = ()  # why each skipped row is bad
    weights: np.ndarray | None = None  # [N] in the loss, instead of 1


def read_texts(data: DataConfig) -> tuple[LabelledSplit, LabelledSplit, tuple[str, ...]]:
    """Reads the training split, the evaluation split and the label names of a config.

    If the source declares no label names, those of the training split are used.
    """
    if data.source == 'reviews':
        train, evaluation = (
            LabelledSplit(texts, np.array(labels, np.int32))
            for texts, labels in reviews.make_reviews(data.num_train, data.num_eval)
        )
        return train, evaluation, reviews.LABEL_NAMES
    train_rows, eval_rows = read_splits(data, Features(data.text_features, data.label_feature))
    label_names = train_rows.classes or class_names(
        [label for (label,) in train_rows.labels], train_rows.place
    )
    if len(label_names) == 1:
        raise UserError(
            f'{data.train}: only label {brief.repr(label_names[0])}, expected two or more'
        )
    return labelled(train_rows, label_names), labelled(eval_rows, label_names), label_names


def labelled(rows: Rows, label_names: Sequence[str]) -> LabelledSplit:
    """Joins the text features of each row and numbers its label.

    Raises UserError for an unknown label.
    """
    require_labels(rows, label_names)
    index = {name: position for position, name in enumerate(label_names)}
    joined = [SEPARATOR.join(texts) for texts in rows.texts]
    labels = np.array([index[label] for (label,) in rows.labels], np.int32)
    return LabelledSplit(joined, labels, rows.skipped)


def require_labels(rows: Rows, label_names: Collection[str]) -> None:
    """Raises UserError for a label that is not among `label_names`."""
    known = set(label_names)
    for position, labels in enumerate(rows.labels):
        for label in labels:
            if label not in known:
                raise UserError(f'{rows.place(position)}: label {not_among(label, label_names)}')


def affix_letters(data: DataConfig) -> list[slice]:
    """Returns the slices that cut a word's prefix and suffix."""
    return [slice(data.affixes[0]), slice(-data.affixes[1], None)] if data.affixes else []


def make_vocabularies(data: DataConfig, texts: Sequence[str]) -> list[Vocabulary]:
    """Makes the tokenizer and, from its words, the affix vocabularies.

    Sets an empty `data.tokenizer` to its default. Raises UserError for a file that is no tokenizer.
    """
    data.tokenizer = data.tokenizer or ('basic' if data.source == 'files' else 'words')
    vocabulary = make_vocabulary(data.tokenizer, texts, data.min_frequency, data.vocab_size)
    affixes = [
        Vocabulary.of(texts, data.min_frequency, vocabulary.units, letters)
        for letters in affix_letters(data)
    ]
    return [vocabulary, *affixes]


def restored_vocabularies(data: DataConfig, facts: Json) -> list[Vocabulary]:
    """Restores the vocabularies of a run."""
    vocabulary = restored(facts, data.tokenizer)
    cuts = zip(facts['affixes'], affix_letters(data), strict=True)
    return [vocabulary, *(Vocabulary(words, vocabulary.units, letters) for words, letters in cuts)]


def make_model(
    options: ModelConfig, vocabularies: Sequence[Vocabulary], num_classes: int
) -> nn.Module:
    """Makes the model of a config, for words and affixes and a number of classes."""
    vocab_size, *affix_sizes = map(len, vocabularies)
    shared: dict[str, Any] = {
        'vocab_size': vocab_size,
        'num_classes': num_classes,
        'hidden_size': options.hidden_size,
        'word_dropout': options.word_dropout,
        'embedding_dropout': options.embedding_dropout,
        'dropout': options.dropout,
        'unk_id': vocabularies[0].unk,
        'first_word_id': vocabularies[0].first_word,
        'dtype': jnp.dtype(options.compute_dtype),
        'remat': options.remat,
    }
    if options.encoder == 'transformer':
        return make_transformer(options, len(affix_sizes), shared)
    return TextClassifier(
        affix_sizes=tuple(affix_sizes), embedding_size=options.embedding_size, **shared
    )


def inputs(rows: Batch) -> dict[str, Any]:
    """Selects the model's inputs from a batch."""
    return {name: rows[name] for name in ('token_ids', 'lengths', 'affix_ids') if name in rows}


def classifier_init(model: nn.Module, affixes: int = 0) -> Callable[[jax.Array], Params]:
    """Returns key -> parameters, whose shapes do not depend on the width of a batch."""

    def init(key: jax.Array) -> Params:
        rows: Any = {'token_ids': jnp.zeros((1, 2), jnp.int32), 'lengths': jnp.full(1, 2)}
        rows |= {'affix_ids': jnp.zeros((1, 2, affixes), jnp.int32)} if affixes else {}
        return model.init({'params': key}, **rows, train=False)['params']

    return init


def classifier_sums(model: nn.Module, label_smoothing: float = 0.0) -> Callable[..., Sums]:
    """Returns (params, rows, rngs) -> sums of cross entropy, right answers, tokens and weights.

    Without rngs these evaluate: no dropout, and also the counts confusion float32[true label,
    predicted label]. Label smoothing spreads a share of the target over all classes (Szegedy et
    al., 2016).
    """

    def sums(
        params: Params, batch: Batch, rngs: Rngs | None = None, _: jax.Array | None = None
    ) -> Sums:
        lengths, labels, weights = batch['lengths'], batch['labels'], batch['weights']
        train = rngs is not None
        logits = jnp.asarray(
            model.apply({'params': params}, **inputs(batch), train=train, rngs=rngs)
        )
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, label_smoothing))
        predicted = jnp.argmax(logits, axis=-1)
        guesses = jax.nn.one_hot(predicted, logits.shape[-1])
        confusion = {} if train else {'confusion': (weights[:, None] * one_hot).T @ guesses}
        return confusion | {
            'correct': jnp.sum(weights * (predicted == labels)),
            'loss': jnp.sum(weights * losses),
            'tokens': jnp.sum((weights > 0) * lengths, dtype=jnp.float32),
            'weight': jnp.sum(weights),
        }

    return sums


def classifier_metrics(totals: Totals) -> Metrics:
    """Returns mean loss and accuracy; in evaluation also macro and weighted F1."""
    weight = totals['weight']
    metrics = {'loss': totals['loss'] / weight, 'accuracy': totals['correct'] / weight}
    if 'confusion' in totals:
        means = averages(*label_counts(totals['confusion']))
        metrics |= {f'{name}_f1': means[name][2] for name in ('macro', 'weighted')}
    return metrics


def make_task(config: Config, facts: Json | None = None) -> Task:
    """Makes the task of a config. Raises UserError for data that cannot be used.

    Given a run's `facts`, it reuses that run's tokenizer.
    """
    data = config.data
    assert isinstance(data, DataConfig)
    train, evaluation, labels = read_texts(data)
    example_weights = functools.partial(
        weights_of_examples, labels=train.labels, label_names=labels
    )
    train = train._replace(weights=example_weights('class_weights', data.class_weights))
    task = labelled_task(
        config,
        facts,
        (train, evaluation, labels),
        classifier_sums,
        sum_names=('correct', 'loss', 'tokens', 'weight'),
        metrics=classifier_metrics,
        best_metric='accuracy',
        sampling_weights=example_weights('sampling_weights', data.sampling_weights),
        details=lambda totals: confusion_lines(totals['confusion'], labels),
        doubts=lambda found: checks.chance_warnings(found['accuracy'], evaluation.labels, labels),
    )
    warnings = (*task.warnings, *checks.label_warnings(train.texts, train.labels, labels))
    return dataclasses.replace(task, warnings=warnings)


def labelled_task(
    config: Config,
    facts: Json | None,
    read: tuple[LabelledSplit, LabelledSplit, tuple[str, ...]],
    sums: Callable[..., Callable[..., Sums]],
    **own: Any,
) -> Task:
    """Makes a task of labelled texts, as `read_texts` returns them.

    `sums` is called with the model and, for training, with the label smoothing. `own`: the fields
    of the task that depend on what a label is.
    """
    data, options = config.data, config.model
    assert isinstance(data, DataConfig)
    assert isinstance(options, ModelConfig)
    if data.source != 'reviews' and data.label_feature in data.text_features:
        raise UserError(
            f'config.data.text_features: {data.label_feature!r} is the label; expected '
            'features that do not give the answer away'
        )
    max_length = data.bucket_lengths[-1]
    require_positions(options, max_length)
    train_split, eval_split, label_names = read
    vocabulary, *affixes = vocabularies = (
        restored_vocabularies(data, facts) if facts else make_vocabularies(data, train_split.texts)
    )
    most_known = max(len(part.words) for part in vocabularies)
    skipped = train_split.skipped + eval_split.skipped
    checks.require_known(most_known, len(train_split.texts), 'token', data.min_frequency)
    train, evaluation = (
        LabelledTexts(split.texts, split.labels, vocabulary, max_length, affixes, split.weights)
        for split in (train_split, eval_split)
    )
    model = make_model(options, vocabularies, len(label_names))
    return Task(
        train=train,
        evaluation=evaluation,
        init=classifier_init(model, len(affixes)),
        loss_sums=sums(model, options.label_smoothing),
        eval_sums=sums(model),
        resume_facts={
            'label_names': list(label_names),
            **vocabulary.facts(),
            'affixes': [list(part.words) for part in affixes],
            'training_data': train.fingerprint(),
            'evaluation_data': evaluation.fingerprint(),
        },
        files={'vocabulary.txt': vocabulary.file_text(), **checks.skipped_file(skipped)},
        token_names=vocabulary.names,
        summary=(
            f'{len(train)} training and {len(evaluation)} evaluation examples, '
            f'{f"{len(skipped)} bad rows skipped, " if skipped else ""}'
            f'{len(label_names)} classes '
            f'{brief.repr(checks.class_counts(train.labels, label_names))}, '
            f'{len(vocabulary)} ids ({data.tokenizer}), {train.unknown:.1%} of training and '
            f'{evaluation.unknown:.1%} of evaluation tokens unknown, '
            f'{train.num_truncated + evaluation.num_truncated} texts cut to {max_length} ids'
        ),
        warnings=(
            *checks.unknown_warnings(training=train.unknown, evaluation=evaluation.unknown),
            *checks.shared_warnings(train_split.texts, eval_split.texts),
        ),
        **own,
    )


def make_predictor(
    config: Config,
    resume_facts: Json,
    probabilities: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
) -> Predictor:
    """Makes a predictor of labels, probabilities and, for an LSTM, its attention."""
    assert isinstance(config.model, ModelConfig)
    assert isinstance(config.data, DataConfig)
    vocabulary, *affixes = vocabularies = restored_vocabularies(config.data, resume_facts)
    labels = resume_facts['label_names']
    width = config.data.bucket_lengths[-1]
    model = make_model(config.model, vocabularies, len(labels))

    def encode(texts: list[str]) -> HostBatch:
        if empty := next((n for n, text in enumerate(texts, 1) if not text.strip()), 0):
            raise UserError(f'text {empty}: expected some text')
        split = LabelledTexts(texts, np.zeros(len(texts)), vocabulary, width, affixes)
        return split.batch(np.arange(len(texts)), width)

    def apply(params: Params, rows: Batch) -> Any:
        logits, seen = model.apply(
            {'params': params},
            **inputs(rows),
            train=False,
            mutable='intermediates',
            capture_intermediates=lambda module, _: module.name == 'attention',
        )
        seen = seen.get('intermediates', {})
        attention = [seen['attention']['__call__'][0]] if seen else []
        return probabilities(jnp.asarray(logits)), *attention

    def show(arrays: Any, row: int, text: str) -> Json:
        chances, *attention = (array[row].tolist() for array in arrays)
        shown = {
            'label': labels[int(np.argmax(chances))],
            'probabilities': dict(zip(labels, chances, strict=True)),
        }
        for weights in attention:
            pieces = [piece for _, piece in vocabulary.tokens(text)[: width - 2]]
            # First and last weights belong to marks; cut pieces have none.
            shown['attention'] = list(zip(pieces, weights[1:], strict=False))
        return shown

    def notes(text: str) -> Json:
        ids = vocabulary.ids(text)
        return {'unknown': unknown_share([ids], vocabulary.unk), 'cut': len(ids) > width - 2}

    init, features = classifier_init(model, len(affixes)), config.data.text_features
    return Predictor(init, encode, apply, show, notes, features, SEPARATOR.join)
