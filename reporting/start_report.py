"""What a person wants to know of a run before its first step."""

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
    """Logs data, batches, devices, parameters, and where the run goes on.

    `data`: the task's summary. `padding`: the part of the ids in training batches that is padding.
    """
    widths = ', '.join(map(str, config.data.bucket_lengths))
    logging.info('data: %s', data)
    logging.info(
        'batches: %d examples, padded to %s ids (about %.0f%% is padding); in evaluation %d, to %d',
        config.batch_size, widths, 100 * padding,
        config.eval_batch_size, config.data.bucket_lengths[-1],
    )  # fmt: skip
    mesh, shards = layout.mesh, layout.num_shards
    counts = [2**k for k in range(shards.bit_length())] if layout.reduction == 'tree' else []
    axes = ', '.join(f'{name}={size}' for name, size in mesh.shape.items())
    logging.info(
        '%d %s devices in %d process(es), mesh %s, %d of %d shards on each; a resume gives the '
        'same bits on a device count of %s', mesh.size, mesh.devices.flat[0].device_kind,
        jax.process_count(), axes, layout.shards_per_device, shards,
        ', '.join(map(str, counts or [mesh.size])),
    )  # fmt: skip
    for name, arrays, numbers in parameter_table(state):
        logging.info('%-24s %3s arrays %15s', name, arrays, f'{numbers:,}')
    step, key = int(state.step), root_key_hex(state)
    checkpoint = workdir / 'checkpoints' / str(step)
    where = f'resumed after step {step} from {checkpoint}' if step else 'new run'
    logging.info('%s, root key %s', where, key)


def parameter_table(state: TrainState) -> list[tuple[str, int, int]]:
    """(module at the top, its arrays, its numbers), and the sum of all."""
    arrays, numbers = collections.Counter[str](), collections.Counter[str]()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
        for name in ('parameters', '  ' + jax.tree_util.keystr(path[:1], simple=True)):
            arrays[name] += 1
            numbers[name] += leaf.size
    return [(name, arrays[name], numbers[name]) for name in arrays]
