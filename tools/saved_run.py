"""Opens a saved run: its record, config, task, predictor and parameters."""

import argparse
import dataclasses
import math
from typing import Any

import jax
from etils import epath

import tasks
from configs.schema import Config
from errors import UserError
from input_pipeline.examples import SHARE
from runtime import backend, resume
from runtime.checkpoints import Checkpoints
from runtime.run_record import RunRecord
from runtime.warm_start import restore_target
from tasks.task import Predictor, Task
from tools.arguments import existing_run
from training.mesh import Layout, make_layout, make_mesh
from training.state import TrainState


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run."""

    folder: epath.Path
    step: int
    record: RunRecord
    config: Config

    def predictor(self) -> Predictor:
        """Makes the predictor, which needs no data."""
        return tasks.predictor_from_record(self.record)[1]

    def task(self, evaluation: str = '') -> Task:
        """Makes the task, on another evaluation split or file if one is given.

        Raises UserError if its data cannot be read, or is not what the run was trained on.
        """
        config, unchanged = self.config, dict(self.record['task'])
        if evaluation:
            if share := SHARE.fullmatch(config.data.evaluation):  # stays out of the training split
                evaluation = f'{share[1]}%:{evaluation}'
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, evaluation=evaluation)
            )
            del unchanged['evaluation_data']
        task = tasks.make_task(config, self.record if config.init.run else None)
        if changed := resume.task_changes(unchanged, task.resume_facts):
            raise UserError(f'the data is not what the run was trained on: {changed[0]}')
        return task

    def best_metric(self) -> str:
        """Returns the metric of the best checkpoints. Older records lack it, so the task says."""
        return self.record['manifest'].get('best_metric') or self.task().best_metric

    def layout(self, most: int = 0) -> Layout:
        """Spreads the shards over the devices of this machine, or over `most` of them."""
        devices, shards = jax.devices(), self.record['manifest']['num_shards']
        # Shards are a power of two, and only a power of two divides them.
        count = min(shards, 2 ** (min(most or len(devices), len(devices)).bit_length() - 1))
        return make_layout(self.config, shards, make_mesh(devices[:count]))

    @property
    def checkpoints(self) -> Checkpoints:
        """Returns the checkpoints of the run."""
        return Checkpoints(self.folder)

    def state(self, init: Any, layout: Layout) -> TrainState:
        """Reads the state. Raises UserError if the checkpoint is damaged."""
        return self.checkpoints.read(self.step, restore_target(self.config, init, layout))[0]

    def params(self, init: Any) -> Any:
        """Reads the parameters onto one device. Raises UserError if the checkpoint is damaged."""
        return self.state(init, self.layout(1)).params


def add_step_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --step, which chooses a checkpoint."""
    parser.add_argument(
        '--step', type=step_or_best, metavar='N|best',
        help='step of a checkpoint, or the best by evaluation metric (default: the newest)',
    )  # fmt: skip


def step_or_best(text: str) -> int | str:
    """Parses the value of --step."""
    if text == 'best' or text.isdecimal():
        return text if text == 'best' else int(text)
    raise argparse.ArgumentTypeError(f'{text!r}: expected a step, or best')


def open_run(workdir: str, step: int | str | None = None) -> SavedRun:
    """Opens a checkpoint of a run, by default the newest. Call it before any device is used.

    Raises UserError if there is no such checkpoint or its record is damaged.
    """
    folder = existing_run(workdir)
    # Predictions and metrics are computed as in training: same flags, threads and precision. The
    # first two come before a record is read, which starts JAX.
    backend.prepare(resume.saved_threads(folder))
    backend.check()
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f'{folder}: expected the workdir of a run, found no checkpoint')
    if isinstance(step, int) and step not in steps:
        raise UserError(
            f'--step={step}: {folder} has checkpoints of steps {", ".join(map(str, steps))}'
        )
    run = open_step(folder, step if isinstance(step, int) else steps[-1])
    if step == 'best':
        scores = checkpoints.scores(run.best_metric())
        if max(scores.values()) == -math.inf:
            raise UserError(
                f'--step=best: no checkpoint of {folder} was evaluated; expected one of its steps, '
                f'{", ".join(map(str, steps))}'
            )
        return open_step(folder, max(scores, key=scores.__getitem__))  # of equals, the earliest
    return run


def open_step(folder: epath.Path, step: int) -> SavedRun:
    """Opens a checkpoint of a run that is open already. Raises UserError if it is damaged."""
    record = Checkpoints(folder).record(step)
    config = tasks.config_from_record(record)
    jax.config.update('jax_default_matmul_precision', config.matmul_precision)
    return SavedRun(folder, step, record, config)
