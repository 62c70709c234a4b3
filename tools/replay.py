"""Runs one step of a run again and shows what is in it.

    python -m tools.replay RUN --step=K

From the newest checkpoint before step K the run is trained up to it, which gives the same bits, on
any number of devices: JAX_NUM_CPU_DEVICES=1 for one. Shown are the loss, the gradient norm of each
module, whether the ledger has the same bits, and the examples whose loss stands out. Nothing in RUN
is changed. Exit code 0: the bits of the ledger, or none there. 1: others. 2: bad input.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

import tasks
from errors import KeyfoldError, UserError
from input_pipeline.batches import batch_order, train_batches
from reporting import log as logs
from runtime import backend, ledger, resume
from runtime.checkpoints import Checkpoints
from runtime.command_line import existing_run, refuse
from tasks.task import Task
from tools.arguments import Arguments
from training import keys
from training.mesh import Layout, make_layout, make_mesh
from training.optimizer import make_optimizer, make_schedule
from training.row import row_columns
from training.state import TrainState, abstract_state, make_create_state
from training.step import make_gradient, make_update

SHOWN = 5  # examples


def main(argv: Sequence[str]) -> int:
    """Prints the step; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    parser.add_argument('--step', type=int, required=True, help='the step to run again, from 1')
    given = parser.parse_args(argv)
    logs.quiet_libraries()
    try:
        same = replay(existing_run(given.run), given.step)
    except KeyfoldError as error:
        refuse(error)
    return 0 if same else 1


def replay(run: epath.Path, step: int) -> bool:
    """Prints step `step` (from 1). Returns whether the ledger has the same bits.

    Raises UserError when no checkpoint is from before it.
    """
    checkpoints = Checkpoints(run, read_only=True)
    steps = checkpoints.steps()
    before = max((s for s in steps if s < step), default=None)
    if before is None:
        raise UserError(f'{run}: expected a checkpoint from before step {step}, found {steps}')
    saved = checkpoints.record(before)
    config = tasks.config_from_record(saved)
    backend.prepare(resume.recorded_cpu_threads(saved), config.matmul_precision)
    backend.check()
    task, mesh = tasks.make_task(config), make_mesh()
    now = resume.Launch(tasks.task_name(config), task.resume_facts, mesh.size, run)
    config, run_record = resume.plan(config, now, saved, allow_changes=False)
    layout = make_layout(config, run_record['manifest']['num_shards'], mesh)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.num_steps))
    create_state = make_create_state(task.init, optimizer, layout)
    state = checkpoints.read(before, abstract_state(create_state, config.prng_impl, layout))

    # A copy: the loader's threads use it while the state's buffers are donated.
    epoch_words = functools.partial(keys.epoch_words, keys.local_copy(state.root_keys))
    gradient = make_gradient(task.loss_sums, layout)
    update = make_update(optimizer, config.optimizer.clip_norm, layout)
    rows = layout.process_rows(config.batch_size)
    for batch in train_batches(task.train, config, epoch_words, rows, before):
        on_devices = layout.put(batch)
        grads, sums, prints = gradient(state.params, state.root_keys, state.step, on_devices)
        if int(state.step) == step - 1:
            break
        state, _ = update(state, grads, sums, prints)
    else:
        raise UserError(f'--step={step}: expected at most {config.num_steps}, the steps of the run')

    print(f'step {step}, from the checkpoint of step {before}, on {mesh.size} device(s)')
    print(f'loss {float(sums["loss"] / sums["weight"]):.9g}')
    for name, norm in module_norms(grads, sums['weight']):
        print(f'gradient norm of {name}: {norm:.9g}')
    order = batch_order(
        task.train.lengths, config.batch_size, config.data.window_batches, epoch_words
    )
    losses = example_losses(task, layout, state, batch)
    for place in worst(losses):
        example = order(step - 1)[place]
        print(f'row {place}, training example {example}, loss {losses[place]:.9g}: '
              + task.train.text(example))  # fmt: skip
    _, row = update(state, grads, sums, prints)
    return same_as_ledger(run, step, np.asarray(row), row_columns(task.sum_names))


def module_norms(grads: Any, weight: jax.Array) -> Iterator[tuple[str, float]]:
    """(module, norm of its part of the mean gradient), in order of their names."""
    for name, part in sorted(grads.items()):
        yield name, float(optax.tree.norm(jax.tree.map(lambda g: g / weight, part)))


def example_losses(
    task: Task, layout: Layout, state: TrainState, batch: dict[str, np.ndarray]
) -> np.ndarray:
    """The loss float32[B] of each example, under the masks of the step.

    The loss is a sum over examples of weight times loss, so it is the gradient by the weights.
    """

    @jax.jit
    def select_shard(state: TrainState, rows: dict[str, jax.Array], shard: jax.Array) -> jax.Array:
        rngs = keys.shard_rngs(state.root_keys, state.step, shard)

        def loss(weights: jax.Array) -> jax.Array:
            return task.loss_sums(state.params, rows | {'weights': weights}, rngs, state.step)[
                'loss'
            ]

        return jax.grad(loss)(rows['weights'])

    parts = {name: np.split(x, layout.num_shards) for name, x in batch.items()}
    state = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)
    return np.concatenate(
        [
            select_shard(state, {name: part[s] for name, part in parts.items()}, jnp.int32(s))
            for s in range(layout.num_shards)
        ]
    )


def worst(losses: np.ndarray) -> list[int]:
    """The places that are not finite, or else of the largest losses."""
    order = np.argsort(np.where(np.isfinite(losses), -losses, -np.inf), kind='stable')
    return [int(place) for place in order[:SHOWN]]


def same_as_ledger(run: epath.Path, step: int, row: np.ndarray, columns: dict[str, str]) -> bool:
    """Says which of the words of a step's row are not those of the run's ledger."""
    book = ledger.read(run / 'ledger')
    if not book['step'][0] <= step <= book['step'][-1]:
        print(f'the ledger ends at step {book["step"][-1]}: nothing to compare with')
        return True
    words = book[step - book['step'][0]].tobytes()
    found = np.frombuffer(words, '<u4')
    wrong = [name for name, a, b in zip(columns, found, row, strict=True) if a != b]
    print(f'not the bits of the ledger: {", ".join(wrong)}' if wrong else 'the bits of the ledger')
    return not wrong


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
