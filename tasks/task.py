"""Defines what the trainer knows of a task: examples, and pure functions of parameters and rows."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from arrays import Batch, HostBatch, Metrics, Params, Rngs, Sums, Totals
from input_pipeline.batches import Examples

Json = dict[str, Any]  # the facts of a run, its record, or a prediction


@dataclasses.dataclass(frozen=True)
class Task:
    """Holds all that the trainer knows of what is learned; every task module makes one."""

    train: Examples
    evaluation: Examples
    init: Callable[[jax.Array], Params]  # key -> parameters
    loss_sums: Callable[[Params, Batch, Rngs, jax.Array], Sums]
    """(parameters, rows, rngs, step) -> float32[] sums over the rows, each weighted by 'weights'.

    'loss' / 'weight' is minimized, 'tokens' counts unpadded tokens; `step`: finished steps.
    """
    eval_sums: Callable[[Params, Batch], Sums]
    """(parameters, rows) -> the same sums and perhaps more. Draws no random number."""
    sum_names: tuple[str, ...]  # the names of the loss sums
    metrics: Callable[[Totals], Metrics]  # training or evaluation totals -> metrics
    best_metric: str  # evaluation metric, larger is better, by which checkpoints are kept
    resume_facts: Json
    """JSON for every checkpoint, which a resume must not change: 'evaluation_data', and all that
    `make_predictor` needs."""
    files: dict[str, str]  # name -> text of files in the workdir, for people and tools
    summary: str  # one line for the start of the log
    token_names: Sequence[str] = ()  # token of each row of params['embedding']
    warnings: tuple[str, ...] = ()  # what is odd about the data, each in one line
    doubts: Callable[[Metrics], Iterable[str]] = lambda _: ()  # metrics -> warnings
    sampling_weights: np.ndarray | None = None  # float64[N], how often training draws each example
    details: Callable[[Totals], list[str]] = lambda _: []
    """evaluation totals -> lines that tools.evaluate prints below the metrics."""
    samples: Callable[[Params], list[str]] = lambda _: []
    """parameters -> lines that show what the model does with a few examples."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Predicts on new texts; made from the config and the facts of a checkpoint alone."""

    init: Callable[[jax.Array], Params]  # key -> parameters
    encode: Callable[[list[str]], HostBatch]
    """N texts -> arrays [N, ...]. Raises UserError for a text that it cannot predict from."""
    apply: Callable[[Params, Batch], Any]  # (parameters, rows) -> arrays [N, ...]
    show: Callable[[Any, int, str], Json]  # (result of apply on the host, row, text) -> JSON
    notes: Callable[[str], Json] = lambda _: {}  # text -> JSON about unknown or cut parts
    features: tuple[str, ...] = ('text',)  # the columns of a file that make up a text
    join: Callable[[Sequence[str]], str] = ' '.join  # their values -> the text
