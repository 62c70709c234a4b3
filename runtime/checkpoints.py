"""Saves checkpoints while training continues, commits them atomically, verifies them when read.

A checkpoint `checkpoints/STEP` holds two Orbax items: `state`, the arrays of a TrainState with its
root keys, and `run`, the run record as JSON: config, task facts (such as the vocabulary) and a
manifest with the fingerprint of the state. Nothing in it is code.
"""

import contextlib
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from errors import KeyfoldError, SaveFailed, UserError
from runtime import processes, storage
from training import keys
from training.state import TrainState, root_key_hex, state_fingerprint, structure

RunRecord = dict[str, Any]  # the `run` item: 'config', 'task', 'manifest', 'sha256'
Found = TypeVar('Found')


class Damaged(UserError):
    """A checkpoint whose files can be read and are not what was written."""


class Save(NamedTuple):
    """The last save: under way, or committed, or failed with a problem."""

    step: int
    committed: bool = False
    problem: str = ''


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self,
        workdir: epath.Path,
        keep_newest: int = 1,
        keep_best: int = 0,
        metric: str = '',
        read_only: bool = False,
    ) -> None:
        """`metric`: the evaluation metric, larger is better, by which the best are kept.

        `read_only` does not touch what a run may be writing at the moment. Otherwise raises
        UserError where an existing `checkpoints/` cannot be written.
        """
        self._directory = workdir / 'checkpoints'
        self._quarantine = workdir / 'damaged'
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[metric],
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        kept = [policies.LatestN(keep_newest), best]
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._save: Save | None = None
        self._committed: int | None = None  # the newest step known to be committed
        if not read_only and not storage.in_bucket(workdir):
            with storage.access_checked(self._directory):
                if self._directory.exists():
                    tempfile.TemporaryFile(dir=self._directory).close()

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, in order."""
        with storage.access_checked(self._directory), contextlib.suppress(FileNotFoundError):
            if storage.in_bucket(self._directory):
                return sorted(ocp.utils.checkpoint_steps(self._directory))
            # A rename commits. Orbax would leave out what it cannot look at, even all steps, and
            # the run would start over.
            names = [path.name for path in self._directory.iterdir()]
            return sorted(int(name) for name in names if name.isdecimal())
        return []

    def newest_record(self) -> RunRecord | None:
        """Returns the newest undamaged run record, or None without a checkpoint."""
        return self._newest_undamaged(self.record)

    def record(self, step: int) -> RunRecord:
        """Returns the run record of a step. Raises as `damage_proved` does."""
        checkpoint = self._directory / str(step)
        with damage_proved(checkpoint):
            return read_record(checkpoint)

    def restore(self, target: TrainState) -> TrainState:
        """Returns the newest undamaged state, in the shapes and shardings of `target`.

        A damaged one is logged and moved to `damaged/`, never deleted. Raises UserError when
        `target` is another model's state, or when every checkpoint is damaged.
        """
        restored = self._newest_undamaged(lambda step: self.read(step, target))
        assert restored is not None, 'restore without a checkpoint'
        self._committed = int(restored.step)
        return restored

    def read(self, step: int, target: TrainState) -> TrainState:
        """Returns the state of a step. Raises as `record` does, and UserError for another model."""
        manifest = self.record(step)['manifest']
        refuse_other_model(manifest['structure'], structure(target))
        # Version 0.1 saved one root key for all streams.
        one_root = '.root_key' in manifest['structure']
        fields = {name: getattr(target, name) for name in ('step', 'params', 'opt_state')}
        saved_as = fields | {'root_key': target.root_keys.params} if one_root else target
        items = ocp.args.Composite(state=ocp.args.StandardRestore(saved_as))
        with damage_proved(self._directory / str(step)):
            state = self._open().restore(step, args=items)['state']
            if one_root:
                root = state.pop('root_key')
                roots = keys.RootKeys(*(jnp.copy(root) for _ in keys.Stream))
                state = TrainState(root_keys=roots, **state)
            found = (root_key_hex(state), state_fingerprint(state))
            if found != (manifest['root_key'], manifest['state_fingerprint']):
                expected = manifest['state_fingerprint']
                raise ValueError(f'fingerprint of the state is {found[1]}, expected {expected}')
        return state

    def save(
        self,
        state: TrainState,
        run_record: RunRecord,
        metrics: dict[str, float] | None = None,
        before: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Copies the state to the host and returns; writing and committing go on in threads.

        `before` are called first; what they write, no checkpoint may lack. A failure to write is
        logged and retried by the next save. With several processes it raises SaveFailed, since the
        others would wait for what this one did not write.
        """
        self._finish()
        manifest = run_record['manifest'] | {
            'structure': structure(state),
            'root_key': root_key_hex(state),
            'state_fingerprint': state_fingerprint(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave(seal(run_record | {'manifest': manifest})),
        )
        self._save = Save(int(jax.device_get(state.step)))
        try:
            for write in before:
                write()
            self._open().save(self._save.step, args=items, metrics=metrics, force=True)
        except Exception as error:  # OSError, or what Orbax and TensorStore turn it into
            self._failed(error)

    def check(self) -> int | None:
        """Returns the newest committed step. Logs a save that has failed since the last call."""
        if self._save and not self._open().is_saving_in_progress():
            self._finish()
        return self._committed

    def close(self) -> None:
        """Waits for the last save. Raises SaveFailed if it failed and nothing else ends the run."""
        self._finish()
        if self._manager is not None:
            with contextlib.suppress(Exception):  # raises the failure of the last save again
                self._manager.close()
        ending_in = sys.exc_info()[1]
        if self._save and self._save.problem and isinstance(ending_in, SystemExit | None):
            raise SaveFailed(self._not_saved())

    def _finish(self) -> None:
        """Waits for the save under way, if there is one."""
        if self._save is None or self._save.committed or self._save.problem:
            return
        try:
            self._open().wait_until_finished()  # raises what ended the save
        except Exception as error:
            self._failed(error)
        else:
            self._save = self._save._replace(committed=True)
            self._committed = self._save.step

    def _failed(self, error: Exception) -> None:
        assert self._save is not None
        self._save = self._save._replace(problem=storage.brief(error))
        if jax.process_count() > 1:
            raise SaveFailed(self._not_saved()) from error
        logging.error('checkpoint: could not be written: %s', self._save.problem)

    def _not_saved(self) -> str:
        assert self._save is not None
        return (
            f'{self._directory}: the last checkpoint could not be written ({self._save.problem}); '
            'earlier ones are intact: fix the storage and start again'
        )

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            sys.unraisablehook = without_closed_loops
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        return self._manager

    def _newest_undamaged(self, read: Callable[[int], Found]) -> Found | None:
        """Returns `read(step)` of the newest step undamaged on every process; moves newer ones."""
        for step in reversed(self.steps()):
            for _ in range(2):  # an error that does not come again is no damage
                result, problem = None, ''
                try:
                    result = read(step)
                except Damaged as error:
                    problem = str(error)
                if processes.all_processes(not problem):
                    return result
            problem = problem or f'{self._directory / str(step)}: damaged on another process'
            logging.warning('%s; moved to %s, using the one before', problem, self._quarantine)
            with storage.access_checked(self._quarantine):
                self._move(step, problem)
                if self._manager:
                    self._manager.reload()
        with storage.access_checked(self._quarantine), contextlib.suppress(FileNotFoundError):
            if any(self._quarantine.iterdir()):
                raise UserError(
                    f'{self._quarantine}: none of the checkpoints is whole; repair one and move '
                    f'it back to {self._directory}, or start over in another workdir'
                )
        return None

    def _move(self, step: int, problem: str) -> None:
        if jax.process_index() == 0:
            alike = self._quarantine.glob(f'{step}*')
            number = sum(path.name.partition('.')[0] == str(step) for path in alike)
            name = f'{step}.{number}' if number else str(step)
            # The reason first: in a bucket a folder exists only once something is in it.
            storage.write_whole(self._quarantine / f'why-{name}.txt', f'{problem}\n'.encode())
            (self._directory / str(step)).rename(self._quarantine / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f'moved {step}')


def without_closed_loops(unraisable: Any) -> None:
    """Prints what Python cannot raise, but not for each array of a restore that has failed.

    TensorStore's threads still answer for these after Orbax has closed the event loop.
    """
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def damage_proved(checkpoint: epath.Path) -> Iterator[None]:
    """Turns an error inside into Damaged where that is proved, else into UserError or Unavailable.

    Orbax and TensorStore raise alike for a file that is cut and for one they could not open. Damage
    is proved if no error in the chain is one of access and every file can be read from end to end.
    """
    try:
        yield
    except KeyfoldError:
        raise
    except Exception as error:
        problem, kind = error, storage.access_error(error)
        try:  # first, since Orbax may say "File exists" of a folder that it cannot look at
            storage.read_through(checkpoint)
        except Exception as unreadable:  # OSError, or an exception of a bucket's client
            problem, kind = unreadable, storage.access_error(unreadable) or UserError
        if kind:
            raise kind(f'{checkpoint}: cannot be read ({storage.brief(problem)})') from error
        raise Damaged(f'{checkpoint} is damaged ({storage.brief(error)})') from error


def seal(run_record: RunRecord) -> RunRecord:
    """Returns the run record with the SHA-256 of its canonical JSON."""
    body = json.loads(json.dumps({k: v for k, v in run_record.items() if k != 'sha256'}))
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return body | {'sha256': digest}


def read_record(checkpoint: epath.Path) -> RunRecord:
    """Returns a checkpoint's run record. Raises ValueError if a bit of it has changed."""
    run_record = json.loads((checkpoint / 'run' / 'metadata').read_bytes())
    if not isinstance(run_record, dict) or seal(run_record) != run_record:
        raise ValueError('the run record (config, vocabulary, manifest) is not as written')
    return run_record


def refuse_other_model(saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError naming the first array that only one has, or that differs in shape."""
    for path in [*saved, *now]:
        if not path.startswith('.root_key') and saved.get(path) != now.get(path):
            raise UserError(
                f'this model does not fit the checkpoint: {path} was '
                f'{saved.get(path, "missing")}, is {now.get(path, "missing")}; '
                'use another workdir for another model'
            )
