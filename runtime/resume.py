"""Whether a launch continues the run in its workdir, and what checkpoints tell of the run."""

import dataclasses
import logging
from typing import Any

from configs import schema
from configs.schema import Config
from errors import UserError
from runtime import backend
from runtime.checkpoints import RunRecord
from training import keys


def plan(
    config: Config,
    task: str,
    resume_facts: dict[str, Any],
    saved: RunRecord | None,
    devices: int,
    workdir: Any,
    allow_changes: bool,
) -> tuple[Config, RunRecord]:
    """The config to go on with, and what this launch's checkpoints tell of the run.

    A new run takes `num_shards` from the config or, by default, from the number of devices. A
    saved run keeps its shards and its seed. Raises UserError, with a diff, when anything that
    decides the bits is not what it was, unless `allow_changes`; then the manifest records it.
    """
    num_shards, overrides = config.num_shards or devices, []
    if saved is not None:
        found = changes(config, saved) + task_changes(saved['task'], resume_facts)
        refuse_changes(found, workdir, allow_changes)
        overrides = saved['manifest']['overrides'] + found
        num_shards = config.num_shards or saved['manifest']['num_shards']
        saved_seeds = {
            name: saved['config'].get(f'seeds.{name}', -1) for name in keys.RootKeys._fields
        }
        config = dataclasses.replace(
            config, seed=saved['config']['seed'], seeds=schema.SeedsConfig(**saved_seeds)
        )
    manifest = {
        'task': task,
        'key_format': keys.KEY_FORMAT,
        'mask_format': keys.MASK_FORMAT,
        'num_shards': num_shards,
        'overrides': overrides,
        **backend.environment(),
    }
    run_record = {'config': schema.to_dict(config), 'task': resume_facts, 'manifest': manifest}
    return config, run_record


def changes(config: Config, run_record: RunRecord) -> list[str]:
    """What would lead this launch away from the saved run: 'field: then -> now'.

    Warns of what may change the bits without being anybody's mistake.
    """
    saved, manifest = run_record['config'], run_record['manifest']
    for name, now_is in (('key_format', keys.KEY_FORMAT), ('mask_format', keys.MASK_FORMAT)):
        if (then := manifest.get(name, 1)) != now_is:
            raise UserError(
                f'checkpoint has {name} {then}, this code {now_is}; use the code that wrote it'
            )
    if saved['seed'] != config.seed:
        logging.warning(
            'config.seed = %d has no effect: the root key of the checkpoint, made from seed %d, '
            'decides this run', config.seed, saved['seed'],
        )  # fmt: skip
    now = backend.environment()
    for name in ('versions', 'platform', 'device_kind', 'processor'):
        if manifest[name] != now[name]:
            logging.warning(
                '%s: %s when the checkpoint was written, now %s. Batches and masks stay the same, '
                'numbers agree to rounding (rung 4)', name, manifest[name], now[name],
            )  # fmt: skip
    found = schema.trajectory_changes(config, saved | {'num_shards': manifest['num_shards']})
    if config.num_shards == 0:
        found = [change for change in found if not change.startswith('num_shards:')]
    if now['platform'] == 'cpu' and manifest['threads'] != now['threads']:
        found.append(
            f'PJRT_NPROC: {manifest["threads"]} -> {now["threads"]} (the size of the CPU thread '
            f'pool changes roundings; set PJRT_NPROC={manifest["threads"]})'
        )
    if config.reduction == 'psum' and manifest['device_count'] != now['device_count']:
        found.append(
            f'device_count: {manifest["device_count"]} -> {now["device_count"]} '
            "(only reduction='tree' gives the same bits on another device count)"
        )
    return found


def task_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the task reads differently from the saved run, the first difference of each fact."""
    found = []
    for name, then in saved.items():
        if then == now.get(name):
            continue
        if isinstance(then, list) and isinstance(now.get(name), list):
            pairs = list(zip(then, now[name], strict=False))
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            found.append(
                f'{name}: {len(then)} -> {len(now[name])} entries, the first difference at '
                f'{place}: {then[place : place + 1]} -> {now[name][place : place + 1]}'
            )
        else:
            found.append(f'{name}: {then!r} -> {now.get(name)!r}')
    return found


def refuse_changes(found: list[str], workdir: Any, allowed: bool) -> None:
    """Raises UserError with the diff, unless the user allowed the changes."""
    if not found:
        return
    if not allowed:
        raise UserError(
            f'{workdir} holds another run: {"; ".join(found)}. Use the old values, another '
            f'--workdir, or --allow_changes to go on with the new ones (recorded in the manifest)'
        )
    logging.warning('going on with changes: %s', '; '.join(found))
