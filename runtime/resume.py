"""Decides whether a launch continues the run in its workdir, and what its checkpoints record."""

import contextlib
import dataclasses
import logging
from typing import Any, NamedTuple

from etils import epath

from configs import schema
from configs.schema import Config
from errors import UserError
from runtime import backend
from runtime.checkpoints import RunRecord, read_record
from runtime.command_line import one_line
from training import keys

WARNED = ('versions', 'platform', 'device_kind', 'processor', 'xla_flags')


def saved_cpu_threads(workdir: epath.Path) -> int:
    """Returns the thread pool of the run in `workdir`, or 0 if it holds none.

    All checkpoints of a run record the same pool, so the newest that can be read decides.
    """
    with contextlib.suppress(LookupError, TypeError, ValueError):
        if record := readable_record(workdir):
            return recorded_cpu_threads(record)
    return 0


def readable_record(workdir: epath.Path) -> RunRecord | None:
    """Returns the newest run record in `workdir` that can be read; JSON only, before JAX starts."""
    with contextlib.suppress(OSError):  # no such folder; other errors are reported by the restore
        folders = [path for path in (workdir / 'checkpoints').iterdir() if path.name.isdecimal()]
        for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                return read_record(folder)
    return None


def recorded_cpu_threads(run_record: RunRecord) -> int:
    """Returns the thread pool that a run record holds; older ones hold it as text, in `threads`."""
    manifest = run_record['manifest']
    return int(manifest['cpu_threads'] if 'cpu_threads' in manifest else manifest['threads'])


class Launch(NamedTuple):
    """Describes what a launch is about to train."""

    task: str  # name of its module
    resume_facts: dict[str, Any]  # of the task
    devices: int
    workdir: epath.Path


def plan(
    config: Config, launch: Launch, saved: RunRecord | None, allow_changes: bool
) -> tuple[Config, RunRecord]:
    """Returns the config to train with, and the run record for this launch's checkpoints.

    A new run takes `num_shards` from the config or, by default, from the number of devices. A
    saved run keeps its shards and its seeds. Raises UserError, with a diff, if anything that
    decides the bits has changed, unless `allow_changes`; then the manifest records the changes.
    """
    num_shards, overrides = config.num_shards or launch.devices, []
    now = backend.environment() | {'code': backend.code()}
    if saved is not None:
        found = changes(config, saved, now) + task_changes(saved['task'], launch.resume_facts)
        refuse_changes(found, launch.workdir, allow_changes)
        overrides = saved['manifest']['overrides'] + found
        num_shards = config.num_shards or saved['manifest']['num_shards']
        saved_seeds = {
            name: saved['config'].get(f'seeds.{name}', -1) for name in keys.RootKeys._fields
        }
        config = dataclasses.replace(
            config, seed=saved['config']['seed'], seeds=schema.SeedsConfig(**saved_seeds)
        )
    manifest = {
        'task': launch.task,
        'key_format': keys.KEY_FORMAT,
        'mask_format': keys.MASK_FORMAT,
        'num_shards': num_shards,
        'overrides': overrides,
        **now,
    }
    run_record = {
        'config': schema.to_dict(config),
        'task': launch.resume_facts,
        'manifest': manifest,
    }
    return config, run_record


def changes(config: Config, run_record: RunRecord, now: dict[str, Any]) -> list[str]:
    """Returns 'name: then -> now' for all that would lead this launch away from the saved run.

    `now` is this launch's part of the manifest. Warns of what may change the bits but is nobody's
    mistake, such as another processor or an edited file of the code.
    """
    saved, manifest = run_record['config'], run_record['manifest']
    for name, now_is in (('key_format', keys.KEY_FORMAT), ('mask_format', keys.MASK_FORMAT)):
        if (then := manifest.get(name, 1)) != now_is:
            raise UserError(
                f'the checkpoint has {name} {then}, this code {now_is}; use the code that wrote it'
            )
    for name, value, _ in schema.options(config):
        decided = name == 'seed' or name.startswith('seeds.')
        if decided and (made_from := saved.get(name, -1)) != value:
            logging.warning(
                'config.%s = %d has no effect: the root keys of the checkpoint, made with %d, '
                'decide this run', name, value, made_from,
            )  # fmt: skip
    threads = recorded_cpu_threads(run_record)
    if config.cpu_threads not in (0, threads):
        logging.warning(
            'config.cpu_threads = %d has no effect: this run has %d threads since its first launch',
            config.cpu_threads, threads,
        )  # fmt: skip
    for name in WARNED:
        if manifest[name] != now[name]:
            logging.warning(
                '%s: %s when the checkpoint was written, now %s. Batches and masks stay the same, '
                'numbers agree to rounding (rung 4)', name, manifest[name], now[name],
            )  # fmt: skip
    if edited := changed_files(manifest.get('code'), now['code']):
        logging.warning('%s', one_line(f'code changed since the checkpoint: {", ".join(edited)}'))
    found = schema.trajectory_changes(config, saved | {'num_shards': manifest['num_shards']})
    if config.num_shards == 0:
        found = [change for change in found if not change.startswith('num_shards:')]
    if now['platform'] == 'cpu' and now['cpu_threads'] != threads:  # not started by train.py
        found.append(
            f'cpu_threads: {threads} -> {now["cpu_threads"]} (the size of the CPU thread pool '
            'changes roundings)'
        )
    if config.reduction == 'psum' and manifest['device_count'] != now['device_count']:
        found.append(
            f'device_count: {manifest["device_count"]} -> {now["device_count"]} '
            "(only reduction='tree' gives the same bits on another device count)"
        )
    return found


def changed_files(then: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Returns the files that were edited, added or removed; none if the record is too old."""
    old, new = then['files'] if then else now['files'], now['files']
    return sorted(path for path in old | new if old.get(path) != new.get(path))


def task_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the first difference of each fact that the task has read differently, in brief."""
    found = []
    for name, then in saved.items():
        new = now.get(name)
        if then == new:
            continue
        if isinstance(then, list) and isinstance(new, list):
            pairs = list(zip(then, new, strict=False))
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            lengths = f'{len(then)} -> {len(new)} entries, the first difference at {place}: '
            then, new = then[place : place + 1], new[place : place + 1]
        else:
            lengths = ''
        found.append(f'{name}: {lengths}{one_line(repr(then), 60)} -> {one_line(repr(new), 60)}')
    return found


def refuse_changes(found: list[str], workdir: Any, allowed: bool) -> None:
    """Raises UserError with the diff, unless the user allowed the changes."""
    if not found:
        return
    if not allowed:
        raise UserError(
            f'{workdir} holds another run: {"; ".join(found)}. Use the old values, another '
            '--workdir, or --allow_changes to continue with the new ones (the manifest records it)'
        )
    logging.warning('continuing with changes: %s', '; '.join(found))
