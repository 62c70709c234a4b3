"""On a terminal a line that changes; in a file the plain lines alone. It holds up nothing."""

import contextlib
import logging
import os
import pty
import re
import select
import subprocess
import termios
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import TextIO

import pytest

from reporting import live_line
from reporting.live_line import LiveLine, LogHandler
from tests import runs


@pytest.fixture
def terminal() -> Iterator[tuple[int, TextIO]]:
    """(what a person sees: a descriptor to read from, the program's end of it)."""
    seen, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    stream = open(end, 'w')  # noqa: SIM115
    yield seen, stream
    for close in (stream.close, lambda: os.close(seen)):
        with contextlib.suppress(OSError):
            close()


def read(seen: int) -> str:
    """What has come in."""
    data = b''
    while select.select([seen], [], [], 0.1)[0]:
        data += os.read(seen, 10_000)
    return data.decode()


def screen(text: str) -> list[str]:
    """The lines that stand there at last, as a terminal shows them."""
    lines = []
    for row in text.split('\n'):
        shown = ''
        for part in row.split('\r'):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def log(stream: TextIO, text: str) -> None:
    """A log line, as of a run."""
    LogHandler(stream).emit(logging.LogRecord('', 0, '', 0, text, None, None))


def test_log_lines_stand_above_the_live_line_which_leaves_nothing_behind(
    terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_line, 'SECONDS', 0)
    seen, stream = terminal
    live = LiveLine(stream, 0, 8, shown=True)
    log(stream, 'one')
    assert live.due()
    live.draw(4, 'step 4/8 loss 0.5')
    log(stream, 'two')
    *above, line = screen(read(seen))
    assert above == ['one', 'two']
    assert line == 'step 4/8 loss 0.5 ' + '█' * 10
    live.draw(5, 'x' * 100)
    assert screen(read(seen)) == ['x' * 79]
    live.close()
    assert screen('x' * 79 + read(seen)) == ['']
    assert not live.due()


def test_live_line_is_drawn_on_terminals_alone_and_not_too_often(
    terminal: tuple[int, TextIO],
) -> None:
    file = StringIO()
    live = LiveLine(file, 0, 8, shown=True)
    log(file, 'one')
    assert not live.due()
    live.draw(1, 'step 1/8')
    live.close()
    assert file.getvalue() == 'one\n'
    assert not LiveLine(terminal[1], 0, 8, shown=False).due()
    live = LiveLine(terminal[1], 0, 8, shown=True)
    assert live.due()
    live.draw(1, 'step 1/8')
    assert not live.due()
    live.close()


def test_terminal_that_is_stopped_or_gone_is_passed_over(
    terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_line, 'SECONDS', 0)
    seen, stream = terminal
    live = LiveLine(stream, 0, 8, shown=True)
    assert live.due()
    termios.tcflow(stream, termios.TCOOFF)  # Ctrl-S
    assert not live.due()
    os.set_blocking(stream.fileno(), False)
    live.draw(1, 'step 1/8')
    os.set_blocking(stream.fileno(), True)
    termios.tcflow(stream, termios.TCOON)
    assert live.due()
    os.close(seen)
    live.draw(2, 'step 2/8')
    log(stream, 'one')
    live.close()


@pytest.mark.slow
def test_run_on_a_terminal_shows_a_live_line_and_has_the_bits_of_one_into_a_file(
    tmp_path: Path, terminal: tuple[int, TextIO]
) -> None:
    seen, stream = terminal
    process = subprocess.Popen(
        runs.command(tmp_path / 'watched'), cwd=runs.ROOT, env=runs.environment(2),
        stdout=stream, stderr=stream,
    )  # fmt: skip
    stream.close()
    output = ''
    with contextlib.suppress(OSError):  # there is nobody at the other end any more
        while data := os.read(seen, 10_000):
            output += data.decode(errors='replace')
    assert process.wait() == 0, output
    drawn = re.findall(
        r'step +\d+/24 loss \S+ accuracy \S+(?: examples/s \S+ left \d\d:\d\d)? saved (\d+)', output
    )
    assert {int(step) for step in drawn} <= {0, 6, 12, 18}
    assert drawn
    printed = runs.finish(tmp_path / 'unwatched')
    assert '\r' not in printed
    changing = r'\d\d:\d\d:\d\d |\S+/s \S+|left \S+|\(\S+summary.json\)|holds training .*'
    lines = [re.sub(changing, '', line) for line in screen(output)]
    assert lines == [re.sub(changing, '', line) for line in screen(printed)]
    assert runs.outcome(tmp_path / 'watched') == runs.outcome(tmp_path / 'unwatched')
