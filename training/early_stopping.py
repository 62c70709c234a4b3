"""Decides when to stop early: a pure function of the evaluations that the run record holds.

So a resumed run stops at the same step as one that was never killed.
"""

import logging

import numpy as np

from arrays import Metrics, Tree

Evaluations = list[tuple[int, float]]  # step, and a metric of which more is better


class EarlyStopping:
    """Keeps the best evaluation and all after it."""

    def __init__(self, metric: str, patience: int, data: str, saved: Tree | None) -> None:
        """Continues from the record `saved`, if that has this metric on this evaluation data."""
        self._metric, self._patience = metric, patience
        key = f'{metric} of {data}'
        recorded = (saved or {}).get('evaluations', {})
        self._recent: Evaluations = recorded.get(key, [])
        self.evaluations = {key: self._recent}  # for the run record; `add` changes the list

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes an evaluation."""
        self._recent[:] = since_best([*self._recent, (step, metrics[self._metric])])
        if self.ended:
            best = self._recent[0][0]
            logging.info('stopping early: no better %s since step %d', self._metric, best)

    @property
    def ended(self) -> bool:
        """Whether as many evaluations as the patience brought no better one."""
        return stopped(self._recent, self._patience)


def stopped(recent: Evaluations, patience: int) -> bool:
    """Returns whether as many evaluations as the patience came after the best one, in vain."""
    return 0 < patience < len(recent)


def since_best(evaluations: Evaluations) -> Evaluations:
    """Returns the best evaluation, of equals the earliest, and all after it."""
    values = [-np.inf if value != value else value for _, value in evaluations]
    return evaluations[values.index(max(values)) :] if values else []
