"""Joins the processes of a run, checks that they agree, and never lets one wait forever."""

import contextlib
import json
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

from errors import Damaged, RunError, SaveFailed, Unavailable, UserError, first_line
from runtime.backend import code_files, cpu_threads

LEAVE_SECONDS = 10  # from the end of a run to the end of its process


def join(timeout_seconds: int) -> None:
    """Joins the other processes of this run, if the environment says that there are any.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID say so explicitly. Under Slurm
    and Open MPI and on TPU slices JAX asks the cluster. Raises UserError for a mistake in these.
    """
    env = os.environ
    address = env.get('JAX_COORDINATOR_ADDRESS')
    tasks = (env.get('SLURM_STEP_NUM_TASKS', '1'), env.get('OMPI_COMM_WORLD_SIZE', '1'))
    if not address and max(map(int, tasks)) <= 1 and not in_tpu_slice():
        return
    jax.config.update('jax_enable_preemption_service', False)  # runtime/preemption.py hears SIGTERM
    explicit = explicit_settings(address) if address else {}
    problem = (
        f'JAX_COORDINATOR_ADDRESS = {address or "from the cluster"}: could not join the others'
    )
    # At its own timeout JAX aborts the process from C++ (SIGABRT), so ours must come first.
    late = end_after(
        timeout_seconds,
        f'error: {problem} within {timeout_seconds} s; check that all are started and reach it',
        Unavailable.exit_code,
    )
    try:
        jax.distributed.initialize(initialization_timeout=timeout_seconds + 60, **explicit)
        meet()
    except (RuntimeError, ValueError, OSError) as error:
        mistake = isinstance(error, ValueError) or 'INVALID_ARGUMENT' in str(error)
        kind = UserError if mistake else Unavailable
        raise kind(f'{problem} ({first_line(error)})') from error
    finally:
        late.cancel()


def in_tpu_slice() -> bool:
    """Returns whether this may be one of several TPU hosts. Never true where JAX uses no TPU.

    Kubernetes lists the hosts in the environment. A TPU VM asks its metadata server, which may say
    that it is alone; TPU_SKIP_MDS_QUERY says that there is no such server.
    """
    env = os.environ
    if 'tpu' not in (jax.config.values['jax_platforms'] or '').split(','):
        return False
    hosts = env.get('TPU_PROCESS_ADDRESSES', env.get('TPU_WORKER_HOSTNAMES'))
    return 'TPU_SKIP_MDS_QUERY' not in env if hosts is None else ',' in hosts


def meet() -> None:
    """Connects all processes and devices while they are side by side.

    On CPU they have 30 seconds to connect, counted from the first use of the others. Later, one may
    still be reading data or compiling.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), 'all')
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('all'))
    ones = jax.make_array_from_process_local_data(split, np.ones(jax.local_device_count()))
    jax.block_until_ready(jnp.sum(ones))
    multihost_utils.sync_global_devices('met')


def explicit_settings(address: str) -> dict[str, Any]:
    """Returns JAX's arguments from the environment, or none where it asks the cluster for them.

    Raises UserError unless `address` is HOST:PORT with, on process 0, a free port, since JAX's
    coordinator would crash on one in use, and the other variables are whole numbers.
    """
    port = address.rpartition(':')[2]
    if ':' not in address or not port.isdecimal() or int(port) > 65535:
        raise UserError(f'JAX_COORDINATOR_ADDRESS = {address}: expected HOST:PORT')
    try:
        if os.environ.get('JAX_PROCESS_ID') == '0':
            socket.create_server(('', int(port))).close()
    except OSError as error:
        raise UserError(
            f'JAX_COORDINATOR_ADDRESS = {address}: the port is not free ({error.strerror}); '
            'choose another for all processes'
        ) from error
    if 'JAX_NUM_PROCESSES' not in os.environ:
        return {}
    settings: dict[str, Any] = {'cluster_detection_method': 'deactivate'}
    for name in ('num_processes', 'process_id'):
        text = os.environ.get(variable := f'JAX_{name.upper()}', '')
        if not text.isdecimal():
            raise UserError(f'{variable} = {text!r}: expected a whole number')
        settings[name] = int(text)
    return settings | {'coordinator_address': address}


def end_now(problem: str, code: int) -> NoReturn:
    """Ends the process from any thread, with a line unless `problem` is empty. Files stay whole."""
    try:
        newline = '\n' if sys.stderr.isatty() else ''  # below the live line, which nobody erases
        sys.stderr.write(f'{newline}{problem}\n' if problem else '')
        sys.stderr.flush()
    finally:  # also if the terminal is gone
        os._exit(code)


def end_after(seconds: float, problem: str, code: int) -> threading.Timer:
    """Starts a timer that ends the process, unless it is canceled."""
    timer = threading.Timer(seconds, end_now, (problem, code))
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def bounded_end() -> Iterator[None]:
    """Ends the process soon after what is inside, even if threads or a barrier still wait.

    JAX leaves a run of several processes through a barrier, which only meets if all fail alike.
    Orbax has threads that wait ten minutes for a failed save.
    """
    code: Any = 0
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else getattr(error, 'exit_code', 1)
        raise
    finally:
        if code or jax.process_count() == 1:  # otherwise the others may still be working
            end_after(LEAVE_SECONDS, '', code)


def require_same(*facts: dict[str, Any], error: type[RunError] = UserError) -> None:
    """Raises an error, on every process, where the code or a fact differs between processes."""
    if jax.process_count() == 1:
        return
    # The threads come last: those of a config may be 0.
    known = ({'the code': code_files()}, *facts, {'cpu_threads': cpu_threads()})
    named = {name: json.dumps(value) for some in known for name, value in some.items()}
    mine = {name: zlib.crc32(text.encode()) for name, text in named.items()}
    # Processes may know different names: they gather as many bytes as the longest list has.
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    longest = multihost_utils.process_allgather(np.asarray(data.size)).max()
    padded = np.pad(data, (0, longest - data.size), constant_values=ord(' '))
    for process, text in enumerate(multihost_utils.process_allgather(padded)):
        theirs = json.loads(text.tobytes())
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                raise error(
                    f'{name} is not the same on process {process} and on process '
                    f'{jax.process_index()}, which has {named.get(name, "none")[:200]}; start all '
                    'processes with the same command, code and files'
                )


# Damage moves a checkpoint, so it counts only if no process has met another error.
SHARED = (Damaged, UserError, Unavailable, SaveFailed)


@contextlib.contextmanager
def agreed(subject: object) -> Iterator[None]:
    """Raises the worst error of any process inside on all, so that none waits for another."""
    problem: RunError | None = None
    try:
        yield
    except SHARED as error:
        problem = error
    mine = 1 + SHARED.index(type(problem)) if problem else 0
    worst = int(multihost_utils.process_allgather(np.asarray(mine)).max())
    if worst > mine:
        raise SHARED[worst - 1](f'{subject}: another process reports an error')
    if problem:
        raise problem
