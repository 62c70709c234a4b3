"""The promises of launch/k8s/ and of the image that it runs, as far as files can keep them."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags

import train
from errors import REQUEUE, NonFinite, SaveFailed, TakenOver, UserError
from launch import local_pod

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'launch' / 'k8s').glob('*.yaml'))
MENDED_BY_PEOPLE = [
    UserError.exit_code,
    NonFinite.exit_code,
    TakenOver.exit_code,
    SaveFailed.exit_code,
]


def parts(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(JobSet, its only Job's spec, that one's pod spec, that one's only container)."""
    jobset = yaml.safe_load(file.read_text())
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    (group,) = jobset['spec']['replicatedJobs']
    assert group['replicas'] == 1
    job = group['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    return jobset, job, pod, container


def each(container: dict[str, Any]) -> int:
    """The accelerators of one pod."""
    ((name, count),) = container['resources']['limits'].items()
    assert name in ('google.com/tpu', 'nvidia.com/gpu')
    return int(count)


def test_there_is_one_for_tpus_and_one_for_gpus() -> None:
    assert [file.name for file in FILES] == ['gpu_jobset.yaml', 'tpu_jobset.yaml']


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_only_what_a_new_start_can_mend_starts_again(file: Path) -> None:
    jobset, job, pod, container = parts(file)
    (of_pods,) = job['podFailurePolicy']['rules']
    assert of_pods['action'] == 'FailJob'
    codes = of_pods['onExitCodes']
    assert codes == {
        'containerName': container['name'],
        'operator': 'In',
        'values': codes['values'],
    }
    assert codes['values'] == MENDED_BY_PEOPLE
    assert REQUEUE not in codes['values']
    (of_jobs,) = jobset['spec']['failurePolicy']['rules']
    assert of_jobs['action'] == 'FailJobSet'
    assert of_jobs['onJobFailureReasons'] == ['PodFailurePolicy']  # of FailJob; others: restart
    assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
    assert job['backoffLimit'] == 0
    assert pod['restartPolicy'] == 'Never'  # without it Kubernetes refuses a podFailurePolicy


def test_all_launchers_know_the_same_exit_codes() -> None:
    script = (ROOT / 'launch' / 'tpu_vm.sh').read_text()
    (final,) = re.findall("^FINAL='(.*)'", script, re.MULTILINE)
    assert [int(code) for code in final.split()] == [0, *MENDED_BY_PEOPLE]
    assert f'\nASKED_TO_STOP={REQUEUE}\n' in script
    assert list(local_pod.FINAL) == [0, *MENDED_BY_PEOPLE, REQUEUE]


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_every_pod_has_time_to_save(file: Path) -> None:
    _, _, pod, _ = parts(file)
    assert pod['terminationGracePeriodSeconds'] >= train.STOP_TIMEOUT.default + 10


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_flags_are_those_of_train(file: Path) -> None:
    *_, container = parts(file)
    given = dict(arg.removeprefix('--').split('=') for arg in container['args'])
    assert set(given) <= set(flags.FLAGS)
    assert (ROOT / given['config']).is_file()
    mounts = [f'{mount["mountPath"]}/' for mount in container.get('volumeMounts', ())]
    assert given['workdir'].startswith(('gs://', *mounts)), "the pod's own disk goes with it"


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_all_pods_are_one_run_on_a_power_of_two_devices(file: Path) -> None:
    _, job, _, container = parts(file)
    assert job['parallelism'] == job['completions']
    assert job['completionMode'] == 'Indexed'
    assert math.log2(job['parallelism'] * each(container)).is_integer()


def test_gpu_pods_find_each_other() -> None:
    jobset, job, _, container = parts(ROOT / 'launch/k8s/gpu_jobset.yaml')
    env = {variable['name']: variable for variable in container['env']}
    address, _, port = env['JAX_COORDINATOR_ADDRESS']['value'].partition(':')
    name, group = jobset['metadata']['name'], jobset['spec']['replicatedJobs'][0]['name']
    assert address == f'{name}-{group}-0-0.{name}'
    assert int(port) in [entry['containerPort'] for entry in container['ports']]
    assert env['JAX_NUM_PROCESSES']['value'] == str(job['completions'])
    index = env['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_gpu_pods_share_the_workdir_and_have_memory_for_nccl() -> None:
    _, _, pod, container = parts(ROOT / 'launch/k8s/gpu_jobset.yaml')
    mounted = {mount['mountPath']: mount['name'] for mount in container['volumeMounts']}
    volumes = {volume['name']: volume for volume in pod['volumes']}
    assert set(mounted.values()) == set(volumes)
    assert 'persistentVolumeClaim' in volumes[mounted['/runs']]
    assert volumes[mounted['/dev/shm']]['emptyDir']['medium'] == 'Memory'


def test_tpu_pods_fill_their_slice() -> None:
    _, job, pod, container = parts(ROOT / 'launch/k8s/tpu_jobset.yaml')
    topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
    chips = math.prod(int(side) for side in topology.split('x'))
    assert chips == job['parallelism'] * each(container)


def test_image_has_what_it_copies_and_runs_as_the_pods_user() -> None:
    """No Docker engine builds it here."""
    lines = (ROOT / 'launch/Dockerfile').read_text().replace('\\\n', '').splitlines()
    steps = [shlex.split(line, comments=True) for line in lines if line and line[0] != '#']
    copies = [step[2:-1] for step in steps if step[0] == 'COPY']
    assert copies[-1] == ['.']
    assert all((ROOT / name).exists() for copy in copies for name in copy)
    makefile = (ROOT / 'Makefile').read_text()
    (needed,) = re.findall(r'^\$\(READY\): (.*)$', makefile, re.MULTILINE)
    assert set(copies[0]) == {'Makefile', *needed.split()}
    (user,) = [step[1] for step in steps if step[0] == 'USER']
    _, _, pod, _ = parts(ROOT / 'launch/k8s/gpu_jobset.yaml')
    assert pod['securityContext']['runAsUser'] == int(user)
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {'.git', '.venv*', 'runs'} <= set(ignored)
