"""Defines multi-label classification: any number of labels for each text, or none.

Each label has a sigmoid of its own. Model and tokenizer are those of tasks/classification.py.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.checks import one_of
from configs.schema import Config, option
from errors import UserError
from input_pipeline.examples import (
    Rows,
    brief,
    missing_label,
    not_among,
    read_splits,
    usable,
)
from input_pipeline.labels import class_names, missing_labels, visible
from input_pipeline.library_tokenizer import SEPARATOR
from input_pipeline.text_files import contents
from tasks import classification
from tasks.classification import LabelledSplit, inputs
from tasks.scores import averages, score_lines
from tasks.task import Batch, Json, Params, Predictor, Rngs, Sums, Task, Totals

COUNTS = ('right', 'predicted', 'true')  # of each label


@dataclasses.dataclass
class DataConfig(classification.DataConfig):
    """Declares what the classifier reads."""

    source: str = option('files', 'where the examples come from', one_of('tfds', 'files'))
    label_feature: str = option('labels', 'the labels, separated, or in .jsonl a list of them')
    label_separator: str = option(
        ',', 'what separates labels', (lambda value: len(value) == 1, "one character, such as ';'")
    )


@dataclasses.dataclass
class ModelConfig(classification.ModelConfig):
    """Declares the model of tasks/classification.py."""


def read_labels(
    data: DataConfig, split: str, rows: Rows, classes: Collection[str] = ()
) -> tuple[Rows, list[list[str]]]:
    """Returns the usable rows and their labels, the last feature of rows that are not JSON.

    A row needs some text, and labels that are among the `classes` or not missing ones.
    """
    name, count, labels = data.label_feature, len(data.text_features), []
    lines = functools.cache(lambda file: contents(file).split('\n'))
    if len(rows.texts[0]) == count and '.jsonl' not in rows.place(0).lower():
        raise UserError(f'{split}: expected .jsonl, like the training data')

    def unreadable(row: int) -> str:
        texts = rows.texts[row]
        if not any(visible(''.join(texts[:count]))):
            return 'no text, expected some'
        if texts[count:]:
            value = texts[-1]
        else:
            file, _, line = rows.place(row).rpartition(':')
            record = json.loads(lines(file)[int(line) - 1])  # the reader has checked it
            if name not in record:
                return f'key {not_among(name, record)}'
            value = record[name]
        parts = value.split(data.label_separator) if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(type(part) in (str, int) for part in parts):
            return f'labels {brief.repr(value)}, expected a list or some text'
        labels.append([text for part in parts if (text := str(part).strip())])
        return ''

    good = usable(data, split, rows, unreadable)
    missing = missing_labels([label for found in labels for label in found]) - set(classes)

    def unlabelled(row: int) -> str:
        wrong = missing.intersection(labels[row])
        return missing_label(name, min(wrong)) if wrong else ''

    good = usable(data, split, good, unlabelled)
    return good, [found for found in labels if not missing.intersection(found)]


def multilabel_sums(model: nn.Module, label_smoothing: float = 0.0) -> Callable[..., Sums]:
    """Returns the sums over rows; without rngs also the counts of each label, float32[L]."""

    def sums(params: Params, batch: Batch, rngs: Rngs | None = None, _: Any = None) -> Sums:
        targets, weights = batch['labels'].astype(jnp.float32), batch['weights']
        logits = model.apply({'params': params}, **inputs(batch), train=bool(rngs), rngs=rngs)
        logits = jnp.asarray(logits)
        smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
        losses = optax.sigmoid_binary_cross_entropy(logits, smoothed).mean(axis=1)
        predicted = (logits > 0).astype(jnp.float32)
        hits = zip(COUNTS, (predicted * targets, predicted, targets), strict=True)
        counts = {} if rngs else {name: weights @ of_rows for name, of_rows in hits}
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
    count = len(data.text_features)
    of_table = () if '.jsonl' in data.train.lower() else (data.label_feature,)
    train, evaluation = read_splits(data, (*data.text_features, *of_table), compared=count)
    train, train_labels = read_labels(data, data.train, train)
    flat = [(row, label) for row, found in enumerate(train_labels) for label in found]
    if not flat:
        raise UserError(f'{data.train}: no row has a label in {data.label_feature!r}')
    names = class_names([label for _, label in flat], lambda n: train.place(flat[n][0]))
    evaluation, eval_labels = read_labels(data, data.evaluation, evaluation, names)
    for row, found in enumerate(eval_labels):
        for label in set(found) - set(names):
            raise UserError(f'{evaluation.place(row)}: label {not_among(label, names)}')
    train_split, eval_split = (
        LabelledSplit(
            [SEPARATOR.join(texts[:count]) for texts in rows.texts],
            np.array([[name in found for name in names] for found in labels], int),
            rows.skipped,
        )
        for rows, labels in ((train, train_labels), (evaluation, eval_labels))
    )
    task = classification.labelled_task(
        config,
        facts,
        (train_split, eval_split, names),
        multilabel_sums,
        sum_names=('exact_match', 'loss', 'tokens', 'weight'),
        metrics=multilabel_metrics,
        best_metric='micro_f1',
        details=lambda totals: score_lines(
            names, tuple(totals[name] for name in COUNTS), ('micro', 'macro', 'weighted')
        ),
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
