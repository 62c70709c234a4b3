"""Starts a Slurm cluster on this machine, for tests: two nodes with 16 cores and 4 fake GPUs.

The programs are from Debian's slurm-wlm and munge. The daemons use private files, ports and a
process namespace, so an existing cluster does not notice them, and they end with the test.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PATH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'
NAMESPACE = (
    *('setpriv', '--pdeathsig=KILL'),  # dies with the tests
    *('unshare', '--pid', '--fork', '--kill-child', '--mount-proc'),
)
START_SECONDS = 60  # for the daemons, on a busy machine

# Nodes are named by addresses that every Linux machine has, since JAX connects to the first one by
# name. A requeued job waits for cred_expire before it starts. Slurm repeats a signal after 10 s; by
# then, after KillWait, the job must have ended, or its next launch gets the signal. (The defaults
# are 120 s and 30 s.)
CONFIG = """
ClusterName=keyfold
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=7
JobRequeue=0
MinJobAge=3600
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=127.0.0.1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:4
NodeName=127.0.0.2 NodeAddr=127.0.0.2 Port={ports[2]} CPUs=16 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES
"""
GPUS = """
Name=gpu File=/dev/null
Name=gpu File=/dev/zero
Name=gpu File=/dev/full
Name=gpu File=/dev/random
"""
DAEMONS = """
cd '{folder}'
munged --foreground --force --key-file=key --seed-file=seed --log-file=munged.log \
    --pid-file='{folder}/munged.pid' --socket='{folder}/munge.socket' &
until [[ -S munge.socket ]]; do sleep 0.1; done
slurmctld -D &
slurmd -D -N 127.0.0.1 &
slurmd -D -N 127.0.0.2 &
wait
"""


def missing() -> str:
    """Returns what this machine lacks for a cluster, or ''."""
    programs = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'unshare', 'setpriv')
    lacking = [name for name in programs if not shutil.which(name, path=PATH)]
    if lacking:
        return f'needs {", ".join(lacking)}; Debian: apt install slurm-wlm munge'
    if os.geteuid() or subprocess.run([*NAMESPACE, 'true'], capture_output=True).returncode:
        return 'needs root that may make process namespaces'
    return ''


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Runs a cluster. Gives the environment in which sbatch finds it.

    Its files are in a folder of a short name: Slurm puts a socket for each step there, and the path
    of a socket has at most 107 characters. Where it is longer, every job ends as it starts.
    """
    temporary = tempfile.TemporaryDirectory(prefix='slurm-', dir='/tmp', ignore_cleanup_errors=True)
    with temporary as made:
        folder = Path(made)
        with contextlib.ExitStack() as probes:
            ports = [probes.enter_context(socket.create_server(('', 0))) for _ in range(3)]
            names = {'folder': folder, 'ports': [port.getsockname()[1] for port in ports]}
        for name in ('state', 'spool-127.0.0.1', 'spool-127.0.0.2'):
            (folder / name).mkdir()
        (folder / 'slurm.conf').write_text(CONFIG.format(**names))
        (folder / 'gres.conf').write_text(GPUS)
        (folder / 'key').write_bytes(os.urandom(1024))
        (folder / 'key').chmod(0o400)
        env = os.environ | {'PATH': PATH, 'SLURM_CONF': str(folder / 'slurm.conf')}
        command = [*NAMESPACE, 'bash', '-c', DAEMONS.format(**names)]
        with (folder / 'log').open('wb') as log:
            daemons = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            limit = time.monotonic() + START_SECONDS
            while ask(env, 'sinfo', '--noheader', '--format=%D %t') != '2 idle':
                assert time.monotonic() < limit, (folder / 'log').read_text()
                time.sleep(0.1)
            yield env
        finally:
            daemons.kill()  # ends the namespace, and with it everything that was started inside
            daemons.wait()


def ask(env: dict[str, str], *command: str) -> str:
    """Returns what a command of Slurm prints."""
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()
