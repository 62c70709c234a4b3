"""What the benchmarks share: the config they run, and how variants take turns."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs import reviews, sst2
from configs.schema import Config

ROOT = Path(__file__).resolve().parent.parent
HELD = (Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / 'glue' / 'sst2').exists()
CONFIG = 'configs/sst2.py' if HELD else 'configs/reviews.py'
Row = tuple[str, float, str]  # what, value, unit


def config() -> Config:
    """The config that is measured."""
    return (sst2 if HELD else reviews).get_config()


def in_turn(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds float64[rounds] of each variant, timed once in each round; the first is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


def ratio(seconds: np.ndarray, plain: np.ndarray) -> float:
    """The median, over rounds, of one variant's time over another's in the same round."""
    return float(np.median(seconds / plain))
