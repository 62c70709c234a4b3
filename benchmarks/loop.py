"""Compares the training loop with its bare step: the cost of data, log, ledger, checkpoints."""

import collections
import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from etils import epath

import tasks
import train
from benchmarks.common import Row, config
from configs.schema import Config
from input_pipeline.batches import train_batches
from reporting.profile import Profile
from runtime import backend
from runtime.checkpoints import Checkpoints
from runtime.ledger import IN_FLIGHT
from training import keys
from training.mesh import make_layout, make_mesh
from training.optimizer import make_optimizer
from training.state import make_create_state
from training.step import make_train_step

FIRST, LAST, ROUNDS = 128, 288, 3  # steps before FIRST compile every bucket


def measure() -> list[Row]:
    """Alternates runs of the trainer and of its step alone, over the same batches."""
    shards = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    measured = dataclasses.replace(config(), num_steps=LAST, num_shards=shards, eval_every=LAST)
    backend.prepare()
    default_interval = measured.checkpoint_every
    measured = dataclasses.replace(measured, checkpoint_every=(FIRST + LAST) // 2)
    bare, sizes = bare_loop(measured)
    whole, alone, blocked = [], [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as workdir, timed_saves() as saves:
            whole.append(trained(measured, epath.Path(workdir)))
            blocked.append(saves[1])  # in the middle; the first and the last are not timed
        alone.append(bare())
    count = measured.batch_size * (LAST - FIRST)
    steps = default_interval * np.median(whole) / (LAST - FIRST)
    return [
        ('the loop', count / float(np.median(whole)), 'examples/s'),
        ('its step alone', count / float(np.median(alone)), 'examples/s'),
        ('loop over step', float(np.median(np.divide(alone, whole))), ''),
        ('a checkpoint blocks the loop', float(np.median(blocked)), 's'),
        ('... of the default interval', 100 * float(np.median(blocked) / steps), '%'),
        *sizes,
    ]


def trained(measured: Config, workdir: epath.Path) -> float:
    """Trains; returns the seconds from the dispatch of step FIRST to that of step LAST."""
    watch = Watch()
    train.train(measured, workdir, profile=watch)
    return watch.at[LAST] - watch.at[FIRST]


class Watch(Profile):
    """Replaces a profile, and notes when steps begin."""

    def __init__(self) -> None:
        """Starts with no step noted."""
        super().__init__()
        self.at: dict[int, float] = {}

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Notes when a step is dispatched."""
        self.at[number] = time.perf_counter()
        yield


@contextlib.contextmanager
def timed_saves() -> Iterator[list[float]]:
    """Collects how long each `Checkpoints.save` keeps the loop waiting."""
    seconds: list[float] = []
    save = Checkpoints.save

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        save(*args)
        seconds.append(time.perf_counter() - began)

    with mock.patch.object(Checkpoints, 'save', timed):
        yield seconds


def bare_loop(measured: Config) -> tuple[Callable[[], float], list[Row]]:
    """Returns a timer of the same steps with batches on the devices, and the sizes of the state."""
    task = tasks.make_task(measured)
    layout = make_layout(measured, measured.num_shards, make_mesh())
    optimizer = make_optimizer(measured.optimizer, measured.num_steps)
    root = keys.root_keys(measured.seed, measured.prng_impl)
    state = make_create_state(task.init, optimizer, layout)(root)
    step = make_train_step(task.loss_sums, optimizer, measured.optimizer.clip_norm, layout)
    words = functools.partial(keys.epoch_seed, root)
    rows = layout.process_rows(measured.batch_size)
    batches = [layout.put(b) for b in train_batches(task.train, measured, words, rows, FIRST)]
    sizes = [
        (f'on each device: {name}', sum(x.nbytes for x in jax.tree.leaves(part)) / 2**20, 'MiB')
        for name, part in (('parameters', state.params), ('optimizer state', state.opt_state))
    ]
    for batch in {b['token_ids'].shape: b for b in batches}.values():
        state, _ = step(state, batch)  # compiles
    held = [jax.block_until_ready(state)]

    def seconds() -> float:
        state, in_flight = held.pop(), collections.deque[jax.Array]()
        began = time.perf_counter()
        for batch in batches:
            state, row = step(state, batch)
            in_flight.append(row)
            if len(in_flight) > IN_FLIGHT:  # with many more, simulated devices block each other
                jax.block_until_ready(in_flight.popleft())
        held.append(jax.block_until_ready(state))
        return time.perf_counter() - began

    return seconds, sizes
