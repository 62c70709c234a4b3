"""Trains as train.py does, and writes when its parts began and ended, for benchmarks/goodput.py.

    python -m benchmarks.probe FOLDER asynchronous|synchronous FLAGS_OF_TRAIN

Process N of a pod writes the file N of FOLDER. A line is a Span of benchmarks/accounting.py as
JSON, complete as soon as it is over, so that a kill loses none. If 'synchronous', a save waits for
its commit.
"""

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

import train
from runtime import command_line
from runtime.checkpoints import Checkpoints
from runtime.ledger import Ledger

COMPILATION = '/jax/core/compile/'  # tracing, lowering, compiling or reading from the cache


class Probe:
    """Writes spans, and knows when the last step or evaluation was over."""

    def __init__(self, folder: Path) -> None:
        """Opens the file of this process."""
        self._file = (folder / os.environ.get('JAX_PROCESS_ID', '0')).open('a', buffering=1)
        self._over, self._step = 0.0, 0

    def write(self, kind: str, begin: float, end: float, step: int = 0) -> None:
        """Writes a span."""
        self._file.write(json.dumps([kind, begin, end, step]) + '\n')

    def timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that does the same and writes its span."""

        @functools.wraps(call)
        def wrapped(*args: Any, **options: Any) -> Any:
            begin = time.time()
            try:
                return call(*args, **options)
            finally:
                self.write(kind, begin, time.time())

        return wrapped

    def evaluation(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a `make_evaluate` whose evaluations belong to the step before."""

        def made(*args: Any) -> Callable[[Any], Any]:
            evaluate = make(*args)

            def wrapped(params: Any) -> Any:
                found = evaluate(params)
                if self._step:
                    self.finished(self._step)
                return found

            return wrapped

        return made

    def finished(self, step: int) -> None:
        """Writes that a step is over. The first has no known begin."""
        now = time.time()
        self.write('step', self._over or now, now, step)
        self._over, self._step = now, step

    def rows(self, finish: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a `Ledger._finish` that writes each step it reads, and waits for the first."""

        def wrapped(ledger: Any, keep: int) -> Any:
            if not self._over:
                jax.block_until_ready(ledger._pending[-1])
                self.finished(ledger.start + 1)
            rows = finish(ledger, keep)
            for row in rows:
                if row['step'] > self._step:
                    self.finished(int(row['step']))
            return rows

        return wrapped

    def compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        """Hears from JAX that something was compiled."""
        if event.startswith(COMPILATION) and threading.current_thread() is threading.main_thread():
            self.write('compilation', (now := time.time()) - duration_secs, now)


def main(folder: str, saves: str, *flags: str) -> None:
    """Puts the probe into the trainer, and trains."""
    probe, save = Probe(Path(folder)), Checkpoints.save

    def synchronous(checkpoints: Checkpoints, *args: Any) -> None:
        save(checkpoints, *args)
        checkpoints._finish()

    chosen: dict[str, Any] = {'asynchronous': save, 'synchronous': synchronous}
    monitoring.register_event_duration_secs_listener(probe.compiled)
    probed: list[tuple[Any, str, Callable[..., Any]]] = [
        (Checkpoints, 'save', probe.timed('save', chosen[saves])),
        (Checkpoints, 'close', probe.timed('save', Checkpoints.close)),
        (Checkpoints, 'restore', probe.timed('restore', Checkpoints.restore)),
        (Ledger, '_finish', probe.rows(Ledger._finish)),
        (train, 'make_evaluate', probe.evaluation(train.make_evaluate)),
    ]
    for owner, name, call in probed:
        setattr(owner, name, call)
    sys.argv = ['train.py', *flags]
    command_line.run(train.main)


if __name__ == '__main__':
    main(*sys.argv[1:])
