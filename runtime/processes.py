"""The other processes of a run: joining them, agreeing with them, not waiting for them for ever."""

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from errors import Unavailable, UserError
from runtime.backend import code_files

LEAVE_SECONDS = 10  # from the end of a run to the end of its process


def join(timeout_seconds: int) -> None:
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
    jax.config.update('jax_enable_preemption_service', False)  # runtime/preemption.py hears SIGTERM
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
    late = threading.Timer(
        timeout_seconds, end_now, (f'error: {problem} {told}', Unavailable.exit_code)
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout_seconds + 60, **explicit)
        meet()
    except (RuntimeError, ValueError, OSError) as error:
        mistake = isinstance(error, ValueError) or 'INVALID_ARGUMENT' in str(error)
        kind = UserError if mistake else Unavailable
        raise kind(f'{problem} ({str(error).splitlines()[0]})') from error
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
    """Raises UserError unless it is HOST:PORT and, on process 0, the port is free.

    On a port that is in use JAX's coordinator would crash.
    """
    port = address.rpartition(':')[2]
    if ':' not in address or not port.isdecimal():
        raise UserError(f'JAX_COORDINATOR_ADDRESS = {address}: expected HOST:PORT')
    if os.environ.get('JAX_PROCESS_ID') == '0':
        try:
            socket.create_server(('', int(port))).close()
        except OSError as error:
            raise UserError(
                f'JAX_COORDINATOR_ADDRESS = {address}: the port is not free ({error.strerror}); '
                'choose another for all processes'
            ) from error


def number_in(variable: str) -> int:
    """An environment variable's whole number. Raises UserError when it is none."""
    text = os.environ.get(variable, '')
    if not text.isdecimal():
        raise UserError(f'{variable} = {text!r}: expected a whole number')
    return int(text)


def end_now(problem: str, code: int) -> NoReturn:
    """Ends the process from any thread, with one line. Every file is whole or not there."""
    below = '\n' if sys.stderr.isatty() else ''  # a live line that nobody wipes off
    sys.stderr.write(f'{below}{problem}\n')
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def bounded_end() -> Iterator[None]:
    """After what is inside, this process ends soon, whatever still waits in it.

    JAX leaves a pod through a barrier. When all fail alike they meet there; else time runs out.
    Orbax has threads that wait ten minutes for a save that has failed.
    """
    code: Any = 0
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else getattr(error, 'exit_code', 1)
        raise
    finally:
        if code or jax.process_count() == 1:  # else the others may still be at work
            end = threading.Timer(LEAVE_SECONDS, os._exit, (code,))
            end.daemon = True
            end.start()


def require_same(*facts: dict[str, Any]) -> None:
    """Raises UserError, on every process, where any of these or the code is not what others have."""
    if jax.process_count() == 1:
        return
    named = {name: json.dumps(value) for some in facts for name, value in some.items()}
    code = hashlib.sha256(repr(code_files()).encode()).hexdigest()
    refuse_differences({'the code': code, 'the kind of task': ' '.join(named)})
    refuse_differences(named)


def refuse_differences(named: dict[str, str]) -> None:
    """Raises UserError where a text is not that of all processes, which have the same names."""
    digests = np.array([zlib.crc32(text.encode()) for text in named.values()], np.uint32)
    for process, theirs in enumerate(multihost_utils.process_allgather(digests)):
        for (name, text), mine, other in zip(named.items(), digests, theirs, strict=True):
            if mine != other:
                raise UserError(
                    f'{name} is not the same on process {process} and on process '
                    f'{jax.process_index()}, which has {text[:200]}; start all processes with '
                    'the same command, code and files'
                )


def all_processes(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())
