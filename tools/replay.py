"""Runs one step of a run again and shows what happens in it.

    python -m tools.replay RUN [--step N|best]

Trains from the newest checkpoint before step N, or else from the root keys of the run, up to N.
That gives the same bits on any number of devices: JAX_NUM_CPU_DEVICES=1 for one. Prints the loss,
the gradient norm of each module, the examples with the largest loss, and whether the ledger has the
same bits. Without --step it is the step of the newest checkpoint. Nothing in RUN changes.

Exit code 0: the ledger has the same bits, or no such step. 1: it has others. 2: bad input.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

import tasks
from arrays import HostBatch
from configs.schema import Config
from errors import UserError
from input_pipeline.batches import batch_order, train_batches
from runtime import ledger, resume, warm_start
from tasks.task import Task
from tools.arguments import Arguments, one_line_errors, run_tool
from tools.saved_run import SavedRun, add_step_argument, open_run, open_step
from training import keys
from training.mesh import Layout
from training.optimizer import make_optimizer
from training.row import row_columns
from training.state import TrainState, make_create_state, root_key_hex
from training.step import make_gradient, make_update

SHOWN = 5  # examples
PROGRESS_SECONDS = 10.0


@one_line_errors
def main(argv: Sequence[str]) -> int:
    """Prints the step; returns the exit code."""
    parser = Arguments(__doc__)
    parser.add_argument('run', help='workdir of a run')
    add_step_argument(parser)
    given = parser.parse_args(argv)
    step = given.step if isinstance(given.step, int) else open_run(given.run, given.step).step
    return 0 if replay(given.run, step) else 1


def replay(workdir: str | epath.Path, step: int) -> bool:
    """Prints step `step` (from 1). Returns whether the ledger has the same bits, or no such step.

    Raises UserError if the run has no such step.
    """
    saved = open_run(str(workdir))
    if not 1 <= step <= saved.config.num_steps:
        raise UserError(
            f'--step={step}: expected 1 to {saved.config.num_steps}, the steps of the run'
        )
    steps = saved.checkpoints.steps()
    before = max((s for s in steps if s < step), default=0)
    saved = open_step(saved.folder, before if before in steps else min(steps))
    ledger_rows = ledger.read(saved.folder / 'ledger')  # before the work, since it may be damaged
    task, layout = saved.task(), saved.layout()
    facts = task.resume_facts
    config, _ = resume.plan(saved.config, facts, saved.folder, saved.record, allow_changes=False)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    if before in steps:
        state = saved.state(task.init, layout)
        origin = f'checkpoint {before}'
    else:
        state = first_state(saved, make_create_state(task.init, optimizer, layout))
        names, make = task.token_names, tasks.predictor_from_record
        state = warm_start.apply_init(state, config, names, layout, make)
        origin = 'the root keys'
    print(f'training from {origin} up to step {step}, on {layout.mesh.size} device(s)', flush=True)

    # A copy, since the loader's threads use it while the state's buffers are donated.
    epoch_seed = functools.partial(keys.epoch_seed, keys.local_copy(state.root_keys))
    gradient = make_gradient(task.loss_sums, layout)
    update = make_update(optimizer, config.optimizer.clip_norm, layout)
    rows = layout.process_rows(config.batch_size)
    reported = time.monotonic()
    for batch in train_batches(task.train, config, epoch_seed, rows, before, task.sampling_weights):
        on_devices = layout.put(batch)
        finished = int(state.step)
        grads, sums, prints = gradient(state.params, state.root_keys, state.step, on_devices)
        if finished == step - 1:
            break
        state, _ = update(state, grads, sums, prints)
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            print(f'step {finished + 1} of {step}', flush=True)

    print(f'step {step}: loss {float(sums["loss"] / sums["weight"]):.6g}')
    for name, norm in module_norms(grads, sums['weight']):
        print(f'gradient norm of {name}: {norm:.6g}')
    print_largest_losses(task, config, layout, state, batch, epoch_seed, step)
    _, row = update(state, grads, sums, prints)
    return same_as_ledger(ledger_rows, step, np.asarray(row), row_columns(task.sum_names))


def first_state(saved: SavedRun, create_state: Any) -> TrainState:
    """Makes the state before the first step. Raises UserError if the record has other root keys."""
    config = saved.config
    seeds = vars(config.seeds)
    state: TrainState = create_state(keys.root_keys(config.seed, config.prng_impl, seeds))
    if (found := root_key_hex(state)) != (expected := saved.record['manifest']['root_key']):
        raise UserError(
            f'{saved.folder}: the seeds in the run record give the root key {found}, expected '
            f'{expected}; --step must be after its first checkpoint'
        )
    return state


def module_norms(grads: Any, weight: jax.Array) -> Iterator[tuple[str, float]]:
    """Yields (module, norm of its part of the mean gradient), in order of their names."""
    for name, part in sorted(grads.items()):
        yield name, float(optax.tree.norm(jax.tree.map(lambda g: g / weight, part)))


def print_largest_losses(
    task: Task, config: Config, layout: Layout, state: TrainState, batch: HostBatch,
    epoch_seed: Any, step: int,
) -> None:  # fmt: skip
    """Prints the examples of the batch whose losses are not finite, or else the largest."""
    order = batch_order(
        task.train.lengths,
        config.batch_size,
        config.data.window_batches,
        epoch_seed,
        task.sampling_weights,
    )
    losses = example_losses(task, layout, state, batch)
    ranked = np.argsort(np.where(np.isfinite(losses), -losses, -np.inf), kind='stable')
    for place in map(int, ranked[:SHOWN]):
        example = order(step - 1)[place]
        label = f', label {batch["labels"][place]}' if 'labels' in batch else ''
        where = f'row {place}, training example {example}, loss {losses[place]:.6g}'
        print(f'{where}: {task.train.text(example)!r}{label}')


def example_losses(task: Task, layout: Layout, state: TrainState, batch: HostBatch) -> np.ndarray:
    """Returns the loss float32[B] of each example, with the masks of the step.

    The loss is a sum over examples of weight times loss, so it is the gradient by the weights.
    """

    @jax.jit
    def of_shard(state: TrainState, rows: dict[str, jax.Array], shard: jax.Array) -> jax.Array:
        rngs = keys.shard_rngs(state.root_keys, state.step, shard)

        def loss(weights: jax.Array) -> jax.Array:
            weighted = rows | {'weights': weights}
            return task.loss_sums(state.params, weighted, rngs, state.step)['loss']

        return jax.grad(loss)(rows['weights'])

    parts = {name: np.split(x, layout.num_shards) for name, x in batch.items()}
    state = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)
    return np.concatenate(
        [
            of_shard(state, {name: part[s] for name, part in parts.items()}, jnp.int32(s))
            for s in range(layout.num_shards)
        ]
    )


def same_as_ledger(rows: np.ndarray, step: int, row: np.ndarray, columns: dict[str, str]) -> bool:
    """Prints which words of a step's row differ from the ledger. Returns whether none does."""
    if not rows['step'][0] <= step <= rows['step'][-1]:
        print(f'the ledger ends at step {rows["step"][-1]}: nothing to compare with')
        return True
    saved = np.frombuffer(rows[step - rows['step'][0]].tobytes(), '<u4')
    wrong = [name for name, a, b in zip(columns, saved, row, strict=True) if a != b]
    differ = f'other bits than the ledger: {", ".join(wrong)}'
    print(differ if wrong else 'the same bits as the ledger')
    return not wrong


if __name__ == '__main__':
    run_tool(main)
