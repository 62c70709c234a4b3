"""Exact evaluation: every example once, sums on the devices, one division at the end."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from training.mesh import Layout
from training.step import EvalSums, make_eval_step

Metrics = dict[str, float]


def make_evaluate(
    eval_sums: EvalSums,
    metrics: Callable[[Metrics], Metrics],
    layout: Layout,
    batches: Callable[[], Iterator[dict[str, np.ndarray]]],
) -> Callable[[Any], Metrics]:
    """params -> metrics over all `batches()`, this process's rows of batches of one shape."""
    eval_step = make_eval_step(eval_sums, layout)

    def evaluate(params: Any) -> Metrics:
        sums = jax.device_get([eval_step(params, layout.put(batch)) for batch in batches()])
        # A batch's float32 sums are exact bits; adding them in float64 keeps them so.
        return metrics({name: float(sum(np.float64(s[name]) for s in sums)) for name in sums[0]})

    return evaluate
