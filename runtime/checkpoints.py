"""Saves checkpoints while training continues, commits them atomically, verifies them when read.

A checkpoint `checkpoints/STEP` holds two Orbax items: `state`, the arrays of a TrainState, and
`run`, the run record as JSON: config, task facts such as the vocabulary, and a manifest with the
state's fingerprint. Nothing in it is code.
"""

import contextlib
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from errors import Damaged, RunError, SaveFailed, Unavailable, UserError, first_line
from runtime import processes, storage
from runtime.run_record import RunRecord, read_record, seal
from training import keys
from training.state import TrainState, root_key_hex, state_fingerprint, structure

Found = TypeVar('Found')


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self, workdir: epath.Path, keep_newest: int = 1, keep_best: int = 0, metric: str = ''
    ) -> None:
        """`metric`: the evaluation metric that ranks the best; larger is better."""
        self._directory, self._quarantine = workdir / 'checkpoints', workdir / 'damaged'
        self._keep_newest, self._keep_best, self._metric = keep_newest, keep_best, metric
        self._scores: dict[int, float] = {}  # step -> metric; -inf where it was not evaluated
        self._saving: int | None = None  # the step of a save under way
        self._committed: int | None = None  # the newest step known to be committed
        self._problem: SaveFailed | None = None  # of the last save
        self._saved = time.monotonic()  # when the last save began

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, in order."""
        with storage.access_checked(self._directory):
            if storage.in_bucket(self._directory):
                return sorted(ocp.utils.checkpoint_steps(self._directory))
            for _ in range(2):  # a network mount may miss it once
                with contextlib.suppress(FileNotFoundError):
                    # A rename commits, so names suffice; Orbax would skip unreadable ones.
                    names = [path.name for path in self._directory.iterdir()]
                    return sorted(int(name) for name in names if name.isdecimal())
        return []

    def newest_record(self) -> RunRecord | None:
        """Returns the newest undamaged run record, or None without a checkpoint."""
        return self._newest_undamaged(self.record)

    def record(self, step: int) -> RunRecord:
        """Returns the run record of a step. Raises Damaged, UserError or Unavailable."""
        checkpoint = self._directory / str(step)
        with damage_proved(checkpoint):
            return read_record(checkpoint)

    def restore(self, target: TrainState) -> tuple[TrainState, RunRecord]:
        """Returns the newest undamaged state, as `target` is shaped and sharded, and its record.

        A damaged one is logged and moved to `damaged/`, never deleted. Raises UserError when
        `target` is another model's state, or all checkpoints are damaged.
        """
        restored = self._newest_undamaged(lambda step: self.read(step, target))
        assert restored is not None, 'restore without a checkpoint'
        self._committed = int(restored[0].step)
        return restored

    def read(self, step: int, target: TrainState) -> tuple[TrainState, RunRecord]:
        """Returns a step's state and record. Raises as `record`; UserError for another model."""
        record, checkpoint = self.record(step), self._directory / str(step)
        manifest = record['manifest']
        refuse_other_model(manifest['structure'], structure(target))
        # Version 0.1 saved one root key for all streams.
        one_root = '.root_key' in manifest['structure']
        fields = {name: getattr(target, name) for name in ('step', 'params', 'opt_state')}
        saved_as = fields | {'root_key': target.root_keys.params} if one_root else target
        with damage_proved(checkpoint):
            # Orbax's checkpointers would wait for the other processes; one may have failed.
            args = ocp.args.StandardRestore(saved_as)
            sys.unraisablehook = ignore_closed_loops
            state = ocp.StandardCheckpointHandler().restore(checkpoint / 'state', args=args)
        if one_root:
            root = state.pop('root_key')
            roots = keys.RootKeys(*(jnp.copy(root) for _ in keys.Stream))
            state = TrainState(root_keys=roots, **state)
        with damage_proved(checkpoint):  # every process has restored: slices can be gathered
            found = (root_key_hex(state), state_fingerprint(state))
            if found != (manifest['root_key'], manifest['state_fingerprint']):
                expected = manifest['state_fingerprint']
                raise ValueError(f'fingerprint of the state is {found[1]}, expected {expected}')
        return state, record

    def save(
        self,
        state: TrainState,
        run_record: RunRecord,
        metrics: dict[str, float] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Copies the state to the host and returns; threads write and commit it.

        Calls `before` first, whose files a checkpoint relies on. A failure is logged, and the next
        save tries again. With several processes it raises SaveFailed, since the others would wait,
        or Unavailable if another one is gone.
        """
        self._finish()
        step, self._saved = int(jax.device_get(state.step)), time.monotonic()
        manifest = run_record['manifest'] | {
            'structure': structure(state),
            'root_key': root_key_hex(state),
            'state_fingerprint': state_fingerprint(state),
            'evaluation': metrics,
            'best_metric': self._metric,
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave(seal(run_record | {'manifest': manifest})),
        )
        with self._failure_noted():
            before()
            self._scores[step] = score(manifest, self._metric)
            self._manager.save(step, args=items, force=True)
            self._saving = step

    def poll(self) -> int | None:
        """Returns the newest committed step. Logs a save that has failed since the last call."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._finish()
        return self._committed

    def seconds_since_save(self) -> float:
        """Returns seconds since the last save (or the start) began."""
        return time.monotonic() - self._saved

    def due(self, minutes: float) -> bool:
        """Returns whether `minutes` have passed since the last save began; never for 0."""
        return 0 < 60 * minutes <= self.seconds_since_save()

    def close(self) -> None:
        """Waits for the last save. Raises SaveFailed if it failed, unless an error ends the run."""
        self._finish()
        if '_manager' in vars(self):
            with contextlib.suppress(Exception):  # raises the failure of the last save again
                self._manager.close()
        if self._problem and isinstance(sys.exc_info()[1], SystemExit | None):
            raise self._problem

    def _finish(self) -> None:
        """Waits for the save under way, if there is one."""
        step, self._saving = self._saving, None
        if step is not None:
            with self._failure_noted():
                self._manager.wait_until_finished()  # raises what ended the save
                self._committed = step

    @contextlib.contextmanager
    def _failure_noted(self) -> Iterator[None]:
        self._problem = None
        try:
            yield
        except Exception as error:  # OSError, or what Orbax and TensorStore turn it into
            problem = first_line(error)
            self._problem = SaveFailed(
                f'{self._directory}: the last checkpoint could not be written ({problem}); '
                'those before it are intact: fix the storage and start again'
            )
            if jax.process_count() > 1:
                if isinstance(error, jax.errors.JaxRuntimeError):  # of a collective, not of storage
                    raise Unavailable(f'another process does not answer ({problem})') from error
                raise self._problem from error
            logging.error('checkpoint: could not be written: %s', problem)

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Writes and deletes checkpoints; knows the scores of earlier launches."""
        self._scores |= self.scores(self._metric)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def scores(self, metric: str) -> dict[int, float]:
        """Returns step -> metric for all readable checkpoints, in order."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(RunError):  # without a score, it is kept
                found[step] = score(self.record(step)['manifest'], metric)
        return found

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Tells Orbax which checkpoints to keep: the newest, the best, and unreadable ones.

        The earliest wins ties, as for `--step best`.
        """
        steps = [checkpoint.step for checkpoint in checkpoints]
        evaluated = [step for step in steps if self._scores.get(step, -math.inf) > -math.inf]
        best = sorted(evaluated, key=lambda step: -self._scores[step])[: self._keep_best]
        newest = steps[-self._keep_newest :]
        return [step in (*newest, *best) or step not in self._scores for step in steps]

    def _newest_undamaged(self, read: Callable[[int], Found]) -> Found | None:
        """Returns `read(step)` of the newest undamaged step; quarantines newer, damaged ones."""
        steps = self.steps()
        # On a shared mount, one host may see an older list for a while.
        processes.require_same({'checkpoints': steps}, error=Unavailable)
        for step in reversed(steps):
            for _ in range(2):  # a transient error is no damage
                try:
                    return read(step)
                except Damaged as error:
                    problem = str(error)
            logging.warning('%s; moving it to %s', problem, self._quarantine)
            with processes.agreed(self._quarantine), storage.access_checked(self._quarantine):
                if jax.process_index() == 0:
                    self._move(step, problem)
        with storage.access_checked(self._quarantine), contextlib.suppress(FileNotFoundError):
            if any(self._quarantine.iterdir()):
                raise UserError(
                    f'{self._quarantine}: no intact checkpoint is left; repair one and move '
                    f'it back to {self._directory}, or start over in another workdir'
                )
        return None

    def _move(self, step: int, problem: str) -> None:
        alike = self._quarantine.glob(f'{step}*')
        number = sum(path.name.partition('.')[0] == str(step) for path in alike)
        name = f'{step}.{number}' if number else str(step)
        # The reason first: in a bucket a folder exists only once something is in it.
        storage.write_whole(self._quarantine / f'why-{name}.txt', f'{problem}\n'.encode())
        (self._directory / str(step)).rename(self._quarantine / name)


def score(manifest: dict[str, Any], metric: str) -> float:
    """Returns a metric of a checkpoint's evaluation; -inf without one, or if it is not a number."""
    value: float = (manifest.get('evaluation') or {}).get(metric, -math.inf)
    return -math.inf if math.isnan(value) else value


def ignore_closed_loops(unraisable: Any) -> None:
    """Prints unraisable errors, except 'Event loop is closed'.

    After a failed restore, TensorStore's threads raise it once per array.
    """
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def damage_proved(checkpoint: epath.Path) -> Iterator[None]:
    """Turns an error inside into Damaged if proven, else into UserError or Unavailable.

    Orbax raises alike for a cut file and one it could not open. Damage is proved if no error in the
    chain is one of access and every file can be read. A folder with neither `state` nor `run` is
    another program's: UserError. If one process raises, all do.
    """
    with processes.agreed(checkpoint):
        try:
            yield
        except Exception as error:
            problem, kind = error, storage.access_error(error)
            try:  # decides, since Orbax may report "File exists" for a folder it cannot stat
                storage.read_through(checkpoint)
                names = {path.name for path in checkpoint.glob('[!._]*')} - {'commit_success.txt'}
            except Exception as unreadable:  # OSError, or an exception of a bucket's client
                problem, kind = unreadable, storage.access_error(unreadable) or UserError
            if kind:
                raise kind(f'{checkpoint}: cannot be read ({first_line(problem)})') from error
            if names and names.isdisjoint(('state', 'run')):
                found = f'expected state/ and run/, found {min(names)}; move it elsewhere'
                raise UserError(f'{checkpoint}: {found}') from error
            raise Damaged(f'{checkpoint} is damaged ({first_line(error)})') from error


def refuse_other_model(saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError naming the first array that only one has, or that differs in shape."""
    for path in [*saved, *now]:
        if not path.startswith('.root_key') and saved.get(path) != now.get(path):
            raise UserError(
                f'this model does not fit the checkpoint: {path} was '
                f'{saved.get(path, "missing")}, is {now.get(path, "missing")}; '
                'use another workdir for another model'
            )
