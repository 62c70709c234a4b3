"""Trains a run from its config.

    python train.py --config=configs/reviews.py --workdir=DIR [--config.FIELD=VALUE ...]

Started again in the same workdir, it goes on from the newest checkpoint as if nothing had
happened. One root key decides every batch, mask and parameter, on any number of devices.
docs/config.md has the fields of a config, docs/reliability.md the exit codes.
"""

import functools
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

import tasks
from configs import command_line, schema
from configs.schema import Config
from input_pipeline.batches import eval_batches, padding_share, train_batches
from training import backend, keys, lock, logs, processes, resume
from training.checkpoints import Checkpoints
from training.evaluation import make_evaluate
from training.layout import make_layout, make_mesh
from training.ledger import Ledger
from training.optimizer import make_optimizer, make_schedule
from training.preemption import EXIT_CODE, StopRequest
from training.profiling import Profile
from training.start_report import start_report
from training.state import abstract_state, make_create_state
from training.step import make_train_step, row_columns

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'What to run: a file as those in configs/.'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run lives; one that is there goes on.')
ALLOW_CHANGES = flags.DEFINE_bool(
    'allow_changes', False, 'Go on although config, data or devices lead the run elsewhere.'
)
STOP_TIMEOUT = flags.DEFINE_integer(
    'stop_timeout', 25, 'Seconds to save and stop in after SIGTERM or Ctrl-C.', lower_bound=1
)
PROFILE = flags.DEFINE_string(
    'profile', '', 'START:STOP, steps to trace into WORKDIR/profile, as in 100:110.'
)
JOIN_TIMEOUT = flags.DEFINE_integer(
    'join_timeout', 300, 'Seconds to wait for the other processes of the run.'
)


def main(_: Sequence[str]) -> None:
    """Checks what can be checked at once, pins the environment, trains."""
    config = command_line.loaded_config(CONFIG)
    workdir = command_line.usable_workdir(WORKDIR.value)
    stop = StopRequest()
    stop.listen(STOP_TIMEOUT.value)
    profile = Profile(PROFILE.value, workdir)
    backend.prepare(config.num_shards)
    backend.enable_compilation_cache()
    processes.join(JOIN_TIMEOUT.value)
    logs.start_logging()
    with processes.bounded_end(), lock.only_run_in(workdir):
        train(config, workdir, ALLOW_CHANGES.value, stop, profile)


def train(
    config: Config,
    workdir: epath.Path,
    allow_changes: bool = False,
    stop: StopRequest | None = None,
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Brings the run in `workdir` to its last step. Returns what its summary.json holds.

    Raises SystemExit, with the newest step saved, where it is asked to stop before.
    """
    stop, profile = stop or StopRequest(), profile or Profile()
    task = tasks.make_task(config)
    launch = {'workdir': str(workdir), 'allow_changes': allow_changes}
    processes.require_same(schema.to_dict(config), task.facts, launch)

    # A workdir with a checkpoint holds a run, and this launch must be its continuation.
    mesh = make_mesh()
    checkpoints = Checkpoints(workdir, config.keep_newest, config.keep_best, task.best_metric)
    saved = checkpoints.newest_header()
    config, header = resume.plan(config, task.facts, saved, mesh.size, workdir, allow_changes)
    layout = make_layout(config, header['manifest']['num_shards'], mesh)

    # The seed makes the root key of a new run; an old run's comes back with its state.
    schedule = make_schedule(config.optimizer, config.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    create_state = make_create_state(task.init, optimizer, layout)
    if saved:
        state = checkpoints.restore(abstract_state(create_state, config.prng_impl, layout))
    else:
        state = create_state(keys.root_key(config.seed, config.prng_impl))
    start = int(state.step)
    padding = padding_share(task.train.lengths, config)
    start_report(config, layout, task.summary, padding, state, workdir)
    if start >= config.num_steps and (summary := logs.read_summary(workdir, start)):
        logging.info('the run is finished at step %d: %s', start, summary['eval'])
        return summary
    logs.write_files(workdir, task.files | {'config.json': json.dumps(header['config'], indent=2)})

    epoch_words = functools.partial(keys.epoch_words, keys.local_copy(state.root_key))
    rows, eval_rows = layout.own_rows(config.batch_size), layout.own_rows(config.eval_batch_size)
    train_step = make_train_step(task.loss_sums, optimizer, config.optimizer.clip_norm, layout)
    batches = train_batches(task.train, config, epoch_words, rows, start)
    held_out = functools.partial(eval_batches, task.evaluation, config, eval_rows)
    evaluate = make_evaluate(task.eval_sums, task.metrics, layout, held_out)
    ledger = Ledger(workdir / 'ledger', row_columns(task.sum_names), start)
    log = logs.RunLog(workdir, task.metrics, schedule, config, ledger)

    def save(metrics: dict[str, float] | None) -> None:
        log.add(ledger.drain())
        with checkpoints.outlived():
            ledger.write_segment()  # before the checkpoint, so that none lacks its past
            log.keep()
            checkpoints.save(state, header, metrics)

    metrics = None
    with closing(log), closing(checkpoints), closing(ledger), closing(profile):
        if not saved:
            save(None)  # from here on, this root key is the run's
        for step, batch in enumerate(batches, start + 1):
            with jax.transfer_guard('disallow'), profile.step(step):
                state, row = train_step(state, layout.put(batch))
            log.add(ledger.add(row))
            log.saved(checkpoints.check())
            last, metrics = step == config.num_steps, None
            stopping = not last and stop.agreed(layout)
            if last or (step % config.eval_every == 0 and not stopping):
                log.add(ledger.drain())
                with log.paused():
                    metrics, samples = evaluate(state.params), task.samples(state.params)
                log.evaluation(step, metrics, samples)
            if last or stopping or step % config.checkpoint_every == 0:
                save(metrics)
            if stopping:
                logging.info('stopping after step %d as asked; start again to go on', step)
                sys.exit(EXIT_CODE)

    metrics = metrics or evaluate(state.params)
    return logs.write_summary(workdir, state, layout, metrics, log.examples_per_second)


if __name__ == '__main__':
    command_line.run(main)
