"""Goodput: every second of an interrupted run is counted once, and no interruption changes bits."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accounting, goodput
from benchmarks.accounting import Account, Life, Span, account
from reporting.start_report import best_interval
from tests import runs


def expected(**seconds: float) -> dict[str, float]:
    """Returns the seconds of each part; 0 of those not given."""
    named = {
        name.replace('_', ' ').replace('start up', 'start-up'): s for name, s in seconds.items()
    }
    return dict.fromkeys(accounting.PARTS, 0.0) | named


KILLED = Life(
    0.0, 10.0, hit=8.0,
    spans=[
        Span('compilation', 1, 3), Span('compilation', 2, 2.5),  # within the other
        Span('step', 5, 5, 1), Span('step', 5, 6, 2),
        Span('save', 6, 6.5), Span('step', 6, 7.5, 3),
    ],
)  # fmt: skip
RESUMED = Life(
    10.0, 20.0,
    spans=[
        Span('restore', 11, 12), Span('step', 15, 15, 3), Span('step', 15, 16, 4),
        Span('step', 16, 17, 4),  # its evaluation
        Span('save', 17, 19),
    ],
)  # fmt: skip


def test_each_second_of_a_killed_run_is_counted_once() -> None:
    found = account([KILLED, RESUMED])
    assert found.seconds == expected(
        steps=1 + 1 + 1 + 1 + 1,  # 1 and 2 before the kill, then 3, 4 and the evaluation
        steps_again=1 + 0.5,  # step 3, and a part of step 4
        start_up=1 + 1 + 1 + 2,  # the first steps waited for more than the second that one takes
        compilation=2,
        restore=1,
        save=0.5 + 2,
        stopping=2 + 1,
    )
    assert found.total == 20
    assert found.goodput == 5 / 20
    assert (found.hits, found.most_lost, found.first_step) == (1, 1, 5.0)


def test_a_run_that_saves_its_newest_step_when_it_is_stopped_loses_none() -> None:
    stopped = Life(
        0.0, 6.0, [Span('step', 2, 2, 1), Span('step', 2, 3, 2), Span('save', 4, 5)], 3.5
    )
    resumed = Life(6.0, 9.0, [Span('step', 8, 8, 3)])
    found = account([stopped, resumed])
    assert found.seconds['steps again'] == pytest.approx(0.5)  # until the signal, on a third step
    assert found.most_lost == 0


def test_a_launch_that_is_killed_before_its_first_step_costs_start_up_and_keeps_older_steps() -> (
    None
):
    first = Life(0.0, 3.0, [Span('step', 1, 1, 1), Span('step', 1, 2, 2)], 2.0)
    killed = Life(3.0, 7.0, [Span('restore', 4, 5)], 6.0)
    found = account([first, killed, Life(7.0, 9.0, [Span('step', 9, 9, 3)])])
    assert found.seconds == expected(steps=3, start_up=2 + 1, restore=1, stopping=1 + 1)
    assert found.most_lost == 0


@pytest.mark.parametrize('save', [0.1, 5.0, 60.0])
def test_interval_is_the_one_that_loses_least(save: float) -> None:
    """Of Daly's model: failures are a Poisson process, and hit saves, too."""
    between = 300.0
    intervals = np.linspace(0.05, 600, 200_000)
    whole = np.expm1((intervals + save) / between) / intervals  # wall time of a unit of work
    best = intervals[np.argmin(whole)]
    assert best_interval(save, between) == pytest.approx(best, rel=0.01)
    assert best_interval(700, between) == between


def test_line_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / '0').write_text('["step", 1, 2, 3]\n["save", 2, 3, 0]\n["sa')
    assert goodput.read_spans(tmp_path) == [Span('step', 1, 2, 3), Span('save', 2, 3)]


def test_step_in_which_another_process_compiles_counts_as_compilation(tmp_path: Path) -> None:
    first = [['step', 2, 2, 1], ['step', 2, 9, 2]]  # it waits for the second for 5 of 7 seconds
    second = [['step', 0, 1, 1], ['compilation', 3, 8, 0]]
    for name, spans in (('0', first), ('1', second)):
        (tmp_path / name).write_text(''.join(f'{json.dumps(span)}\n' for span in spans))
    found = account([Life(0.0, 9.0, goodput.read_spans(tmp_path))])
    assert found.seconds == expected(steps=2 + 2, compilation=5)


def test_every_feature_is_switched_off_in_a_run_of_its_own() -> None:
    rows = list(goodput.rows())
    assert len({row.name for row in rows}) == len(rows)
    for processes in (1, 2):
        off = [row.off for row in rows if row.processes == processes and row.off]
        assert sorted(off) == sorted([goodput.CACHE, goodput.CLOCK, goodput.ASYNCHRONOUS])


@pytest.mark.parametrize('differs', [False, True])
def test_run_with_other_bits_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], differs: bool
) -> None:
    only = '1 process, SIGTERM'
    monkeypatch.setattr(goodput, 'trained', lambda *_: [KILLED, RESUMED])
    monkeypatch.setattr(goodput, 'outcome', lambda run: differs and run.name)
    assert goodput.main(['--only', only]) == differs
    printed = capsys.readouterr().out
    assert f'other bits than the first run: {only if differs else "none"}' in printed
    assert '| 1 process, SIGTERM | 1 | 25% | 20 | 5.0 | 1.5 |' in printed


@pytest.mark.long
def test_interrupted_runs_end_with_the_bits_of_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = runs.SMALL[goodput.CONFIG] | {'num_shards': 2, 'cpu_threads': 2}
    flags = tuple(f'--config.{name}={value}' for name, value in small.items())
    monkeypatch.setattr(goodput, 'ON', flags)
    found: dict[str, Account] = {}

    def line(name: str, of: Account) -> str:
        found[name] = of
        return name

    monkeypatch.setattr(goodput, 'line', line)
    only = ['2 processes', '1 process, both', '2 processes, both, no saves by the clock']
    times = ['--mean=8', '--seconds=24', '--steps=600']
    assert goodput.main([*times, '--only', *only]) == 0, capsys.readouterr().out
    assert [found[name].hits > 0 for name in only] == [False, True, True]
    for of in found.values():
        assert of.seconds['steps'] > 0
        assert of.seconds['compilation'] > 0
        assert of.seconds['save'] > 0
