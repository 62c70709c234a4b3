"""Stands in for kubectl, and for a cluster with the JobSet controller: a pod is a process here.

    CLOUD=FOLDER python tests/kubectl_stand_in.py apply --filename=-

It keeps the JobSet, its state and the pods' logs and process ids in FOLDER. Of the JobSet it obeys
completions, environment, arguments, grace period and the rules for failures. Every pod gets the
address of the first one, as DNS in the cluster (GPU) or GKE (TPU) would give it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

CLOUD = Path(os.environ['CLOUD'])
PROJECT = Path(__file__).resolve().parent.parent
PAUSE = 0.05  # seconds


def read(name: str) -> str:
    """Returns a file's text, or '' if there is none."""
    file = CLOUD / name
    return file.read_text() if file.exists() else ''


def control(jobset: dict[str, Any]) -> str:
    """Runs a JobSet to its terminal state, which it returns."""
    spec = jobset['spec']
    (group,) = spec['replicatedJobs']
    job = group['template']['spec']
    (rule,) = job['podFailurePolicy']['rules']
    for attempt in range(spec['failurePolicy']['maxRestarts'] + 1):
        code = run_job(job, attempt)
        (CLOUD / f'ended-{attempt}').touch()
        if code == 0:
            return 'Completed'
        if (CLOUD / 'deleted').exists():
            return 'Deleted'
        if code in rule['onExitCodes']['values']:
            return 'Failed'
    return 'Failed'


def run_job(job: dict[str, Any], attempt: int) -> int:
    """Runs the pods of a job; returns 0, or the exit code of the first pod that failed."""
    pods = start_pods(job, attempt)
    codes: list[int | None] = [None]
    while None in codes and not any(codes) and not (CLOUD / 'deleted').exists():
        time.sleep(PAUSE)
        codes = [pod.poll() for pod in pods]
    failed = next((code for code in codes if code), 0)
    for pod in pods:
        pod.send_signal(signal.SIGTERM)
    for pod in pods:
        try:
            pod.wait(job['template']['spec']['terminationGracePeriodSeconds'])
        except subprocess.TimeoutExpired:
            pod.kill()
    return 128 - failed if failed < 0 else failed or int((CLOUD / 'deleted').exists())


def start_pods(job: dict[str, Any], attempt: int) -> list[subprocess.Popen[bytes]]:
    """Starts a process for each pod."""
    (container,) = job['template']['spec']['containers']
    count = job['completions']
    with socket.create_server(('127.0.0.1', 0)) as probe:
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    pods = []
    for index in range(count):
        env = {'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': str(index)}
        env |= {entry['name']: entry.get('value', str(index)) for entry in container.get('env', ())}
        with (CLOUD / f'log-{attempt}-{index}').open('wb') as log:
            pod = subprocess.Popen(
                [os.environ['POD'], 'train.py', *container['args']],
                cwd=PROJECT,
                env=os.environ | env | {'JAX_COORDINATOR_ADDRESS': address},
                stdout=log,
                stderr=log,
            )
        (CLOUD / f'pid-{index}').write_text(str(pod.pid))
        pods.append(pod)
    (CLOUD / 'attempt').write_text(str(attempt))
    return pods


def logs() -> None:
    """Follows the log of pod 0, as long as it runs."""
    attempt = read('attempt') or sys.exit('pod 0 is waiting to start')
    with (CLOUD / f'log-{attempt}-0').open() as log:
        while True:
            ended = (CLOUD / f'ended-{attempt}').exists()
            print(log.read(), end='', flush=True)
            if ended:
                return
            time.sleep(PAUSE)


def main(verb: str, *words: str) -> None:
    """Does what a command of kubectl says."""
    if verb == 'apply':
        jobset = CLOUD / 'jobset.yaml'
        if not jobset.exists():
            jobset.write_text(sys.stdin.read())
            with (CLOUD / 'controller').open('wb') as log:
                subprocess.Popen(
                    [sys.executable, __file__, 'control'],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
    elif verb == 'control':
        state = control(yaml.safe_load(read('jobset.yaml')))
        (CLOUD / 'state').write_text(state)
    elif verb == 'logs':
        logs()
    elif verb == 'delete':
        (CLOUD / 'deleted').touch()
        while (CLOUD / 'jobset.yaml').exists() and not read('state'):
            time.sleep(PAUSE)
        for name in ('jobset.yaml', 'state', 'deleted', 'attempt'):
            (CLOUD / name).unlink(missing_ok=True)
        for file in CLOUD.glob('ended-*'):
            file.unlink()
    elif words[0] == 'jobset' and words[-1].startswith('--output='):
        print(read('state'), end='')
    else:
        print(f'keyfold {read("state") or "running"}')


if __name__ == '__main__':
    main(*sys.argv[1:])
