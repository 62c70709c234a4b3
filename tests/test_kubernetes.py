"""The promises of launch/k8s/ and launch/gke.sh, on a stand-in for kubectl and a cluster."""

import contextlib
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags

import train
from errors import REQUEUE, NonFinite, SaveFailed, TakenOver, UserError
from launch import local_pod
from tests import runs
from tests.test_processes import wait_for

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


def flags_of(container: dict[str, Any]) -> dict[str, str]:
    """The flags of train.py, by name."""
    return dict(arg.removeprefix('--').split('=') for arg in container['args'])


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
    script = (ROOT / 'launch' / 'slice.sh').read_text()
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
    given = flags_of(container)
    assert {name.partition('.')[0] for name in given} <= set(flags.FLAGS)
    assert (ROOT / given['config']).is_file()
    mounts = [f'{mount["mountPath"]}/' for mount in container.get('volumeMounts', ())]
    compiled = {entry['name']: entry.get('value', '') for entry in container['env']}
    for path in (given['workdir'], compiled['JAX_COMPILATION_CACHE_DIR']):
        assert path.startswith(('gs://', *mounts)), "the pod's own disk goes with it"


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_all_pods_are_one_run_on_a_power_of_two_devices(file: Path) -> None:
    _, job, _, container = parts(file)
    assert job['parallelism'] == job['completions']
    assert job['completionMode'] == 'Indexed'
    assert math.log2(job['parallelism'] * each(container)).is_integer()


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_run_has_a_shard_for_each_device(file: Path) -> None:
    """Otherwise train.py exits with 2 once the nodes are there, and paid for."""
    _, job, _, container = parts(file)
    given = flags_of(container)
    config = runpy.run_path(str(ROOT / given['config']))['get_config']()
    devices = job['parallelism'] * each(container)
    shards = int(given.get('config.num_shards', config.num_shards)) or devices
    assert devices <= shards
    assert config.batch_size % shards == 0
    assert config.eval_batch_size % shards == 0


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


# gcloud for node pools and policies: each kind has one resource or none.
GCLOUD = """#!/bin/sh
[ "$1" = auth ] && echo me@example.com && exit
case "$*" in
  *' list '*) cat "$CLOUD/$2" 2>/dev/null; exit 0 ;;
  *' create '*) echo keyfold >"$CLOUD/$2" ;;
  *' delete '*) rm "$CLOUD/$2" ;;
esac
echo "$*" >>"$CLOUD/calls"
"""
SHORT = {'checkpoint_every': 2, 'data__bucket_lengths': '(42,)'}
FLAGS = ['--', '--config=configs/reviews.py', '--workdir=gs://bucket/run']
AWKWARD = ['--x=it\'s "$HOME" \\ # : {}', '--y=\n', '']


class Cluster:
    """A stand-in for a cluster, with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        """Makes an empty cluster whose pods run train.py with this Python, on one device."""
        self.folder = folder
        (folder / 'bin').mkdir()
        stand_in = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/kubectl_stand_in.py "$@"\n'
        for name, text in (('kubectl', stand_in), ('gcloud', GCLOUD)):
            (folder / 'bin' / name).write_text(text)
            (folder / 'bin' / name).chmod(0o755)
        names = {
            'PROJECT_ID': 'mine',
            'CLUSTER': 'c',
            'LOCATION': 'us-central1',
            'ZONE': 'us-central1-a',
        }
        run = {'TOPOLOGY': '2x2x2', 'IMAGE': 'registry/keyfold:tpu', 'POLL_SECONDS': '0'}
        path = f'{folder}/bin:{os.environ["PATH"]}'
        found = {'CLOUD': str(folder), 'POD': sys.executable, 'PATH': path}
        self.env = runs.environment(1, **names, **run, **found)

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """Starts a command."""
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def gke(self, *words: str, **env: str) -> tuple[int, str, str]:
        """Runs launch/gke.sh; returns exit code, standard output and standard error."""
        process = self.start('launch/gke.sh', *words, **env)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def kill(self, pod: int, number: int) -> None:
        """Sends a signal to a pod."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((self.folder / f'pid-{pod}').read_text()), number)

    def printed(self, attempt: int) -> str:
        """Returns the log of pod 0."""
        file = self.folder / f'log-{attempt}-0'
        return file.read_text() if file.exists() else ''


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Makes a cluster; its pods end with the test."""
    made = Cluster(tmp_path)
    yield made
    subprocess.run([tmp_path / 'bin' / 'kubectl', 'delete'], env=made.env, check=True)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the outcome of a run in one process."""
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    runs.finish(workdir, devices=1, **SHORT)
    return runs.outcome(workdir)


def disturb(cluster: Cluster, run: Path) -> None:
    """Takes the node of pod 1 away, and in the next attempt asks all pods to stop."""
    wait_for((run / 'checkpoints' / '2').exists)
    cluster.kill(1, signal.SIGKILL)
    wait_for(lambda: 'resumed after step' in cluster.printed(1))
    cluster.kill(0, signal.SIGTERM)
    cluster.kill(1, signal.SIGTERM)


@pytest.mark.long
def test_run_on_gke_equals_an_undisturbed_one_through_a_lost_node_and_a_drained_one(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """launch/gke.sh from the node pool to the last step; the JobSet restarts by itself."""
    run = tmp_path / 'run'
    assert cluster.gke('create', '--spot')[0] == 0
    assert cluster.gke('create', '--spot')[0] == 0  # exists
    launcher = cluster.start('launch/gke.sh', 'run', '--', *runs.command(run, **SHORT)[2:])
    disturb(cluster, run)
    output, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output + errors
    assert '24/24' in output
    assert (cluster.folder / 'attempt').read_text() == '2'
    assert runs.outcome(run) == undisturbed
    assert any((tmp_path / 'compiled').iterdir())
    assert 'Completed' in cluster.gke('status')[1]
    assert cluster.gke('delete')[0] == 0
    calls = [
        ' '.join(call.split()[:3]) for call in (cluster.folder / 'calls').read_text().splitlines()
    ]
    policies, pools = 'compute resource-policies', 'container node-pools'
    made = [f'{policies} create', f'{pools} create']
    assert calls == [*made, f'{pools} delete', f'{policies} delete']


@pytest.mark.long
def test_gpu_run_of_two_processes_on_each_of_two_nodes_equals_an_undisturbed_one(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """As the comments in the file say: four pods, each with half of a node's GPUs."""
    run = tmp_path / 'run'
    text = (ROOT / 'launch/k8s/gpu_jobset.yaml').read_text()
    text = re.sub('(parallelism|completions): 2', r'\1: 4', text).replace(
        'value: "2"', 'value: "4"'
    )
    text = text.replace('value: /runs/compiled', f'value: {runs.COMPILED}')
    args = '\n'.join(f'{" " * 20}- "{word}"' for word in runs.command(run, **SHORT)[2:])
    text = re.sub(r'( +- --(config|workdir)[=.].*\n)+', lambda _: f'{args}\n', text)
    kubectl = cluster.folder / 'bin' / 'kubectl'
    subprocess.run(
        [kubectl, 'apply', '--filename=-'], input=text, text=True, env=cluster.env, check=True
    )
    disturb(cluster, run)
    wait_for((cluster.folder / 'state').exists)
    assert (cluster.folder / 'state').read_text() == 'Completed'
    assert runs.outcome(run) == undisturbed


@pytest.mark.long
def test_stopped_run_saves_and_bad_input_fails_at_once(cluster: Cluster, tmp_path: Path) -> None:
    code, _, errors = cluster.gke(
        'run', *FLAGS[:-1], f'--workdir={tmp_path}/run', '--config.seed=-1'
    )
    assert code == 1
    assert 'the JobSet failed' in errors
    assert (cluster.folder / 'attempt').read_text() == '0'
    assert cluster.gke('stop')[0] == 0
    longer = runs.command(tmp_path / 'run', num_steps=100_000, eval_every=100_000)[2:]
    launcher = cluster.start('launch/gke.sh', 'run', '--', *longer)
    wait_for((tmp_path / 'run' / 'checkpoints' / '6').exists)
    os.killpg(launcher.pid, signal.SIGINT)  # ends following, and nothing else
    launcher.communicate()
    assert cluster.gke('stop')[0] == 0
    assert 'as asked' in cluster.printed(0)


def test_jobset_is_filled_in_from_the_flags(cluster: Cluster) -> None:
    """And the rest of it is that of the file. A shell reads the printed command back."""
    flags = [*FLAGS, *AWKWARD]
    code, output, errors = cluster.gke(
        'run', '--dry-run', '--name=null', '--queue=on', '--service-account=1', *flags
    )
    assert code == 0, errors
    begin, end = output.index('\n') + 1, output.index('\nJOBSET\n')
    made, expected = yaml.safe_load(output[begin:end]), yaml.safe_load(FILES[1].read_text())
    job = expected['spec']['replicatedJobs'][0]['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    expected['metadata'] |= {'name': 'null', 'labels': {'kueue.x-k8s.io/queue-name': 'on'}}
    job |= {'parallelism': 2, 'completions': 2}
    pod['serviceAccountName'] = '1'
    pod['nodeSelector'] = {
        'cloud.google.com/gke-tpu-accelerator': 'tpu7x',
        'cloud.google.com/gke-tpu-topology': '2x2x2',
    }
    container['image'] = 'registry/keyfold:tpu'
    container['env'][0]['value'] = 'gs://bucket/compiled'
    container['args'] = [*flags[1:], '--join_timeout=1800']
    assert made == expected
    assert shlex.split(output.splitlines()[0]) == ['kubectl', 'apply', '--filename=-', '<<JOBSET']
    assert not (cluster.folder / 'jobset.yaml').exists()


@pytest.mark.parametrize(
    ('machine', 'topology', 'nodes', 'place'),
    [
        (
            'tpu7x-standard-4t',
            '2x2x4',
            4,
            ['--disk-type=hyperdisk-balanced', '--placement-policy=keyfold'],
        ),
        ('tpu7x-standard-4t', '2x2x1', 1, ['--disk-type=hyperdisk-balanced']),
        ('ct6e-standard-4t', '4x4', 4, ['--tpu-topology=4x4']),
        ('ct5lp-hightpu-8t', '2x4', 1, []),
    ],
)
def test_node_pool_is_the_slice(
    cluster: Cluster, machine: str, topology: str, nodes: int, place: list[str]
) -> None:
    words = ('create', '--dry-run', f'--machine-type={machine}', f'--topology={topology}')
    code, output, _ = cluster.gke(*words)
    assert code == 0
    commands = [shlex.split(line) for line in output.splitlines()]
    made = next(words for words in commands if words[1:4] == ['container', 'node-pools', 'create'])
    assert f'--num-nodes={nodes}' in made
    kinds = ('--tpu-topology', '--placement-policy', '--disk-type')
    assert [word for word in made if word.startswith(kinds)] == place
    assert any('workload-policy' in words for words in commands) == (
        nodes > 1 and 'tpu7x' in machine
    )


@pytest.mark.parametrize(
    ('words', 'env', 'expected'),
    [
        (['resume', *FLAGS], {}, 'resume: no such command'),
        (['create'], {'CLUSTER': ''}, '--cluster=NAME, or CLUSTER, is missing'),
        (['create', '--machine-type=n2-8t'], {}, '--machine-type=n2-8t: expected tpu7x-'),
        (['run', *FLAGS], {'IMAGE': ''}, '--image=IMAGE, or IMAGE, is missing'),
        (['run', *FLAGS], {'TOPOLOGY': ''}, '--topology=CHIPS, or TOPOLOGY, is missing'),
        (['run', *FLAGS[:-1], '--workdir=runs/a'], {}, '--workdir=runs/a: expected gs://'),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    cluster: Cluster, words: list[str], env: dict[str, str], expected: str
) -> None:
    runs.check_refusal(cluster.gke(*words, **env), expected)
    assert not (cluster.folder / 'calls').exists()
