"""What people want to know about a run before its first step."""

import collections
import logging

import jax
from etils import epath

from configs.schema import Config
from training.mesh import Layout
from training.state import TrainState, root_key_hex


def start_report(
    config: Config,
    layout: Layout,
    data: str,
    padding: float,
    state: TrainState,
    workdir: epath.Path,
) -> None:
    """Logs data, batches, devices, shards, parameters, and where training starts.

    `data` is the task's summary; `padding` the share of padding in training batches.
    """
    widths = ', '.join(map(str, config.data.bucket_lengths))
    log = logging.info
    log('data         %s', data)
    log(
        'batches      %d examples, padded to %s ids (about %.0f%% padding); evaluation: %d, to %d',
        config.batch_size, widths, 100 * padding,
        config.eval_batch_size, config.data.bucket_lengths[-1],
    )  # fmt: skip
    mesh, shards = layout.mesh, layout.num_shards
    log(
        'devices      %d x %s in %d process(es), mesh %s', mesh.size,
        mesh.devices.flat[0].device_kind, jax.process_count(),
        ', '.join(f'{name}={size}' for name, size in mesh.shape.items()),
    )  # fmt: skip
    counts = [2**k for k in range(shards.bit_length())] if layout.reduction == 'tree' else []
    log(
        'shards       %d, %d per device; resumes with the same bits on %s device(s)%s',
        shards, layout.shards_per_device, ', '.join(map(str, counts or [mesh.size])),
        '' if config.num_shards else '; config.num_shards = N of a new run allows up to N',
    )  # fmt: skip
    for name, arrays, numbers in parameter_table(state):
        log('%-12s %15s in %d arrays', name, f'{numbers:,}', arrays)
    step, key = int(state.step), root_key_hex(state)
    checkpoint = workdir / 'checkpoints' / str(step)
    log('start        %s', f'resumed after step {step} from {checkpoint}' if step else 'new run')
    log('root key     %s', key)
    if step < config.num_steps:
        log('compiling    the first step of each padded length takes seconds')


def parameter_table(state: TrainState) -> list[tuple[str, int, int]]:
    """Returns (top-level module, arrays, numbers) of the parameters, after their total."""
    arrays, numbers = collections.Counter[str](), collections.Counter[str]()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
        for name in ('parameters', '  ' + jax.tree_util.keystr(path[:1], simple=True)):
            arrays[name] += 1
            numbers[name] += leaf.size
    return [(name, arrays[name], numbers[name]) for name in arrays]
