"""The promises of launch/Dockerfile, `make image-check` and the devcontainer, as files keep them.

No container engine is needed: a stand-in records what it is asked for.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECK = ROOT / 'launch' / 'image_check.sh'
ENGINE = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
  info) exit "$DOWN" ;;
  *' wait'*|*--config*) echo 'resumed after step 10'; seq 99999 ;;
esac
"""


def steps() -> list[list[str]]:
    """Returns the words of each instruction of the Dockerfile."""
    lines = (ROOT / 'launch/Dockerfile').read_text().replace('\\\n', '').splitlines()
    return [shlex.split(line, comments=True) for line in lines if line and line[0] != '#']


def test_image_has_what_it_copies_and_what_installs_it() -> None:
    copies = [step[2:-1] for step in steps() if step[0] == 'COPY']
    assert copies[-1] == ['.']
    assert all((ROOT / name).exists() for copy in copies for name in copy)
    makefile = (ROOT / 'Makefile').read_text()
    (needed,) = re.findall(r'^\$\(READY\): (.*)$', makefile, re.MULTILINE)
    assert set(copies[0]) == {'Makefile', *needed.split()}
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {'.git', '.venv*', 'runs'} <= set(ignored)


def test_same_user_owns_everything_in_pods_and_in_the_devcontainer() -> None:
    (user,) = [step[1] for step in steps() if step[0] == 'USER']
    owners = [step[1] for step in steps() if step[0] == 'COPY']
    assert set(owners) == {f'--chown={user}:{user}'}
    (made,) = [step for step in steps() if 'useradd' in step]
    assert made[made.index('--uid') + 1] == user
    container = json.loads((ROOT / '.devcontainer/devcontainer.json').read_text())
    assert container['remoteUser'] in made
    built = ROOT / '.devcontainer' / container['build']['dockerfile']
    assert built.resolve() == ROOT / 'launch/Dockerfile'
    targets = [mount.split('target=')[1].split(',')[0] for mount in container['mounts']]
    owned = made[made.index('-g') + 2 :]
    assert all(target.startswith(tuple(owned)) for target in targets)
    for jobset in (ROOT / 'launch').glob('k8s/gpu*.yaml'):  # a fork may do without Kubernetes
        assert f'runAsUser: {user}\n' in jobset.read_text()


def check(folder: Path, down: int) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs the check with a stand-in engine; returns it and the engine's calls."""
    for name in ('docker', 'podman'):
        (folder / name).write_text(ENGINE)
        (folder / name).chmod(0o755)
    calls = folder / 'calls'
    env = os.environ | {
        'PATH': f'{folder}:{os.environ["PATH"]}',
        'CALLS': str(calls),
        'DOWN': str(down),
    }
    return subprocess.run([CHECK], env=env, capture_output=True, text=True), calls.read_text()


def test_check_builds_both_stacks_and_resumes_a_killed_run_in_each(tmp_path: Path) -> None:
    done, calls = check(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    tested = re.findall(r'^build .*--build-arg PYTHON=(\S+) ', calls, re.MULTILINE)
    classifiers = (ROOT / 'pyproject.toml').read_text()
    assert tested == ['3.11', '3.13']  # as CI, one for each JAX
    assert all(f"python_version {sign} '3.12'" in classifiers for sign in ('<', '>='))
    assert calls.count('kill -9') == 2
    assert done.stdout.count('built, trained, killed and resumed') == 2


def test_without_an_engine_the_check_is_one_line(tmp_path: Path) -> None:
    done, calls = check(tmp_path, 1)
    assert done.returncode == 2
    assert calls.split() == ['info', 'info']
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: no container engine answers: expected docker info')
