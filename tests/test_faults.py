"""The promises about what goes wrong around a run: it is reported, bounded, and nothing is lost."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath

import train
from errors import REQUEUE, NonFinite, SaveFailed, UserError
from runtime import backend, lock
from tasks import classification
from tests import faults, runs
from tests.test_resume import small_config
from tools import replay

LONG = {'num_steps': 4000, 'checkpoint_every': 3000, 'eval_every': 4000, 'log_every': 50}


# Asked to stop


def stopped(launch: subprocess.Popen[str], after: str, numbers: list[signal.Signals]) -> str:
    """Sends signals to a run once it has printed `after`; returns its output when it has ended."""
    assert launch.stdout is not None
    printed = ''
    for line in launch.stdout:
        printed += line
        if after in line:
            break
    for number in numbers:
        launch.send_signal(number)
        time.sleep(0.05)
    printed += launch.communicate(timeout=300)[0]
    assert launch.returncode == REQUEUE, printed
    return printed


@pytest.mark.slow
def test_run_asked_to_stop_saves_its_newest_step_and_goes_on_from_it(tmp_path: Path) -> None:
    printed = stopped(runs.start(tmp_path, **LONG), ' step   50/', [signal.SIGINT])
    step = int(re.findall(r'stopped after step (\d+)', printed)[0])
    assert (tmp_path / 'checkpoints' / str(step)).exists()
    assert runs.ledger.read(epath.Path(tmp_path) / 'ledger')['step'][-1] == step
    again = stopped(runs.start(tmp_path, **LONG), f'resumed after step {step}', [signal.SIGTERM])
    assert 'stopped at once' in again  # nothing new was finished
    assert not list(tmp_path.rglob('*tmp*'))


@pytest.mark.slow
def test_run_whose_terminal_closes_saves_its_newest_step_unless_nohup_protects_it(
    tmp_path: Path,
) -> None:
    ours, terminal = os.openpty()
    command = runs.command(tmp_path, **LONG)
    options: dict[str, Any] = {'cwd': runs.ROOT, 'env': runs.environment(2)}
    run = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, **options)
    os.close(terminal)
    printed = b''
    while b' step   50/' not in printed:
        printed += os.read(ours, 1000)
    os.close(ours)
    for _ in range(2):  # one is the kernel's, one the shell's
        run.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    assert run.wait(300) == REQUEUE
    step = max(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert 50 <= step < LONG['num_steps']
    pipes: dict[str, Any] = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    again = subprocess.Popen(['nohup', *command], **options, **pipes)
    printed_again = stopped(again, f'resumed after step {step}', [signal.SIGHUP, signal.SIGTERM])
    assert 'SIGHUP' not in printed_again


HANGS = """
import runpy, sys, time
from runtime import ledger

add, rows = ledger.Ledger.add, []

def hang_at_the_third(self, row):
    rows.append(row)
    if len(rows) == 3:
        print('hangs', flush=True)
        time.sleep(1000)
    return add(self, row)

ledger.Ledger.add = hang_at_the_third
sys.argv[0] = 'train.py'
runpy.run_path('train.py', run_name='__main__')
"""


def hanging(workdir: Path, stop_timeout: int) -> subprocess.Popen[str]:
    """Starts a run whose third step never ends: only the thread that hears signals can end it."""
    options = [*runs.command(workdir, **LONG)[2:], f'--stop_timeout={stop_timeout}']
    pipes: dict[str, Any] = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    command = [sys.executable, '-c', HANGS, *options]
    return subprocess.Popen(command, cwd=runs.ROOT, env=runs.environment(2), **pipes)


@pytest.mark.slow
def test_second_signal_stops_at_once_and_damages_nothing(tmp_path: Path) -> None:
    printed = stopped(hanging(tmp_path, 1000), 'hangs', [signal.SIGTERM, signal.SIGTERM])
    assert 'SIGTERM: stopped at once' in printed
    assert not (tmp_path / 'damaged').exists()
    printed = stopped(runs.start(tmp_path, **LONG), ' step  ', [signal.SIGTERM])
    assert 'damaged' not in printed


@pytest.mark.slow
def test_time_to_stop_in_is_bounded(tmp_path: Path) -> None:
    printed = stopped(hanging(tmp_path, 1), 'hangs', [signal.SIGTERM])
    assert 'SIGTERM: not saved within 1 s; resume from an older checkpoint' in printed


# Who reads the output


def texts_beyond_ascii(folder: Path) -> dict[str, Any]:
    """Writes texts and labels that ASCII does not have; returns the options to read them."""
    file = folder / 'texts.tsv'
    rows = [f'gut größer 好 {n % 3}\tja😀\nschlecht {n % 3}\tnein\n' for n in range(16)]
    file.write_text('text\tlabel\n' + ''.join(rows))
    splits = {'data__train': str(file), 'data__evaluation': str(file)}
    return {'data__source': 'files', 'num_steps': 4} | splits


@pytest.mark.slow
def test_ascii_terminal_and_warnings_as_errors_end_no_run(tmp_path: Path) -> None:
    plain = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    env = runs.environment(1, PYTHONIOENCODING='ascii', PYTHONWARNINGS='error', **plain)
    command = runs.command(tmp_path / 'run', **texts_beyond_ascii(tmp_path))
    output = runs.printed(command, runs.ROOT, env, 120)
    assert 'Traceback' not in output
    assert 'UnicodeEncodeError' not in output
    assert r"'ja\U0001f600'" in output
    command = [sys.executable, '-m', 'tools.predict', str(tmp_path / 'run'), '--text', 'gut']
    assert 'ja' in runs.printed(command, runs.ROOT, env, 120)


@pytest.mark.slow
def test_run_without_standard_output_and_error_trains(tmp_path: Path) -> None:
    without = ['sh', '-c', 'exec "$@" >&- 2>&-', 'sh', *runs.command(tmp_path, num_steps=6)]
    assert runs.printed(without, runs.ROOT, runs.environment(1), 120) == ''
    assert (tmp_path / 'summary.json').exists()


@pytest.mark.slow
def test_run_whose_output_nobody_reads_any_more_continues_quietly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        runs.command(tmp_path, num_steps=6),
        cwd=runs.ROOT,
        env=runs.environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:  # closes its pipes
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 0
    assert json.loads((tmp_path / 'summary.json').read_text())['step'] == 6


# A matrix of kills


@pytest.mark.long
def test_run_stopped_in_any_phase_equals_the_undisturbed_run(tmp_path: Path) -> None:
    faults.require_same_bits_after_stops('configs/reviews.py', 1, faults.PHASES, tmp_path)


# One run at a time


@pytest.fixture
def workdir(tmp_path: Path) -> epath.Path:
    """Of a run that is about to begin."""
    return epath.Path(tmp_path / 'a' / 'run')


HOLD = """
import sys
from etils import epath
from runtime import lock
with lock.exclusive_workdir(epath.Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(workdir: epath.Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the workdir."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(workdir)],
        cwd=runs.ROOT,
        env=runs.environment(1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == 'held\n'
        yield process
        process.kill()


def test_second_run_in_a_workdir_is_refused_until_the_first_is_killed(
    workdir: epath.Path, holder: subprocess.Popen[str]
) -> None:
    named = f'held by process {holder.pid} on {socket.gethostname()}; stop that run'
    for _ in range(2):  # and a refusal changes nothing
        with pytest.raises(UserError, match=named), lock.exclusive_workdir(workdir):
            pass
    holder.kill()
    holder.wait()
    assert json.loads((workdir / 'lock.json').read_text())['pid'] == holder.pid
    with lock.exclusive_workdir(workdir):
        assert json.loads((workdir / 'lock.json').read_text())['pid'] == os.getpid()


def test_workdir_that_stays_empty_is_removed_with_the_folders_made_for_it(
    workdir: epath.Path,
) -> None:
    with lock.exclusive_workdir(workdir):
        assert (workdir / 'lock.json').exists()
    assert not workdir.parent.exists()
    assert workdir.parent.parent.exists()
    with lock.exclusive_workdir(workdir):
        (workdir / 'kept').write_text('')
    assert [path.name for path in workdir.iterdir()] == ['kept']


def test_full_disk_at_the_start_is_no_bad_input(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(lock, '_locked', full)
    with pytest.raises(SaveFailed, match='cannot be written'), lock.exclusive_workdir(workdir):
        pass


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"renewed": "x"}', 'null', '"lock"', '\0'])
def test_damaged_lock_holds_nothing_and_a_holder_without_a_name_still_refuses(
    workdir: epath.Path, text: str
) -> None:
    workdir.mkdir(parents=True)
    (workdir / 'lock.json').write_text(text)
    with lock.exclusive_workdir(workdir):
        (workdir / 'lock.json').write_text(text)
        with pytest.raises(UserError, match=r'held by .*process'), lock.exclusive_workdir(workdir):
            pass


# Numbers that are not finite


@pytest.fixture
def nan_at_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: texts with token id 60 have no finite loss."""
    right = classification.classifier_sums

    def wrong(*model: Any) -> Callable[..., Any]:
        sums = right(*model)

        def of_rows(params: Any, batch: Any, rngs: Any = None, step: Any = None) -> Any:
            found = sums(params, batch, rngs, step)
            if rngs is None:
                return found
            bad = jnp.any(batch['token_ids'] == 60, axis=1)
            worth = jnp.where(bad, jnp.nan, 0.0)
            return found | {'loss': found['loss'] + jnp.sum(batch['weights'] * worth)}

        return of_rows

    monkeypatch.setattr(classification, 'classifier_sums', wrong)


@pytest.mark.slow
@pytest.mark.usefixtures('nan_at_a_word')
def test_step_that_is_not_finite_stops_the_run_and_is_replayed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, 'prepare', lambda *_: None)  # the devices are there
    run = epath.Path(tmp_path)
    with pytest.raises(NonFinite, match=r'step \d+: loss nan, gradient norm') as stopped:
        train.train(small_config(), run)
    step = int(re.findall(r'step (\d+):', str(stopped.value))[0])
    rows = runs.ledger.read(run / 'ledger')
    assert rows['step'][-1] >= step
    assert not any(int(p.name) >= step for p in (run / 'checkpoints').iterdir())

    assert replay.replay(run, step)
    printed = capsys.readouterr().out
    assert 'the same bits as the ledger' in printed
    worst = re.findall(r'training example \d+, loss (\S+): (.*)', printed)
    word = (run / 'vocabulary.txt').read_text().splitlines()[60]
    assert worst[0][0] == 'nan'
    assert all(word in text.split("', label")[0].split() for loss, text in worst if loss == 'nan')

    skipping = small_config()
    skipping.optimizer.on_nonfinite = 'skip'
    summary = train.train(skipping, run)
    assert summary['step'] == skipping.num_steps
    assert f'step {step}: loss nan' in caplog.text
    undisturbed = train.train(skipping, run / 'undisturbed')
    assert summary['state_fingerprint'] == undisturbed['state_fingerprint']
    assert runs.outcome(tmp_path) == runs.outcome(tmp_path / 'undisturbed')


@pytest.mark.long
def test_step_of_a_finished_run_is_replayed_on_another_device_count(tmp_path: Path) -> None:
    runs.finish(tmp_path / 'run', data__window_batches=1)  # so the order is asked for all the time
    before = sorted(path for path in tmp_path.rglob('*'))
    command = [sys.executable, '-m', 'tools.replay', os.path.relpath(tmp_path / 'run', runs.ROOT)]
    for step, code in ((24, 0), (20, 0), (7, 0), (25, 2)):  # no checkpoint is before 7
        done = subprocess.run(
            [*command, f'--step={step}'],
            cwd=runs.ROOT,
            env=runs.environment(1),
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert ('the same bits as the ledger' in done.stdout.splitlines()) == (code == 0)
        assert done.stderr.count('\n') == bool(code), done.stderr
    assert sorted(path for path in tmp_path.rglob('*')) == before


# Storage that fails


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with place for the first checkpoint and little more."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=600k', 'tmpfs', str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('needs to mount a small tmpfs')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_is_told_and_loses_no_older_checkpoint(full_disk: Path, tmp_path: Path) -> None:
    run = full_disk / 'run'
    process = runs.start(run)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 5, output
    assert 'checkpoint: could not be written' in output
    assert 'train.py", line' not in output  # TensorStore prints tracebacks of its own threads
    assert f'error: {run}/checkpoints: the last checkpoint could not be written' in output
    assert not list(run.glob('lock*'))
    subprocess.run(['mount', '-o', 'remount,size=50m', str(full_disk)], check=True)
    runs.finish(run)
    runs.finish(tmp_path / 'undisturbed')
    assert runs.outcome(run) == runs.outcome(tmp_path / 'undisturbed')


@pytest.mark.long
def test_pod_on_a_full_disk_ends_with_the_same_exit_code_and_loses_nothing(
    full_disk: Path, tmp_path: Path
) -> None:
    run = full_disk / 'run'
    pod = ['-m', 'launch.local_pod', '--processes=2', '--devices_per_process=1', '--']
    command = [sys.executable, *pod, *runs.command(run)[2:]]
    for code, size in ((5, '50m'), (0, '50m')):
        done = subprocess.run(
            command, cwd=runs.ROOT, env=runs.environment(1), capture_output=True, text=True
        )
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        assert ('the last checkpoint could not be written' in output) == (code == 5)
        assert 'restarting' not in output
        subprocess.run(['mount', '-o', f'remount,size={size}', str(full_disk)], check=True)
    runs.finish(tmp_path / 'undisturbed')
    assert runs.outcome(run) == runs.outcome(tmp_path / 'undisturbed')


LONGER = {'num_steps': 400, 'eval_every': 400}


@pytest.fixture(scope='module')
def longer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a run of 400 steps that nothing happened to."""
    workdir = tmp_path_factory.mktemp('longer')
    runs.finish(workdir, **LONGER)
    return runs.outcome(workdir)


@pytest.mark.long
@pytest.mark.parametrize('fixed', [True, False])
def test_lost_permission_is_told_and_survived(
    tmp_path: Path, longer: dict[str, Any], fixed: bool
) -> None:
    run = tmp_path / 'run'
    plain = []  # root writes anywhere, unless it is a root that may not
    if os.geteuid() == 0:
        plain = ['setpriv', '--bounding-set=-dac_override,-dac_read_search']
        if subprocess.run([*plain, 'true'], capture_output=True).returncode:
            pytest.skip('needs setpriv, or not to be root')
    process = subprocess.Popen(
        [*plain, *runs.command(run, checkpoint_every=20, **LONGER)],
        cwd=runs.ROOT,
        env=runs.environment(2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = ''
    try:
        while not list(run.glob('checkpoints/[1-9]*0')):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        (run / 'checkpoints').chmod(0o500)
        for line in process.stdout:
            output += line
            if 'checkpoint: could not be written' in line:
                break
        if fixed:
            (run / 'checkpoints').chmod(0o700)
        output += process.communicate(timeout=300)[0]
    finally:
        process.kill()
        (run / 'checkpoints').chmod(0o700)
    assert 'checkpoint: could not be written' in output
    assert 'Permission denied' in output
    assert 'Traceback' not in output
    assert process.returncode == (0 if fixed else 5), output
    if not fixed:
        assert 'the last checkpoint could not be written' in output.splitlines()[-1]
    runs.finish(run, **LONGER)
    assert runs.outcome(run) == longer
