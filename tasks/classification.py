"""Text classification: one label for each text."""

from collections.abc import Callable
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
from input_pipeline.vocabulary import FIRST_WORD, UNK, Vocabulary
from model.classifier import TextClassifier
from tasks.task import Batch, Predictor, Rngs, Sums, Task


def make_task(config: Config) -> Task:
    """The text classification task of a config. Raises BadInput for data that can not be read."""
    assert isinstance(config.data, DataConfig)
    assert isinstance(config.model, ModelConfig)
    texts = read_texts(config.data)
    vocabulary = Vocabulary.of(texts.train.texts, config.data.min_frequency)
    max_length = config.data.bucket_lengths[-1]

    def encode(split: TextSplit) -> LabelledTexts:
        return LabelledTexts(split.texts, split.labels, vocabulary, max_length)

    train, evaluation = encode(texts.train), encode(texts.evaluation)
    model = make_model(config.model, len(vocabulary), len(texts.label_names))
    sums = classifier_sums(model)
    return Task(
        train=train,
        evaluation=evaluation,
        init=classifier_init(model),
        loss_sums=sums,
        eval_sums=sums,
        sum_names=('correct', 'loss', 'tokens', 'weight'),
        metrics=classifier_metrics,
        best_metric='accuracy',
        facts={
            'label_names': list(texts.label_names),
            'vocabulary': list(vocabulary.words),
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


def make_model(knobs: ModelConfig, vocab_size: int, num_classes: int) -> TextClassifier:
    """The model of a config, for a vocabulary and classes of these sizes."""
    return TextClassifier(
        vocab_size=vocab_size,
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
    vocabulary, labels = Vocabulary(facts['vocabulary']), facts['label_names']
    width = config.data.bucket_lengths[-1]
    model = make_model(config.model, len(vocabulary), len(labels))

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        if empty := next((n for n, text in enumerate(texts, 1) if not text.strip()), 0):
            raise BadInput(f'text {empty}: expected some text')
        split = LabelledTexts(texts, np.zeros(len(texts)), vocabulary, width)
        return split.batch(np.arange(len(texts)), width)

    def apply(params: Any, rows: Batch) -> Any:
        logits, seen = model.apply(
            {'params': params},
            rows['token_ids'],
            rows['lengths'],
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

    return Predictor(classifier_init(model), encode, apply, show)


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


def classifier_init(model: nn.Module) -> Callable[[jax.Array], Any]:
    """key -> parameters. No parameter's shape depends on the width of a batch."""

    def init(key: jax.Array) -> Any:
        token_ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.full(1, 2)
        return model.init({'params': key}, token_ids, lengths, train=False)['params']

    return init


def classifier_sums(model: nn.Module) -> Callable[..., Sums]:
    """Sums over rows of softmax cross entropy, right answers, tokens and weights.

    Without rngs nothing is dropped, which is evaluation. No schedule follows the step.
    """

    def sums(
        params: Any, batch: Batch, rngs: Rngs | None = None, _: jax.Array | None = None
    ) -> Sums:
        token_ids, lengths, labels = batch['token_ids'], batch['lengths'], batch['labels']
        train = rngs is not None
        logits = jnp.asarray(
            model.apply({'params': params}, token_ids, lengths, train=train, rngs=rngs)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        weights = batch['weights']
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
