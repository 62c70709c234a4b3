"""The promises of tools/sweep.py: every run of the grid, once, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import reviews
from configs.schema import to_dict
from runtime.run_record import seal
from tests import runs
from tools import sweep

# Stands in for train.py: notes its flags, and ends or is finished as the test wants it.
STAND_IN = """
import json, os, signal, sys, time
flags = dict(arg.lstrip('-').split('=', 1) for arg in sys.argv[1:])
workdir, seed = flags['workdir'], int(flags['config.seed'])
with open(LOG, 'a') as log:
    print(os.path.basename(workdir), file=log)
def heard(number, _):
    with open(LOG, 'a') as log:
        print(signal.Signals(number).name, file=log)
    if number == signal.SIGTERM:
        sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, heard)
how = json.load(open(HOW)).get(str(seed), 0)
while how == 'waits':
    time.sleep(0.01)
if how:
    sys.exit(how)
rate = float(flags['config.optimizer.learning_rate'])
config = CONFIG | {'seed': seed, 'optimizer.learning_rate': rate}
os.makedirs(workdir)
json.dump(config, open(workdir + '/config.json', 'w'))
summary = {'step': 800, 'eval': {'loss': rate * 100 + seed, 'accuracy': 0.5}}
json.dump(summary, open(workdir + '/summary.json', 'w'))
"""
NAMES = [
    f'optimizer.learning_rate={rate}_seed={seed}' for rate in ('1e-3', '3e-3') for seed in '012'
]


class Stage:
    """A folder with a stand-in for train.py, and a sweep of 2 learning rates and 3 seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / 'out'
        self.program, self.log, self.how = (folder / name for name in ('program.py', 'log', 'how'))
        constants = str(self.log), str(self.how), to_dict(reviews.get_config())
        self.program.write_text(f'LOG, HOW, CONFIG = {constants!r}\n' + STAND_IN)
        self.ends({})

    def ends(self, how: dict[str, int | str]) -> None:
        """Seed -> exit code of its runs, or 'waits'; the others finish. Forgets who was called."""
        self.how.write_text(json.dumps(how))
        self.log.write_text('')

    def called(self) -> list[str]:
        """The names of the runs that were, in order."""
        return self.log.read_text().split()

    def flags(self, *others: str) -> list[str]:
        """The command line of the sweep."""
        return [
            f'--config={runs.ROOT / "configs/reviews.py"}',
            f'--workdir={self.out}',
            f'--command={sys.executable} {self.program}',
            '--set=optimizer.learning_rate=1e-3,3e-3',
            '--seeds=0:3',
            *others,
        ]

    def start(self) -> subprocess.Popen[str]:
        """The sweep, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, '-m', 'tools.sweep', *self.flags()],
            cwd=runs.ROOT,
            env=runs.environment(1, PYTHONPATH=str(runs.ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """With nothing finished yet."""
    monkeypatch.setenv('PYTHONPATH', str(runs.ROOT))
    monkeypatch.setattr(sweep.signal, 'signal', lambda *_: None)  # pytest keeps its own
    return Stage(tmp_path)


def test_every_run_is_called_once_and_the_table_has_mean_and_deviation(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(stage.flags()) == 0
    assert stage.called() == NAMES
    first = capsys.readouterr().out.splitlines()
    header, *rows = first[-3:]
    assert header.split() == ['optimizer.learning_rate', 'seeds', 'loss', 'accuracy']
    assert [row.split() for row in rows] == [
        ['1e-3', '3/3', '1.1000', '±', '1.0000', '0.5000', '±', '0.0000'],
        ['3e-3', '3/3', '1.3000', '±', '1.0000', '0.5000', '±', '0.0000'],
    ]
    found = json.loads((stage.out / 'sweep.json').read_text())
    assert [run['name'] for run in found['runs']] == NAMES
    loss = found['table'][1]['metrics']['loss']
    assert loss == pytest.approx({'mean': 1.3, 'std': 1.0, 'min': 0.3, 'max': 2.3})
    stage.ends({})
    assert sweep.main(stage.flags()) == 0
    assert stage.called() == []
    assert capsys.readouterr().out.splitlines()[-3:] == first[-3:]


def test_spread_of_each_stream_stands_beside_that_of_whole_runs(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in's loss is 100 times the seed of dropout, plus the run's."""
    stage.program.write_text(
        stage.program.read_text()
        .replace("int(flags['config.seed'])", "int(flags.get('config.seed', 0))")
        .replace(
            "float(flags['config.optimizer.learning_rate'])",
            "int(flags.get('config.seeds.dropout', -1))",
        )
        .replace("'optimizer.learning_rate': rate", "'seeds.dropout': rate")
    )
    vary = ['--vary=dropout', '--vary=data', '--vary=all']
    flags = [flag for flag in stage.flags() if not flag.startswith('--set')]
    assert sweep.main([*flags, *vary]) == 0
    names = [f'seeds.{stream}={seed}' for stream in ('dropout', 'data') for seed in '012']
    assert stage.called() == [*names, *(f'seed={seed}' for seed in '012')]
    header, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert header.split() == ['vary', 'seeds', 'loss', 'accuracy']
    assert [row.split()[:5] for row in rows] == [
        ['dropout', '3/3', '100.0000', '±', '100.0000'],
        ['data', '3/3', '-100.0000', '±', '0.0000'],
        ['all', '3/3', '-99.0000', '±', '1.0000'],
    ]


def test_failed_run_is_reported_and_does_not_stop_the_others(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.ends({'1': 3})
    assert sweep.main(stage.flags()) == 1
    assert stage.called() == NAMES
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f'{name}: exit code 3' for name in NAMES if name[-1] == '1']
    assert '1e-3  ' in printed.out
    assert printed.out.splitlines()[-1].split()[1:3] == ['2/3', '1.3000']
    stage.ends({})
    assert sweep.main(stage.flags()) == 0
    assert stage.called() == [name for name in NAMES if name[-1] == '1']


def test_run_that_stopped_early_is_finished_unless_its_patience_has_grown(tmp_path: Path) -> None:
    config = sweep.read_config(str(runs.ROOT / 'configs/reviews.py'))
    record = tmp_path / 'checkpoints' / '300' / 'run' / 'metadata'
    record.parent.mkdir(parents=True)
    recent = [[100, 0.5], [200, 0.4], [300, 0.3]]
    record.write_text(json.dumps(seal({'evaluations': {'accuracy of data': recent}})))
    (tmp_path / 'config.json').write_text(json.dumps(to_dict(config)))
    summary = {'step': 300, 'eval': {'accuracy': 0.3}}
    (tmp_path / 'summary.json').write_text(json.dumps(summary))
    for settings, finished in (
        ({}, False),
        ({'patience': '1'}, True),
        ({'patience': '2'}, True),
        ({'patience': '3'}, False),
        ({'patience': 'x'}, False),
        ({'num_steps': '300'}, True),
        ({'num_steps': '3e2'}, True),
        ({'num_steps': '900', 'patience': '2'}, True),
    ):
        run = sweep.Run(settings, 'all', 0, sweep.epath.Path(tmp_path))
        assert sweep.final_metrics(run, config) == (summary['eval'] if finished else None), settings


def test_run_that_was_asked_to_stop_stops_the_sweep(stage: Stage) -> None:
    stage.ends({'1': 75})
    assert sweep.main(stage.flags()) == 75
    assert stage.called() == NAMES[:2]
    assert (stage.out / 'sweep.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_reaches_the_run_and_stops_the_sweep(tmp_path: Path, number: signal.Signals) -> None:
    stage = Stage(tmp_path)
    stage.ends({'1': 'waits'})
    process = stage.start()
    try:
        while len(stage.called()) < 2:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.05)
        time.sleep(0.5)  # until the stand-in listens
        os.killpg(process.pid, number)  # as a terminal does it: the run may not hear it twice
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert 'stopped; the same command resumes' in output
    assert stage.called() == [*NAMES[:2], 'SIGTERM']


def test_run_finished_with_another_config_is_refused(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(stage.flags()) == 0
    file = stage.out / NAMES[3] / 'config.json'
    file.write_text(file.read_text().replace('"model.hidden_size": 64', '"model.hidden_size": 32'))
    with pytest.raises(SystemExit) as end:
        sweep.main(stage.flags())
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert f'{NAMES[3]} is finished with another config: model.hidden_size: 32 -> 64;' in printed


@pytest.mark.parametrize(
    ('flag', 'printed'),
    [
        ('--set=optimizer.learning_rat=1', "did you mean 'optimizer.learning_rate'?"),
        ('--set=seed=1,2', "'seed' is not among"),
        (f'--set=data.name={"x" * 200}', 'put what all runs share into the config'),
        ('--set=batch_size=8,8', '--set: expected values that differ'),
        ('--seeds=3', '--seeds=3: expected A:B'),
        ('--seeds=3:3', '--seeds=3:3: expected A:B'),
        ('--config=none.py', '--config=none.py: FileNotFoundError'),
        ('--command=no-such-program', '--command: no-such-program: No such file'),
        ("--command='", 'No closing quotation'),
        ('--config.seed=1', 'unrecognized arguments: --config.seed=1'),
    ],
)
def test_bad_input_is_one_line(
    stage: Stage, capsys: pytest.CaptureFixture[str], flag: str, printed: str
) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main(stage.flags(flag))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert printed in line
    assert stage.called() == []
    assert not stage.out.exists()


def test_values_with_commas_and_slashes_make_names_of_folders(stage: Stage) -> None:
    given = ['data.bucket_lengths=(16,28,42),(42,)', 'data.name=glue/sst2']
    config = sweep.read_config(str(runs.ROOT / 'configs/reviews.py'))
    found = sweep.grid(config, sweep.epath.Path(stage.out), given, '0:1', ['all'])
    assert [run.settings['data.bucket_lengths'] for run in found] == ['(16,28,42)', '(42,)']
    assert len({run.workdir for run in found}) == 2
    assert {run.workdir.parent for run in found} == {sweep.epath.Path(stage.out)}


@pytest.mark.slow
def test_trained_here_the_runs_are_those_of_train_py(tmp_path: Path) -> None:
    file, workdir = tmp_path / 'small.py', tmp_path / 'sweep'
    file.write_text(
        'from configs import reviews\n'
        'from tasks.classification import DataConfig, ModelConfig\n'
        'def get_config():\n'
        '    config = reviews.get_config()\n'
        '    config.num_steps, config.batch_size, config.eval_batch_size = 6, 16, 64\n'
        '    config.data = DataConfig(num_train=300, num_eval=100, bucket_lengths=(42,))\n'
        '    config.model = ModelConfig(embedding_size=8, hidden_size=8)\n'
        '    return config\n'
    )
    command = [sys.executable, '-m', 'tools.sweep', f'--config={file}', f'--workdir={workdir}']
    done = subprocess.run(
        [*command, '--seeds=3:4', '--set=optimizer.name=sgd'],
        cwd=runs.ROOT,
        env=runs.environment(2),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (path for path in workdir.iterdir() if path.is_dir())
    summary = json.loads((run / 'summary.json').read_text())
    assert summary['step'] == 6
    assert summary['root_key'].endswith('3')
    assert json.loads((run / 'config.json').read_text())['optimizer.name'] == 'sgd'
    found = json.loads((workdir / 'sweep.json').read_text())
    expected = {'name': run.name, 'vary': 'all', 'seed': 3, 'eval': summary['eval']}
    assert found['runs'] == [expected]
