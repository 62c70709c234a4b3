"""Decides whether a launch continues the run in its workdir, and makes its run record."""

import contextlib
import dataclasses
import logging
from typing import Any

from etils import epath

from configs import schema
from configs.schema import Config
from errors import RunError, UserError
from runtime import backend
from runtime.checkpoints import Checkpoints
from runtime.command_line import one_line, require_free
from runtime.run_record import RunRecord, read_record
from training import keys

WARNED = ('platform', 'device_kind', 'processor', 'xla_flags')


def plan(
    config: Config,
    facts: dict[str, Any],
    workdir: epath.Path,
    saved: RunRecord | None,
    allow_changes: bool,
) -> tuple[Config, RunRecord]:
    """Returns the config to train with, and the run record for this launch's checkpoints.

    `facts`: the task's resume facts; `saved`: the newest record in `workdir`.

    A new run has `num_shards` shards or, by default, one per device; a saved one keeps its seeds
    and, by default, its shards. Raises UserError, listing them, for changed options, task
    facts or threads; with `allow_changes` the manifest records them instead.
    """
    if saved is None:
        require_free(workdir)
    now = backend.environment() | {'code': backend.code()}
    num_shards, overrides = config.num_shards or now['device_count'], []
    if saved is not None:
        require_formats(saved['manifest'])
        for warning in warnings(config, saved, now):
            logging.warning('%s', warning)
        found = changes(config, saved, now) + task_changes(saved['task'], facts)
        if found and not allow_changes:
            raise UserError(
                f'{workdir} holds another run: {"; ".join(found)}. Use the old values, '
                'another --workdir, or --allow_changes to continue with the new ones (the manifest '
                'records it)'
            )
        if found:
            logging.warning('continuing with changes: %s', '; '.join(found))
        then, manifest = saved['config'], saved['manifest']
        overrides = manifest['overrides'] + found
        num_shards = config.num_shards or manifest['num_shards']
        seeds = {name: then.get(f'seeds.{name}', -1) for name in keys.RootKeys._fields}
        config = dataclasses.replace(config, seed=then['seed'], seeds=schema.SeedsConfig(**seeds))
    manifest = {
        'task': schema.task_name(config),
        'key_format': keys.KEY_FORMAT,
        'mask_format': keys.MASK_FORMAT,
        'num_shards': num_shards,
        'overrides': overrides,
        **now,
    }
    return config, {'config': schema.to_dict(config), 'task': facts, 'manifest': manifest}


def require_formats(manifest: dict[str, Any]) -> None:
    """Raises UserError if the run has another key or mask format than this code."""
    for name, now_is in (('key_format', keys.KEY_FORMAT), ('mask_format', keys.MASK_FORMAT)):
        if (was := manifest.get(name, 1)) != now_is:
            raise UserError(
                f'the checkpoint has {name} {was}, this code {now_is}; use the code that wrote it'
            )


def warnings(config: Config, saved: RunRecord, now: dict[str, Any]) -> list[str]:
    """Returns warnings: options without effect, and changes that may alter roundings."""
    then, manifest, threads = saved['config'], saved['manifest'], recorded_cpu_threads(saved)
    found = [
        f'config.{name} = {value} has no effect: the root keys of the checkpoint, made with '
        f'{made_from}, decide this run'
        for name, value, _ in schema.options(config)
        if name == 'seed' or name.startswith('seeds.')
        if (made_from := then.get(name, -1)) != value
    ]
    if config.cpu_threads not in (0, threads):
        found.append(
            f'config.cpu_threads = {config.cpu_threads} has no effect: this run has had {threads} '
            'threads since its first launch'
        )
    before, after = (
        {name: side[name] for name in WARNED} | side['versions'] for side in (manifest, now)
    )
    if differ := [
        f'{name} {before.get(name)!r} -> {value!r}'
        for name, value in after.items()
        if before.get(name) != value
    ]:
        found.append(
            f'since the checkpoint was written: {", ".join(differ)}. Batches and masks stay the '
            'same; other numbers agree to rounding (rung 4, docs/reproducibility.md)'
        )
    if edited := changed_files(manifest.get('code'), now['code']):
        found.append(one_line(f'code changed since the checkpoint: {", ".join(edited)}'))
    return found


def changes(config: Config, saved: RunRecord, now: dict[str, Any]) -> list[str]:
    """Returns 'name: then -> now' for every change that would alter the run.

    `now` is this launch's part of the manifest.
    """
    manifest, threads = saved['manifest'], recorded_cpu_threads(saved)
    shards = {'num_shards': manifest['num_shards']}  # the config may have left them open
    found = schema.trajectory_changes(config, saved['config'] | shards)
    if now['platform'] == 'cpu' and now['cpu_threads'] != threads:  # e.g. a tool
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
    """Returns a short line for each fact of the task that changed, with its first difference."""
    found = []
    for name, then in saved.items():
        new, lengths = now.get(name), ''
        if then == new:
            continue
        if isinstance(then, list) and isinstance(new, list):
            pairs = list(zip(then, new, strict=False))
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            lengths = f'{len(then)} -> {len(new)} entries, the first difference at {place}: '
            then, new = then[place : place + 1], new[place : place + 1]
        found.append(f'{name}: {lengths}{one_line(repr(then), 60)} -> {one_line(repr(new), 60)}')
    return found


def saved_threads(workdir: epath.Path) -> int:
    """Returns the thread-pool size of the run in `workdir`, or 0.

    All checkpoints of a run record the same pool: the newest readable one decides.
    """
    record = readable_record(workdir)
    return recorded_cpu_threads(record) if record else 0


def readable_record(workdir: epath.Path) -> RunRecord | None:
    """Returns the newest readable run record in `workdir`; JSON only, before JAX starts."""
    with contextlib.suppress(RunError):  # the restore reports it
        for step in reversed(Checkpoints(workdir).steps()):
            with contextlib.suppress(OSError, ValueError):
                return read_record(workdir / 'checkpoints' / str(step))
    return None


def recorded_cpu_threads(run_record: RunRecord) -> int:
    """Returns a run record's thread pool; older records hold it as text, in `threads`."""
    manifest = run_record['manifest']
    return int(manifest.get('cpu_threads', manifest.get('threads')))
