"""What must hold around the program for its bits to be decided: threads and flags.

XLA's CPU backend blocks some matrix products by the size of its thread pool, which is the larger
of the core count (or PJRT_NPROC) and the device count: pinned at no less than the shards, it is
the same on every layout of a run. docs/reproducibility.md has what was measured.
"""

import hashlib
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from errors import UserError
from training.mesh import COMPILER_OPTIONS

# GPU kernels are otherwise chosen by timing them at start-up, and some add in any order.
PINNED_XLA_FLAGS = {
    '--xla_gpu_autotune_level': '0',
    '--xla_gpu_exclude_nondeterministic_ops': 'true',
}
LEAST_THREADS = 8
MOST_DEVICES = 8  # simulated, where neither num_shards nor the environment says how many

VERSIONED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def prepare(num_shards: int) -> None:
    """Pins thread pool and XLA flags and, where the user did not, the simulated CPU devices.

    Call it before the first device is touched. Raises UserError when the environment holds another
    value of what is pinned.
    """
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if devices < 1:
        devices = devices_for(os.cpu_count() or 1, num_shards or MOST_DEVICES)
        jax.config.update('jax_num_cpu_devices', devices)
    least = max(num_shards, devices)
    threads = os.environ.setdefault('PJRT_NPROC', str(max(LEAST_THREADS, least)))
    if not threads.isdigit() or int(threads) < least:
        raise UserError(
            f'PJRT_NPROC = {threads}: expected at least {least}, the number of shards or devices, '
            'or it can not be the same on every device count; leave it unset'
        )
    given = dict(flag.partition('=')[::2] for flag in os.environ.get('XLA_FLAGS', '').split())
    for flag, value in PINNED_XLA_FLAGS.items():
        if given.setdefault(flag, value) != value:
            raise UserError(
                f'XLA_FLAGS: found {flag}={given[flag]}, expected {flag}={value}, on which the '
                'bits of a run depend; take it out of XLA_FLAGS'
            )
    os.environ['XLA_FLAGS'] = ' '.join(
        f'{flag}={value}' if value else flag for flag, value in given.items()
    )


def enable_compilation_cache() -> None:
    """Programs compiled here are found again by later launches, in a folder of this user.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false is none. Each
    kind of processor and size of the thread pool has its own: a home can be shared by machines that
    are not alike, and JAX does not ask for either. Call it after `prepare`.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    kind = [processor(), processor('flags'), processor('Features'), os.environ['PJRT_NPROC']]
    digest = hashlib.sha256(repr(kind).encode()).hexdigest()[:8]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'keyfold' / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # no home, or none that can be written: every launch compiles
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))


def devices_for(cores: int, num_shards: int) -> int:
    """The largest power of two that divides `num_shards` and is at most `cores`."""
    count = 1
    while num_shards % (2 * count) == 0 and 2 * count <= cores:
        count *= 2
    return count


def environment() -> dict[str, Any]:
    """The facts outside the program that its bits can depend on, for the manifest."""
    return {
        'versions': {name: metadata.version(name) for name in VERSIONED},
        'python': platform.python_version(),
        'platform': jax.default_backend(),
        'device_kind': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
        'processor': processor(),
        'threads': os.environ.get('PJRT_NPROC', ''),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'compiler_options': COMPILER_OPTIONS,
    }


def processor(field: str = 'model name') -> str:
    """The host CPU's model, whose vector width can change roundings; or another of its facts."""
    try:
        with open('/proc/cpuinfo') as lines:
            return next(x.split(':', 1)[1].strip() for x in lines if x.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
