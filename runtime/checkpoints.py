"""Checkpoints: written while training goes on, committed atomically, checked when read.

A checkpoint `checkpoints/STEP` holds two Orbax items: `state`, the arrays of a TrainState with the
root key among them, and `run`, JSON: config, task facts (vocabulary) and a manifest with the
fingerprint of the state. Nothing in it is code.
"""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from errors import KeyfoldError, SaveFailed, UserError
from runtime import processes
from runtime.storage import brief, is_access_error, write_whole
from training import keys
from training.state import TrainState, root_key_hex, state_fingerprint, structure

RunRecord = dict[str, Any]  # what the `run` item holds: 'config', 'task', 'manifest', 'sha256'


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
        """`metric`: evaluation metric, larger is better, by which the best are kept.

        `read_only` leaves alone what a run may be writing at the moment.
        """
        self._directory = workdir / 'checkpoints'
        self._set_aside = workdir / 'damaged'
        policies = ocp.checkpoint_managers
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_newest),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[metric],
                        n=keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._newest: int | None = None  # step of the last save or restore
        self._whole: int | None = None  # of the last that is known to be committed
        self.problem = ''  # of the last save; empty where it is committed, or still on its way

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, in order."""
        return sorted(ocp.utils.checkpoint_steps(self._directory))

    def newest_record(self) -> RunRecord | None:
        """The run_record of the newest checkpoint that has a whole one; None without a checkpoint."""
        return self._newest_whole(self.record)

    def record(self, step: int) -> RunRecord:
        """What a checkpoint tells of its run. Raises ValueError when it is damaged."""
        return read_record(self._directory / str(step))

    def restore(self, target: TrainState) -> TrainState:
        """The newest checkpoint that is whole, in the shapes and shardings of `target`.

        A damaged one is named in a warning and moved to `damaged/`, never deleted. Raises UserError
        when `target` is another model's state, or when no checkpoint is whole.
        """
        restored = self._newest_whole(lambda step: self.read(step, target))
        assert restored is not None, 'restore without a checkpoint'
        self._open().reload()
        self._newest = self._whole = int(restored.step)
        return restored

    def read(self, step: int, target: TrainState) -> TrainState:
        """The state of a step. Raises ValueError, or what Orbax makes of it, when it is damaged."""
        run_record = self.record(step)
        refuse_other_model(run_record['manifest']['structure'], structure(target))
        # Version 0.1 saved one root key for all streams.
        one_root = '.root_key' in run_record['manifest']['structure']
        fields = {name: getattr(target, name) for name in ('step', 'params', 'opt_state')}
        saved_as = fields | {'root_key': target.root_keys.params} if one_root else target
        items = ocp.args.Composite(state=ocp.args.StandardRestore(saved_as))
        state = self._open().restore(step, args=items)['state']
        if one_root:
            root = state.pop('root_key')
            roots = keys.RootKeys(*(jnp.copy(root) for _ in keys.Stream))
            state = TrainState(root_keys=roots, **state)
        found = (root_key_hex(state), state_fingerprint(state))
        expected = (run_record['manifest']['root_key'], run_record['manifest']['state_fingerprint'])
        if found != expected:
            raise ValueError(f'fingerprint of the state is {found[1]}, expected {expected[1]}')
        return state

    @contextlib.contextmanager
    def tolerate_write_errors(self) -> Iterator[None]:
        """A failure to write inside is told, remembered in `problem`, and survived.

        Not in a pod, where the other processes would wait for what this one did not write.
        """
        try:
            yield
        except KeyfoldError:
            raise
        except Exception as error:  # OSError, or whatever Orbax and TensorStore make of it
            self.problem = brief(error)
            if jax.process_count() > 1:
                raise SaveFailed(self._told()) from error
            logging.error('a checkpoint could not be written: %s', self.problem)

    def _told(self) -> str:
        return (
            f'{self._directory}: the last checkpoint could not be written ({self.problem}); '
            'the ones before are whole: mend the storage and start again'
        )

    def save(
        self, state: TrainState, run_record: RunRecord, metrics: dict[str, float] | None
    ) -> None:
        """Copies the state to the host and returns; files are written and committed meanwhile."""
        manifest = run_record['manifest'] | {
            'structure': structure(state),
            'root_key': root_key_hex(state),
            'state_fingerprint': state_fingerprint(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave(seal(run_record | {'manifest': manifest})),
        )
        with self.tolerate_write_errors():
            self._open().wait_until_finished()
        self.problem = ''
        step = int(jax.device_get(state.step))
        self._open().save(step, args=items, metrics=metrics, force=True)
        self._newest = step

    def check(self) -> int | None:
        """The newest step that is committed. Tells of a save that has failed meanwhile."""
        if self._newest != self._whole and not self._open().is_saving_in_progress():
            with self.tolerate_write_errors():
                self._open().wait_until_finished()  # it has ended: raises what it ended with
                self._whole = self._newest
            self._newest = self._whole
        return self._whole

    def close(self) -> None:
        """Waits until the last save is committed."""
        if self._manager is not None:
            with self.tolerate_write_errors():
                self._manager.wait_until_finished()
            with self.tolerate_write_errors():
                self._manager.close()
        ending_in = sys.exc_info()[1]
        if self.problem and (ending_in is None or isinstance(ending_in, SystemExit)):
            raise SaveFailed(self._told())

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        return self._manager

    def _newest_whole(self, read: Any) -> Any:
        """`read(step)` of the newest step for which no process raises; the others are set aside."""
        steps = self.steps()
        for step in reversed(steps):
            result, problem = None, ''
            try:
                result = read(step)
            except KeyfoldError:
                raise
            except Exception as error:  # whatever Orbax and TensorStore make of a damaged file
                problem = brief(error)
                if kind := is_access_error(error):
                    raise kind(f'{self._directory / str(step)}: {problem}') from error
            if processes.all_processes(not problem):
                return result
            logging.warning(
                'checkpoint %s is damaged (%s): moved to %s, using the one before',
                self._directory / str(step), problem or 'on another process', self._set_aside,
            )  # fmt: skip
            self._move_aside(step, problem)
        if self._set_aside.exists() and any(self._set_aside.iterdir()):
            raise UserError(
                f'{self._set_aside}: none of the checkpoints is whole; mend one and '
                f'move it back to {self._directory}, or start over in another workdir'
            )
        return None

    def _move_aside(self, step: int, problem: str) -> None:
        if jax.process_index() == 0:
            alike = self._set_aside.glob(f'{step}*')
            number = sum(path.name.partition('.')[0] == str(step) for path in alike)
            name = f'{step}.{number}' if number else str(step)
            # First why: in a bucket a folder is there only with something in it.
            why = problem or 'on another process'
            write_whole(self._set_aside / f'why-{name}.txt', f'{why}\n'.encode())
            (self._directory / str(step)).rename(self._set_aside / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f'set aside {step}')


@contextlib.contextmanager
def damage_as_user_error(run: epath.Path) -> Iterator[None]:
    """Inside, whatever Orbax and TensorStore make of a damaged file becomes UserError."""
    try:
        yield
    except KeyfoldError:
        raise
    except Exception as error:
        kind = is_access_error(error)
        what = 'can not be read' if kind else 'the checkpoint is damaged'
        raise (kind or UserError)(f'{run}: {what} ({brief(error)})') from error


def seal(run_record: RunRecord) -> RunRecord:
    """The run_record with the SHA-256 of its canonical JSON."""
    body = json.loads(json.dumps({k: v for k, v in run_record.items() if k != 'sha256'}))
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return body | {'sha256': digest}


def read_record(checkpoint: epath.Path) -> RunRecord:
    """A checkpoint's `run` item. Raises ValueError when a bit of it is not as it was written."""
    run_record = json.loads((checkpoint / 'run' / 'metadata').read_text())
    if not isinstance(run_record, dict) or seal(run_record) != run_record:
        raise ValueError('the run description (config, vocabulary, manifest) is not as written')
    return run_record


def refuse_other_model(saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError naming the first array that only one has, or that differs in shape."""
    for path in [*saved, *now]:
        if not path.startswith('.root_key') and saved.get(path) != now.get(path):
            raise UserError(
                f'this model does not fit the checkpoint: {path} was '
                f'{saved.get(path, "not there")}, is {now.get(path, "not there")}; '
                'start another model in another workdir'
            )
