"""Everything outside the program that decides its bits: XLA flags, JAX settings, CPU threads, code.

XLA's CPU backend splits some matrix products by the size of its thread pool, so the pool belongs to
the run: its size is chosen at the first launch and read from the run record afterwards. No
accelerator depends on it. docs/reproducibility.md has the measurements.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from errors import UserError, first_line
from training.mesh import COMPILER_OPTIONS

PROJECT = Path(__file__).resolve().parent.parent
CORE = ('model', 'input_pipeline', 'training', 'runtime', 'reporting', 'tasks')

PINNED_XLA_FLAGS = {
    # GPU kernels are otherwise chosen by timing them at startup, and some add in any order.
    '--xla_gpu_autotune_level': '0',
    '--xla_gpu_exclude_nondeterministic_ops': 'true',
    # Otherwise XLA may keep bfloat16 intermediates in float32, depending on how it fuses.
    '--xla_allow_excess_precision': 'false',
}
if jaxlib.version.__version_info__ < (0, 12):
    # YNNPACK's reductions are wrong there: some always, some in a race (jax#39103,
    # tensorflow#126812). Newer versions need no flag, and one that drops it would abort on it.
    PINNED_XLA_FLAGS['--xla_cpu_experimental_ynn_fusion_type'] = '-reduce'

# Environment variables set these for other programs. None may change a run.
PINNED_SETTINGS = {
    'jax_enable_x64': False,
    'jax_default_prng_impl': 'threefry2x32',
    'jax_numpy_rank_promotion': 'allow',
    'jax_numpy_dtype_promotion': 'standard',
}
# These are set on purpose, to look at a program, but they change how it is compiled.
REFUSED_SETTINGS = (
    'jax_disable_jit',
    'jax_disable_most_optimizations',
    'jax_debug_nans',
    'jax_debug_infs',
)

M_ARENA_MAX = -8  # of glibc's mallopt
VERSIONED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def prepare(cpu_threads: int = 0, matmul_precision: str = 'highest') -> None:
    """Pins the CPU thread pool, XLA's flags and JAX's settings, and keeps compiled programs.

    Call it before using any device.

    cpu_threads: the pool of the run; 0 chooses the larger of the cores and the CPU devices. A
    PJRT_NPROC in the environment is overwritten, since XLA would take its pool from it.
    Raises UserError if the environment sets something that a run cannot work with.
    """
    for name in REFUSED_SETTINGS:
        if jax.config.values[name]:
            raise UserError(
                f'{name.upper()} is set: expected it unset, because a run computes in compiled '
                'programs only; python -m tools.replay shows a step that is not finite'
            )
    gc.freeze()  # or garbage collections would rescan everything imported
    quiet_libraries()
    for name, value in PINNED_SETTINGS.items():
        jax.config.update(name, value)
    jax.config.update('jax_default_matmul_precision', matmul_precision)

    given = dict(flag.partition('=')[::2] for flag in os.environ.get('XLA_FLAGS', '').split())
    count = given.get('--xla_force_host_platform_device_count', '1')
    if not count.isdecimal() or not all(flag.startswith('--') for flag in given):
        raise UserError(
            f'XLA_FLAGS = {os.environ["XLA_FLAGS"]}: expected flags, such as --xla_dump_to=FOLDER, '
            'with a whole number as the device count'
        )
    for flag, pinned in PINNED_XLA_FLAGS.items():
        if given.setdefault(flag, pinned) != pinned:
            raise UserError(
                f'XLA_FLAGS: found {flag}={given[flag]}, expected {flag}={pinned}, on which the '
                'bits of a run depend; remove it from XLA_FLAGS'
            )
    flags = (f'{flag}={value}' if value else flag for flag, value in given.items())
    os.environ['XLA_FLAGS'] = ' '.join(flags)
    devices = max(jax.config.values['jax_num_cpu_devices'], int(count))
    os.environ['PJRT_NPROC'] = str(cpu_threads or max(usable_cores(), devices))
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # or each thread of the compiler keeps a heap
    jax.monitoring.register_event_duration_secs_listener(return_freed_memory)
    enable_compilation_cache()


def quiet_libraries() -> None:
    """Silences libraries that log what they also raise."""
    logging.getLogger('jax').setLevel(logging.WARNING)
    for chatty in ('absl', 'asyncio', 'orbax', 'grain'):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)


def return_freed_memory(event: str, duration_secs: float, **_: object) -> None:
    """Returns to the system what a long compilation has freed; JAX calls it after every one."""
    if duration_secs > 1 and event.endswith('backend_compile_duration'):
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def usable_cores() -> int:
    """Returns the number of cores that this process may use, such as those of a Slurm task."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def cpu_threads() -> int:
    """Returns the size of the thread pool that this launch computes with; 0 on an accelerator."""
    return int(os.environ.get('PJRT_NPROC', 0)) if jax.default_backend() == 'cpu' else 0


def check() -> None:
    """Starts the backend and checks that this run can trust it.

    Raises UserError if it does not start, computes wrongly, or has more CPU devices than threads.
    """
    try:
        devices = jax.local_device_count()
    except (AssertionError, RuntimeError) as error:  # the former from JAX_PLATFORMS=cuda alone
        raise UserError(
            f'JAX_PLATFORMS = {jax.config.values["jax_platforms"]}: JAX cannot start it '
            f'({first_line(error)}); install JAX for it, or unset JAX_PLATFORMS'
        ) from error
    if (pool := cpu_threads()) and devices > pool:
        # XLA would enlarge its pool to the number of devices, and with it change the bits.
        raise UserError(
            f'{devices} CPU devices: expected at most {pool}, the CPU threads of this run; only a '
            f'run that starts with --config.cpu_threads={devices} can use so many'
        )
    if wrong := wrong_results():
        raise UserError(
            f'{jax.default_backend()} backend of jaxlib {jaxlib.version.__version__}: {wrong} '
            'computed wrongly; no result can be trusted, so use another version of jaxlib'
        )


def wrong_results(repeats: int = 5) -> str:
    """Names the first computation that the backend gets wrong, or '' if it gets all right.

    These have been wrong in released versions, with no error. All values are whole numbers that
    stay exact in bfloat16 (operands up to 256) and float32, in whatever order they are added.
    """
    ones, rows = np.ones((1024, 1), np.float32), np.zeros((32_769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows)) % 256
    left, right = (np.arange(64 * 64).reshape(64, 64) % k == 0 for k in (3, 5))
    expected = {
        'a sum over a broadcast array (tensorflow#126812)': 2.0**21,
        'matrix-vector products and their sums (jax#39103)': rows[:, 0] ** 2,
        'a bfloat16 matrix product': left.astype(np.int32) @ right,
    }

    @jax.jit
    def compute(ones: jax.Array, rows: jax.Array, left: jax.Array, right: jax.Array) -> Any:
        total = jnp.sum(jnp.broadcast_to(ones, (2, 1024, 1024)))
        squares = jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)
        product = left.astype(jnp.bfloat16) @ right.astype(jnp.bfloat16)
        return total, squares, product.astype(jnp.float32)

    for _ in range(repeats):  # a race is not lost every time
        found = jax.device_get(compute(ones, rows, left, right))
        for name, value in zip(expected, found, strict=True):
            if not np.array_equal(value, expected[name]):
                return name
    return ''


def enable_compilation_cache() -> None:
    """Keeps compiled programs for later launches, in a folder of this user.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false disables it.
    Each kind of processor and each size of the thread pool has its own folder, because machines can
    share a home and JAX's cache key contains neither.
    """
    chosen = jax.config.values['jax_compilation_cache_dir'] or ''
    if '://' not in chosen:
        # By default JAX keeps only what took a second to compile, as is right for a bucket, where
        # each read takes a while. On a disk that would leave most of a start out.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    if chosen:
        return
    home = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    folder = home / 'keyfold' / processor_kind(os.environ['PJRT_NPROC'])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # no home, or not writable: every launch compiles
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))


def environment() -> dict[str, Any]:
    """Returns what the bits of a run depend on outside its config, for the manifest."""
    return {
        'versions': {name: metadata.version(name) for name in VERSIONED},
        'python': platform.python_version(),
        'platform': jax.default_backend(),
        'device_kind': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
        'processor': processor(),
        'cpu_threads': int(os.environ.get('PJRT_NPROC', 0)),
        'matmul_precision': jax.config.values['jax_default_matmul_precision'],
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'compiler_options': COMPILER_OPTIONS,
    }


def processor(field: str = 'model name') -> str:
    """Returns a field of /proc/cpuinfo. The model's vector width can change roundings."""
    try:
        with open('/proc/cpuinfo') as lines:
            return next(x.split(':', 1)[1].strip() for x in lines if x.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def processor_kind(*others: str) -> str:
    """Returns 8 hex digits of what the processor can do, and of what else is given."""
    kind = [processor(), processor('flags'), processor('Features'), *others]
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:8]


def code() -> dict[str, Any]:
    """Returns the git commit, whether the work tree differs from it, and `code_files()`.

    The commit is '' where the project is not a git repository, or git is not installed.
    """
    # Names its own repository, or git would look for one in the folders above.
    git = ['git', f'--git-dir={PROJECT / ".git"}', f'--work-tree={PROJECT}']
    command = [*git, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    described = ''
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        described = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    commit, dirty, _ = described.strip().partition('-dirty')
    return {'commit': commit, 'dirty': bool(dirty), 'files': code_files()}


@functools.cache
def code_files() -> dict[str, str]:
    """Returns path -> the first 16 hex digits of SHA-256 for the files that a run consists of.

    A config of a run is not among them: its values are in the run record.
    """
    names = ('train.py', 'arrays.py', 'errors.py', 'configs/checks.py', 'configs/schema.py')
    files = [PROJECT / name for name in names]
    files += [file for folder in CORE for file in sorted((PROJECT / folder).rglob('*.py'))]
    digests = (hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
    return dict(zip((str(file.relative_to(PROJECT)) for file in files), digests, strict=True))
