"""Exact evaluation: counts every example once, sums on the devices, divides once at the end."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from arrays import HostBatch, Metrics, Totals, Tree
from training.mesh import Layout
from training.step import EvalSums, make_eval_step

# Yields this process's rows of global batches, all of one shape.
Batches = Callable[[], Iterator[HostBatch]]


def make_evaluate(
    eval_sums: EvalSums, metrics: Callable[[Totals], Metrics], layout: Layout, batches: Batches
) -> Callable[[Tree], Metrics]:
    """Returns the function params -> metrics."""
    totals = make_totals(eval_sums, layout, batches)
    return lambda params: {n: float(value) for n, value in metrics(totals(params)).items()}


def make_totals(eval_sums: EvalSums, layout: Layout, batches: Batches) -> Callable[[Tree], Totals]:
    """Returns the function params -> the evaluation sums, added over all `batches()`."""
    eval_step = make_eval_step(eval_sums, layout)

    def totals(params: Tree) -> Totals:
        sums = jax.device_get([eval_step(params, layout.put(batch)) for batch in batches()])
        # Each float32 sum is the same on every layout, and float64 additions in a fixed order
        # keep it so.
        return {name: sum(np.asarray(s[name], np.float64) for s in sums) for name in sums[0]}

    return totals
