"""Defines multi-label classification: any number of labels for each text, or none.

Each label has a sigmoid of its own. Model and tokenizer are those of tasks/classification.py.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.checks import one_of
from configs.schema import Config, option
from errors import UserError
from input_pipeline.examples import Rows, brief, not_among, read_splits
from input_pipeline.labels import class_names
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


def json_values(places: list[str], name: str) -> Iterator[object]:
    """Yields a key of the JSON objects at 'FILE:LINE', which the reader has checked."""
    files: dict[str, list[str]] = {}
    for file, _, line in (place.rpartition(':') for place in places):
        if '.jsonl' not in file.lower():
            raise UserError(f'{file}: expected .jsonl, like the training data')
        if file not in files:
            files[file] = contents(file).split('\n')
        record = json.loads(files[file][int(line) - 1])
        if name not in record:
            raise UserError(f'{file}:{line}: key {not_among(name, record)}')
        yield record[name]


def read_labels(data: DataConfig, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Returns texts and their labels, which are the last feature of rows that are not JSON."""
    count = len(data.text_features)
    places = [rows.place(row) for row in range(len(rows.texts))]
    cells = (row[-1] for row in rows.texts)
    values = cells if len(rows.texts[0]) > count else json_values(places, data.label_feature)
    labels = []
    for place, row, value in zip(places, rows.texts, values, strict=True):
        parts = value.split(data.label_separator) if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(type(part) in (str, int) for part in parts):
            raise UserError(f'{place}: labels {brief.repr(value)}, expected a list or some text')
        if not any(row[:count]):
            raise UserError(f'{place}: no text, expected some')
        labels.append([text for part in parts if (text := str(part).strip())])
    return [SEPARATOR.join(row[:count]) for row in rows.texts], labels


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
    features = (*data.text_features, data.label_feature)
    rows = read_splits(data, features[: -1 if '.jsonl' in data.train.lower() else None])
    train, evaluation = (read_labels(data, split) for split in rows)
    flat = [(row, label) for row, found in enumerate(train[1]) for label in found]
    names = class_names([label for _, label in flat], lambda n: rows[0].place(flat[n][0]))
    for row, found in enumerate(evaluation[1]):
        for label in set(found) - set(names):
            raise UserError(f'{rows[1].place(row)}: label {not_among(label, names)}')
    train_split, eval_split = (
        LabelledSplit(texts, np.array([[n in x for n in names] for x in labels], int), skipped)
        for (texts, labels), (*_, skipped) in zip((train, evaluation), rows, strict=True)
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
