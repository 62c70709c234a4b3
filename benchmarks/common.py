"""The config that the benchmarks run, and how they time variants."""

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
    """Returns the config to measure."""
    return (sst2 if HELD else reviews).get_config()


def in_turn(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Times each variant once per round, after a warm-up. Returns seconds float64[rounds] each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


def ratio(seconds: np.ndarray, plain: np.ndarray) -> float:
    """Returns the median over rounds of one variant's time divided by another's."""
    return float(np.median(seconds / plain))
