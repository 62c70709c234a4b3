"""Trains a run from its config.

    python train.py --config=configs/reviews.py --workdir=DIR [--config.FIELD=VALUE ...]

If the workdir holds a run, training resumes from its newest checkpoint, with the same bits
as if it had never stopped, on any number of devices that divides `num_shards`. Add --help to list
the options of a config. docs/reliability.md explains the exit codes.
"""

import functools
import logging
from contextlib import closing

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

import tasks
from configs import schema
from configs.schema import Config
from errors import REQUEUE
from input_pipeline.batches import eval_batches, padding_share, train_batches
from reporting import log, summary
from reporting.loggers import default_loggers
from reporting.profile import Profile
from reporting.start_report import report_saving, start_report
from runtime import backend, command_line, lock, preemption, processes, resume, warm_start
from runtime.checkpoints import Checkpoints
from runtime.ledger import Ledger
from training import keys
from training.early_stopping import EarlyStopping
from training.evaluation import make_evaluate
from training.mesh import make_layout, make_mesh
from training.optimizer import make_optimizer
from training.row import row_columns
from training.state import abstract_state, make_create_state
from training.step import make_train_step

CONFIG = config_flags.DEFINE_config_file('config', None, 'The run: a file like those in configs/.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; a run in it is resumed.')
ALLOW_CHANGES = flags.DEFINE_bool('allow_changes', False, 'Resume with another config or data.')
STOP_TIMEOUT = flags.DEFINE_integer('stop_timeout', 25, 'Seconds from SIGTERM to the exit.', 1)
PROFILE = flags.DEFINE_string('profile', '', 'START:STOP, steps to trace into WORKDIR/profile.')
JOIN_TIMEOUT = flags.DEFINE_integer('join_timeout', 300, 'Seconds to wait for other processes.')


def main() -> None:
    """Checks the command, fixes the environment that bits depend on, and trains."""
    config = command_line.checked_config(CONFIG)
    workdir = command_line.check_workdir(WORKDIR.value)
    stop = preemption.StopRequest().listen(STOP_TIMEOUT.value)
    profile = Profile(PROFILE.value, workdir)
    backend.prepare(resume.saved_threads(workdir) or config.cpu_threads, config.matmul_precision)
    processes.join(JOIN_TIMEOUT.value)
    with processes.bounded_end():
        backend.check()
        log.start_logging()
        with lock.exclusive_workdir(workdir):
            train(config, workdir, ALLOW_CHANGES.value, stop, profile)


def train(
    config: Config,
    workdir: epath.Path,
    allow_changes: bool = False,
    stop: preemption.StopRequest | None = None,
    profile: Profile | None = None,
) -> summary.Summary:
    """Brings the run in `workdir` to its last step. Returns the contents of its summary.json.

    Saves the newest step and raises SystemExit when asked to stop early.
    """
    stop, profile = stop or preemption.StopRequest(), profile or Profile()
    task = tasks.make_task(config, warm_start.origin_record(config, workdir))
    facts = task.resume_facts
    command = {'workdir': str(workdir), 'allow_changes': allow_changes}
    processes.require_same(schema.to_dict(config), command, facts)

    # A workdir with a checkpoint holds a run, and this launch must be its continuation.
    checkpoints = Checkpoints(workdir, config.keep_newest, config.keep_best, task.best_metric)
    saved = checkpoints.newest_record()
    config, record = resume.plan(config, facts, workdir, saved, allow_changes)
    layout = make_layout(config, record['manifest']['num_shards'], make_mesh())

    # A new run makes its root key from the seed; a resumed run finds it in the checkpoint.
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    create_state = make_create_state(task.init, optimizer, layout)
    if saved:
        # Damaged checkpoints are passed over.
        state, saved = checkpoints.restore(abstract_state(create_state, config.prng_impl))
    else:
        roots = keys.root_keys(config.seed, config.prng_impl, vars(config.seeds))
        names, make_predictor = task.token_names, tasks.predictor_from_record
        state = warm_start.apply_init(create_state(roots), config, names, layout, make_predictor)
    start, padding = int(state.step), padding_share(task.train.lengths, config)
    start_report(config, layout, state, workdir, bool(saved), task.summary, task.warnings, padding)
    patience = EarlyStopping(task.best_metric, config.patience, facts['evaluation_data'], saved)
    record['evaluations'] = patience.evaluations  # grows with them
    ended = start >= config.num_steps or patience.ended
    if ended and (finished := summary.finished_summary(workdir, start, record)):
        return finished
    summary.write_inputs(workdir, config, task.files)

    # A batch is a pure function of (root key, step); each process loads its own rows.
    epoch_seed = functools.partial(keys.epoch_seed, keys.local_copy(state.root_keys))
    rows, eval_rows = map(layout.process_rows, (config.batch_size, config.eval_batch_size))
    batches = train_batches(task.train, config, epoch_seed, rows, start, task.sampling_weights)
    held_out = functools.partial(eval_batches, task.evaluation, config, eval_rows)

    train_step = make_train_step(task.loss_sums, optimizer, config.optimizer.clip_norm, layout)
    evaluate = make_evaluate(task.eval_sums, task.metrics, layout, held_out)
    columns, policy = row_columns(task.sum_names), config.optimizer.on_nonfinite
    ledger = Ledger(workdir / 'ledger', columns, start, policy, writes=jax.process_index() == 0)
    run_log = log.RunLog(default_loggers(workdir, start), task.metrics, config, ledger, state)
    metrics = None

    with closing(run_log), closing(checkpoints), closing(ledger), closing(profile):
        if not saved:
            checkpoints.save(state, record)  # from here on, this root key is the run's
            report_saving(checkpoints.seconds_since_save())
        for step, batch in enumerate([] if ended else batches, start + 1):
            with jax.transfer_guard('disallow'), profile.step(step):
                state, row = train_step(state, layout.put(batch))
            run_log.add(ledger.add(row), checkpoints.poll())
            last = step == config.num_steps
            decision = not last and stop.agreed(layout, checkpoints.due(config.checkpoint_minutes))
            saving = last or decision or step % config.checkpoint_every == 0
            evaluating = last or step % config.eval_every == 0
            if saving or evaluating:
                run_log.add(ledger.drain())
            metrics = evaluate(state.params) if evaluating else None
            if metrics:
                patience.add(step, metrics)
                ending = last or patience.ended
                run_log.evaluation(step, metrics, task.samples(state.params), ending)
            if saving or patience.ended:
                run_log.flush()
                # The ledger is written first, so that no checkpoint lacks its past.
                checkpoints.save(state, record, metrics, ledger.write_segment)
            if patience.ended:
                break
            if decision == preemption.STOP:
                logging.info('stopped after step %d as asked; start again to resume', step)
                raise SystemExit(REQUEUE)

    metrics = metrics or evaluate(state.params)
    for warning in (*task.warnings, *task.doubts(metrics)):
        logging.warning('%s', warning)
    return summary.write_summary(workdir, state, record, metrics, run_log.examples_per_second)


if __name__ == '__main__':
    command_line.run(main)
