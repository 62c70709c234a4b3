"""What people want to know about a run before its first step."""

import functools
import logging
import math
from collections.abc import Sequence

import jax
from etils import epath

from configs.schema import Config
from training.mesh import Layout
from training.state import TrainState, root_key_hex

show = functools.partial(logging.info, '%-12s %s')


def start_report(
    config: Config,
    layout: Layout,
    state: TrainState,
    workdir: epath.Path,
    resumed: bool,
    data: str,
    warnings: Sequence[str],
    padded: float,
) -> None:
    """Logs data, batches, devices, shards, parameters, and where training starts.

    `data` and `warnings` are the task's; `padded` is the share of padding in training batches.
    """
    for warning in warnings:
        logging.warning('%s', warning)
    shards, devices, step = layout.num_shards, layout.mesh.size, int(state.step)
    widths = config.data.bucket_lengths
    training = f'{config.batch_size} examples, padded to {", ".join(map(str, widths))} ids'
    evaluation = f'evaluation: {config.eval_batch_size}, to {widths[-1]}'
    show('data', data)
    show('batches', f'{training} (about {padded:.0%} padding); {evaluation}')
    kind, processes = layout.mesh.devices.flat[0].device_kind, jax.process_count()
    show('devices', f'{devices} x {kind} in {processes} process{"es"[: 2 * (processes > 1)]}')
    # Every power of two up to `num_shards` divides it. Another sum needs the same devices.
    counts = [2**k for k in range(shards.bit_length())] if layout.reduction == 'tree' else [devices]
    exact = ' or '.join(', '.join(map(str, counts)).rsplit(', ', 1))
    shown = 'exactly ' if jax.default_backend() == 'cpu' else ''  # no other platform was tested
    show(
        'shards',
        f'{shards} (the most devices this run can ever use), {layout.shards_per_device} on each '
        f'device; resumes {shown}on {exact} {"device" if counts == [1] else "devices"}',
    )
    if not config.num_shards:
        show('', f'--config.num_shards=N in a new run allows more than {shards}')
    for name, part in [('parameters', state.params), *state.params.items()]:
        sizes = [leaf.size for leaf in jax.tree.leaves(part)]
        name = name if part is state.params else f'  {name}'
        show(name, f'{sum(sizes):15,} in {len(sizes)} {"array" if len(sizes) == 1 else "arrays"}')
    checkpoint = workdir / 'checkpoints' / str(step)
    show('start', f'resumed after step {step} from {checkpoint}' if resumed else 'new run')
    show('root key', root_key_hex(state))
    if step < config.num_steps:
        show('compiling', 'the training step, once for each padded length ...')


def report_saving(seconds: float) -> None:
    """Logs how often to save, from the seconds that a save holds training."""
    hourly, daily = best_interval(seconds, 3600), best_interval(seconds, 86400)
    show(
        'saving',
        f'holds training for {seconds:.2f} s; the best interval is {hourly:.0f} s with a failure '
        f'an hour, {daily:.0f} s with one a day (--config.checkpoint_minutes={daily / 60:.1f})',
    )


def best_interval(save: float, between_failures: float) -> float:
    """Returns the seconds between saves that lose least; `save` is what one costs, in seconds.

    J. W. Young, CACM 17(9), 1974, to higher order: J. T. Daly, Future Gener. Comput. Syst. 22(3),
    2006.
    """
    if save >= 2 * between_failures:
        return between_failures
    x = save / (2 * between_failures)
    return math.sqrt(2 * save * between_failures) * (1 + math.sqrt(x) / 3 + x / 9) - save
