"""Names TPU slices, and gives their devices to compile for on a machine without them."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from errors import UserError
from runtime import backend

SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8')
MOST_CPU_DEVICES = 256


class Chip(NamedTuple):
    """Describes a generation of TPUs. One JAX device is one chip.

    Shapes are those of Cloud TPU with a power of two of chips, up to 256:
    https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
    """

    shapes: tuple[str, ...]
    hbm: float  # GiB that a program may use, as libtpu 0.0.42.1 says when it refuses a larger one
    # The two cores of a v4 chip can be two devices; a Cloud TPU VM shows them as one.
    options: Mapping[str, Any] = MappingProxyType({})


CHIPS = {
    'v4': Chip(CUBES, 30.75, {'chip_config_name': 'megacore'}),
    'v5e': Chip(SQUARES, 15.75),
    'v5p': Chip(CUBES, 95.74),
    'v6e': Chip(SQUARES, 31.25),
}

# Otherwise libtpu locks out every other process, asks the network which machine this is, and logs
# to standard error that it is no TPU VM.
LIBTPU = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',  # any that it knows; the topology decides
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_LOG_DIR': 'disabled',
}


def check(topology: str) -> None:
    """Raises UserError if `topology` is unknown or, for TPUs, libtpu is not installed."""
    name, _, shape = topology.partition(':')
    if name == 'cpu' and shape.isdecimal() and 0 < int(shape) <= MOST_CPU_DEVICES:
        return
    if name not in CHIPS or shape not in CHIPS[name].shapes:
        known = '; '.join(f'{name}: {" ".join(chip.shapes)}' for name, chip in CHIPS.items())
        raise UserError(
            f'--topology={topology}: expected CHIP:SHAPE, such as v5e:4x4, of {known}; '
            'or cpu:DEVICES'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(
            f'--topology={topology}: needs the TPU compiler, libtpu, and the jax that belongs to '
            'it. Install them beside .venv: make setup VENV=.venv-tpu ACCELERATOR=tpu; then use '
            '.venv-tpu/bin/python -m tools.compile_for. (--topology=cpu:8 needs neither.)'
        )


def devices(topology: str, matmul_precision: str) -> Sequence[jax.Device]:
    """Returns the devices of a topology that `check` accepts, with the settings of a run.

    Call it before any device is used.
    """
    name, _, shape = topology.partition(':')
    jax.config.update('jax_platforms', 'cpu')  # this machine's TPU may be in use
    if name == 'cpu':
        jax.config.update('jax_num_cpu_devices', int(shape))
    backend.prepare(matmul_precision=matmul_precision)
    if name == 'cpu':
        return jax.devices()
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    options = dict(CHIPS[name].options)
    if shape == '1x1':
        options['chips_per_host_bounds'] = (1, 1, 1)
    return topologies.get_topology_desc(topology, 'tpu', **options).devices
