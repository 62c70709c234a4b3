"""What must hold around the program for its bits to be decided: threads, flags, processes.

XLA's CPU backend blocks some matrix products by the size of its thread pool, which is the larger
of the core count (or PJRT_NPROC) and the device count: pinned at no less than the shards, it is
the same on every layout of a run. docs/reproducibility.md has what was measured.
"""

import contextlib
import json
import logging
import os
import platform
import socket
import sys
import threading
import zlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from configs.schema import BadInput

# GPU kernels are otherwise chosen by timing them at start-up, and some add in any order.
PINNED_XLA_FLAGS = {
    '--xla_gpu_autotune_level': '0',
    '--xla_gpu_exclude_nondeterministic_ops': 'true',
}
LEAST_THREADS = 8
LEAVE_SECONDS = 10  # in which the processes of a pod that fail together leave it together
MOST_DEVICES = 8  # simulated, where neither num_shards nor the environment says how many

# A mesh of one device skips XLA's SPMD pipeline, whose early common-subexpression elimination
# leads to other fusions and so to other roundings. Without that pass both compile alike.
COMPILER_OPTIONS = {'xla_disable_hlo_passes': 'cse'}

VERSIONED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def prepare(num_shards: int) -> None:
    """Pins thread pool and XLA flags and, where the user did not, the simulated CPU devices.

    Call it before the first device is touched. Raises BadInput when the environment holds another
    value of what is pinned.
    """
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if devices < 1:
        devices = devices_for(os.cpu_count() or 1, num_shards or MOST_DEVICES)
        jax.config.update('jax_num_cpu_devices', devices)
    least = max(num_shards, devices)
    threads = os.environ.setdefault('PJRT_NPROC', str(max(LEAST_THREADS, least)))
    if not threads.isdigit() or int(threads) < least:
        raise BadInput(
            f'PJRT_NPROC = {threads}: expected at least {least}, the number of shards or devices, '
            'or it can not be the same on every device count; leave it unset'
        )
    given = dict(flag.partition('=')[::2] for flag in os.environ.get('XLA_FLAGS', '').split())
    for flag, value in PINNED_XLA_FLAGS.items():
        if given.setdefault(flag, value) != value:
            raise BadInput(
                f'XLA_FLAGS: found {flag}={given[flag]}, expected {flag}={value}, on which the '
                'bits of a run depend; take it out of XLA_FLAGS'
            )
    os.environ['XLA_FLAGS'] = ' '.join(
        f'{flag}={value}' if value else flag for flag, value in given.items()
    )


def devices_for(cores: int, num_shards: int) -> int:
    """The largest power of two that divides `num_shards` and is at most `cores`."""
    count = 1
    while num_shards % (2 * count) == 0 and 2 * count <= cores:
        count *= 2
    return count


def join_processes(timeout_seconds: int) -> None:
    """Joins the other processes of this run, if the environment says that there are any.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID say so outright; under Slurm,
    Open MPI and on TPU slices JAX asks the cluster.
    """
    env = os.environ
    address = env.get('JAX_COORDINATOR_ADDRESS')
    cluster = (
        int(env.get('SLURM_STEP_NUM_TASKS', '1')) > 1
        or int(env.get('OMPI_COMM_WORLD_SIZE', '1')) > 1
        or in_tpu_slice()
    )
    if not address and not cluster:
        return
    logging.getLogger('jax').setLevel(logging.WARNING)  # it tells each process's way to the others
    jax.config.update(
        'jax_enable_preemption_service', False
    )  # training/preemption.py hears SIGTERM
    explicit: dict[str, Any] = {}
    if address:
        refuse_bad_address(address)
    if address and 'JAX_NUM_PROCESSES' in env:
        explicit = {
            'coordinator_address': address,
            'num_processes': number_in('JAX_NUM_PROCESSES'),
            'process_id': number_in('JAX_PROCESS_ID'),
            'cluster_detection_method': 'deactivate',
        }
    problem = (
        f'JAX_COORDINATOR_ADDRESS = {address or "from the cluster"}: could not join the others'
    )
    # When JAX's own time is up it ends the process from C++ with SIGABRT: be there before it.
    told = f'within {timeout_seconds} s; see that all processes are started and reach it'
    late = threading.Timer(timeout_seconds, end_now, (f'error: {problem} {told}', 2))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout_seconds + 60, **explicit)
        meet()
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(f'{problem} ({str(error).splitlines()[0]})') from error
    finally:
        late.cancel()


def in_tpu_slice() -> bool:
    """Whether to ask which TPU hosts are the others. Never true where JAX uses no TPU.

    Kubernetes lists them in the environment. A TPU VM asks its metadata server, and may learn that
    it is alone; where there is no such server TPU_SKIP_MDS_QUERY says so.
    """
    env = os.environ
    if 'tpu' not in (jax.config.jax_platforms or '').split(','):  # type: ignore[attr-defined]
        return False
    hosts = env.get('TPU_PROCESS_ADDRESSES', env.get('TPU_WORKER_HOSTNAMES'))
    return 'TPU_SKIP_MDS_QUERY' not in env if hosts is None else ',' in hosts


def meet() -> None:
    """Connects all processes, and all devices, of a pod with each other.

    On CPU they have 30 seconds for it, counted from when the first one needs the others. Now they
    are side by side; later one may still be reading data or compiling.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), 'all')
    parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('all'))
    ones = jax.make_array_from_process_local_data(parts, np.ones(jax.local_device_count()))
    jax.block_until_ready(jnp.sum(ones))
    multihost_utils.process_allgather(np.zeros(1))


def refuse_bad_address(address: str) -> None:
    """Raises BadInput unless it is HOST:PORT and, on process 0, the port is free.

    On a port that is in use JAX's coordinator would crash.
    """
    port = address.rpartition(':')[2]
    if ':' not in address or not port.isdecimal():
        raise BadInput(f'JAX_COORDINATOR_ADDRESS = {address}: expected HOST:PORT')
    if os.environ.get('JAX_PROCESS_ID') == '0':
        try:
            socket.create_server(('', int(port))).close()
        except OSError as error:
            raise BadInput(
                f'JAX_COORDINATOR_ADDRESS = {address}: the port is not free ({error.strerror}); '
                'choose another for all processes'
            ) from error


def number_in(variable: str) -> int:
    """An environment variable's whole number. Raises BadInput when it is none."""
    text = os.environ.get(variable, '')
    if not text.isdecimal():
        raise BadInput(f'{variable} = {text!r}: expected a whole number')
    return int(text)


def end_now(problem: str, code: int) -> NoReturn:
    """Ends the process from any thread, with one line. Every file is whole or not there."""
    sys.stderr.write(problem + '\n')
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def bounded_end() -> Iterator[None]:
    """An error inside ends this process soon, even where the others of its pod go on waiting.

    JAX leaves a pod through a barrier. When all fail alike they meet there; else time runs out.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            code = getattr(error, 'exit_code', getattr(error, 'code', 1))
            end = threading.Timer(LEAVE_SECONDS, os._exit, (code,))
            end.daemon = True
            end.start()
        raise


def require_same_on_all_processes(*facts: dict[str, Any]) -> None:
    """Raises BadInput, on every process, where any of these is not what process 0 has."""
    if jax.process_count() == 1:
        return
    names = [name for some in facts for name in some]
    texts = [json.dumps(value) for some in facts for value in some.values()]
    digests = np.array([zlib.crc32(text.encode()) for text in texts], np.uint32)
    for process, theirs in enumerate(multihost_utils.process_allgather(digests)):
        for name, text, mine, other in zip(names, texts, digests, theirs, strict=True):
            if mine != other:
                raise BadInput(
                    f'{name} is not the same on process {process} and on process '
                    f'{jax.process_index()}, which has {text[:200]}; start all processes with '
                    'the same command, code and files'
                )


def on_all_processes(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


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


def processor() -> str:
    """The host CPU's model, whose vector width can change roundings."""
    try:
        with open('/proc/cpuinfo') as lines:
            return next(x.split(':', 1)[1].strip() for x in lines if x.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
