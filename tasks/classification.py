"""Text classification: one label for each text."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.schema import BadInput, Config
from configs.sections import DataConfig, ModelConfig
from input_pipeline import reviews, text_files, tfds_source
from input_pipeline.encoded import LabelledTexts
from input_pipeline.examples import TextDataset, TextSplit
from input_pipeline.vocabulary import ALL_LETTERS, FIRST_WORD, UNK, Vocabulary
from model.classifier import TextClassifier
from tasks.task import Batch, Predictor, Rngs, Sums, Task


def make_task(config: Config) -> Task:
    """The text classification task of a config. Raises BadInput for data that can not be read."""
    assert isinstance(config.data, DataConfig)
    assert isinstance(config.model, ModelConfig)
    texts = read_texts(config.data)
    vocabulary, *affixes = (
        Vocabulary.of(texts.train.texts, config.data.min_frequency, letters=letters)
        for letters in (ALL_LETTERS, *affix_letters(config.data))
    )
    max_length = config.data.bucket_lengths[-1]

    def encode(split: TextSplit) -> LabelledTexts:
        return LabelledTexts(split.texts, split.labels, vocabulary, max_length, affixes)

    train, evaluation = encode(texts.train), encode(texts.evaluation)
    model = make_model(config.model, [vocabulary, *affixes], len(texts.label_names))
    return Task(
        train=train,
        evaluation=evaluation,
        init=classifier_init(model, len(affixes)),
        loss_sums=classifier_sums(model, config.model.label_smoothing),
        eval_sums=classifier_sums(model),
        sum_names=('correct', 'loss', 'tokens', 'weight'),
        metrics=classifier_metrics,
        best_metric='accuracy',
        facts={
            'label_names': list(texts.label_names),
            'vocabulary': list(vocabulary.words),
            'affixes': [list(part.words) for part in affixes],
            'training_data': train.fingerprint(),
            'evaluation_data': evaluation.fingerprint(),
        },
        files={'vocabulary.txt': vocabulary.file_text()},
        summary=(
            f'{len(train)} training and {len(evaluation)} evaluation examples, '
            f'{len(texts.label_names)} classes, {len(vocabulary)} word ids, '
            f'{train.num_truncated + evaluation.num_truncated} texts cut to {max_length} ids'
        ),
    )


def affix_letters(data: DataConfig) -> list[slice]:
    """Which letters of a word have ids of their own."""
    if not data.affixes:
        return []
    first, last = data.affixes
    return [slice(first), slice(-last, None)]


def make_model(
    knobs: ModelConfig, vocabularies: Sequence[Sized], num_classes: int
) -> TextClassifier:
    """The model of a config, for words and affixes, and a number of classes."""
    vocab_size, *affix_sizes = map(len, vocabularies)
    return TextClassifier(
        vocab_size=vocab_size,
        affix_sizes=tuple(affix_sizes),
        num_classes=num_classes,
        embedding_size=knobs.embedding_size,
        hidden_size=knobs.hidden_size,
        word_dropout=knobs.word_dropout,
        embedding_dropout=knobs.embedding_dropout,
        dropout=knobs.dropout,
        unk_id=UNK,
        first_word_id=FIRST_WORD,
        dtype=jnp.dtype(knobs.compute_dtype),
        remat=knobs.remat,
    )


def make_predictor(config: Config, facts: dict[str, Any]) -> Predictor:
    """Labels with their probabilities, and how much attention each word got."""
    assert isinstance(config.model, ModelConfig)
    assert isinstance(config.data, DataConfig)
    vocabulary, labels = Vocabulary(facts['vocabulary']), facts['label_names']
    affixes = [
        Vocabulary(words, letters=letters)
        for words, letters in zip(facts['affixes'], affix_letters(config.data), strict=True)
    ]
    width = config.data.bucket_lengths[-1]
    model = make_model(config.model, [vocabulary, *affixes], len(labels))

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        if empty := next((n for n, text in enumerate(texts, 1) if not text.strip()), 0):
            raise BadInput(f'text {empty}: expected some text')
        split = LabelledTexts(texts, np.zeros(len(texts)), vocabulary, width, affixes)
        return split.batch(np.arange(len(texts)), width)

    def apply(params: Any, rows: Batch) -> Any:
        logits, seen = model.apply(
            {'params': params},
            **inputs(rows),
            train=False,
            mutable='intermediates',
            capture_intermediates=lambda module, _: module.name == 'attention',
        )
        attention = seen['intermediates']['attention']['__call__'][0]
        return jax.nn.softmax(jnp.asarray(logits)), attention, rows['token_ids'], rows['lengths']

    def show(arrays: Any, row: int) -> dict[str, Any]:
        probabilities, attention, ids, lengths = (array[row] for array in arrays)
        words = [vocabulary.names[index] for index in ids[1 : lengths - 1]]
        return {
            'label': labels[int(np.argmax(probabilities))],
            'probabilities': dict(zip(labels, probabilities.tolist(), strict=True)),
            'attention': list(zip(words, attention[1 : lengths - 1].tolist(), strict=True)),
        }

    return Predictor(classifier_init(model, len(affixes)), encode, apply, show)


def read_texts(data: DataConfig) -> TextDataset:
    """The data set that a config names."""
    if data.source == 'tfds':
        return tfds_source.read_tfds(
            data.name,
            data.train,
            data.evaluation,
            data.text_features,
            data.label_feature,
            data.data_dir,
        )
    if data.source == 'files':
        return text_files.read_text_files(
            data.train, data.evaluation, data.text_features, data.label_feature
        )
    try:
        train, evaluation = reviews.make_reviews(data.num_train, data.num_eval)
    except ValueError as error:
        raise BadInput(f'config.data.num_train = {data.num_train}: {error}') from error
    return TextDataset(
        TextSplit(train[0], np.array(train[1], np.int32)),
        TextSplit(evaluation[0], np.array(evaluation[1], np.int32)),
        reviews.LABEL_NAMES,
    )


def inputs(rows: Batch) -> dict[str, Any]:
    """What of a batch the model reads."""
    return {name: rows[name] for name in ('token_ids', 'lengths', 'affix_ids') if name in rows}


def classifier_init(model: nn.Module, affixes: int = 0) -> Callable[[jax.Array], Any]:
    """key -> parameters. No parameter's shape depends on the width of a batch."""

    def init(key: jax.Array) -> Any:
        rows: dict[str, Any] = {'token_ids': jnp.zeros((1, 2), jnp.int32)}
        rows['lengths'] = jnp.full(1, 2)
        if affixes:
            rows['affix_ids'] = jnp.zeros((1, 2, affixes), jnp.int32)
        return model.init({'params': key}, **rows, train=False)['params']

    return init


def classifier_sums(model: nn.Module, label_smoothing: float = 0.0) -> Callable[..., Sums]:
    """Sums over rows of softmax cross entropy, right answers, tokens and weights.

    Without rngs nothing is dropped, which is evaluation. No schedule follows the step. With label
    smoothing the target is (1 - s) of the label and s of all classes alike (Szegedy et al., 2016).
    """

    def sums(
        params: Any, batch: Batch, rngs: Rngs | None = None, _: jax.Array | None = None
    ) -> Sums:
        lengths, labels, weights = batch['lengths'], batch['labels'], batch['weights']
        train = rngs is not None
        logits = jnp.asarray(
            model.apply({'params': params}, **inputs(batch), train=train, rngs=rngs)
        )
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, label_smoothing))
        return {
            'correct': jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels)),
            'loss': jnp.sum(weights * losses),
            'tokens': jnp.sum(weights * lengths),
            'weight': jnp.sum(weights),
        }

    return sums


def classifier_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Mean loss and accuracy per example."""
    return {
        'loss': totals['loss'] / totals['weight'],
        'accuracy': totals['correct'] / totals['weight'],
    }
