"""Names the types of arrays that tasks, steps and reports exchange."""

from typing import Any

import jax
import numpy as np

Tree = Any  # a tree of arrays: parameters, gradients, optimizer state, their shapes or specs
Params = Tree  # as Linen makes them
Batch = dict[str, jax.Array]  # every array [B, ...]
HostBatch = dict[str, np.ndarray]  # the same on the host
Rngs = dict[str, jax.Array]  # Linen's, by stream
Sums = dict[str, jax.Array]  # float32[] sums over examples; 'loss' / 'weight' is minimized
Totals = Tree  # name -> a sum over all examples: a number, or in evaluation an array of them
Metrics = dict[str, float]
