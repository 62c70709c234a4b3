"""Defines multi-label classification: any number of labels for each text, or none.

Each label has a sigmoid of its own. Model and tokenizer are those of tasks/classification.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrays import Batch, Params, Rngs, Sums, Totals
from configs.checks import Check, one_of
from configs.schema import Config, option
from errors import UserError
from input_pipeline.examples import Features, read_splits
from input_pipeline.labels import class_names
from input_pipeline.library_tokenizer import SEPARATOR
from tasks import classification
from tasks.classification import LabelledSplit, inputs, require_labels
from tasks.scores import averages, score_lines
from tasks.task import Json, Predictor, Task

COUNTS = ('right', 'predicted', 'true')  # of each label


@dataclasses.dataclass
class DataConfig(classification.DataConfig):
    """Declares what the classifier reads."""

    source: str = option('files', 'where the examples come from', one_of('tfds', 'files'))
    label_feature: str = option('labels', 'the labels, separated, or in .jsonl a list of them')
    label_separator: str = option(
        ',',
        'what separates labels',
        Check(lambda value: len(value) == 1, "one character, such as ';'"),
    )


@dataclasses.dataclass
class ModelConfig(classification.ModelConfig):
    """Declares the model of tasks/classification.py."""


def multilabel_sums(model: nn.Module, label_smoothing: float = 0.0) -> Callable[..., Sums]:
    """Returns the sums over rows; without rngs also the counts of each label, float32[L]."""

    def sums(params: Params, batch: Batch, rngs: Rngs | None = None, _: Any = None) -> Sums:
        targets, weights = batch['labels'].astype(jnp.float32), batch['weights']
        train = rngs is not None
        logits = model.apply({'params': params}, **inputs(batch), train=train, rngs=rngs)
        logits = jnp.asarray(logits)
        smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
        losses = optax.sigmoid_binary_cross_entropy(logits, smoothed).mean(axis=1)
        predicted = (logits > 0).astype(jnp.float32)
        hits = zip(COUNTS, (predicted * targets, predicted, targets), strict=True)
        counts = {} if train else {name: weights @ of_rows for name, of_rows in hits}
        return counts | {
            'exact_match': jnp.sum(weights * jnp.all(predicted == targets, axis=1)),
            'loss': jnp.sum(weights * losses),
            'tokens': jnp.sum(weights * batch['lengths']),
            'weight': jnp.sum(weights),
        }

    return sums


def multilabel_metrics(totals: Totals) -> dict[str, float]:
    """Returns mean loss, the share of texts without a mistake, and in evaluation averages of F1."""
    metrics = {name: totals[name] / totals['weight'] for name in ('loss', 'exact_match')}
    if 'true' in totals:
        means = averages(*(totals[name] for name in COUNTS))
        metrics |= {f'{kind}_f1': means[kind][2] for kind in ('micro', 'macro')}
    return metrics


def make_task(config: Config, facts: Json | None = None) -> Task:
    """Makes the task of a config. Raises UserError for data that cannot be used."""
    data = config.data
    assert isinstance(data, DataConfig)
    if data.class_weights or data.sampling_weights:
        raise UserError('config.data: expected no weights of labels, since a text may have several')
    features = Features(data.text_features, data.label_feature, data.label_separator)
    train, evaluation = read_splits(data, features)
    given = [(row, label) for row, found in enumerate(train.labels) for label in found]
    if not given:
        raise UserError(f'{data.train}: no row has a label in {data.label_feature!r}')
    names = class_names([label for _, label in given], lambda n: train.place(given[n][0]))
    require_labels(evaluation, names)
    train_split, eval_split = (
        LabelledSplit(
            [SEPARATOR.join(texts) for texts in rows.texts],
            np.array([[name in found for name in names] for found in rows.labels], int),
            rows.skipped,
        )
        for rows in (train, evaluation)
    )
    task = classification.labelled_task(
        config,
        facts,
        (train_split, eval_split, names),
        multilabel_sums,
        sum_names=('exact_match', 'loss', 'tokens', 'weight'),
        metrics=multilabel_metrics,
        best_metric='micro_f1',
        details=lambda totals: score_lines(names, *(totals[name] for name in COUNTS)),
    )
    task.resume_facts['labels'] = task.resume_facts.pop('label_names')
    return task


def make_predictor(config: Config, resume_facts: Json) -> Predictor:
    """Makes what predicts the probability of each label."""
    facts = resume_facts | {'label_names': resume_facts['labels']}
    base = classification.make_predictor(config, facts, jax.nn.sigmoid)

    def show(arrays: Any, row: int, text: str) -> Json:
        shown = base.show(arrays, row, text)
        del shown['label']
        return {'labels': [n for n, p in shown['probabilities'].items() if p > 0.5], **shown}

    return dataclasses.replace(base, show=show)
