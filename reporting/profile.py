"""Traces a few steps for xprof: `--profile=START:STOP`."""

import contextlib
import logging
from collections.abc import Iterator

import jax
from etils import epath

from errors import UserError
from reporting.loggers import tolerate
from runtime.storage import in_bucket


class Profile:
    """Traces from the beginning of step START to the end of step STOP into WORKDIR/profile."""

    def __init__(self, steps: str = '', workdir: epath.Path | None = None) -> None:
        """Takes `steps` as 'START:STOP', or '' for none. Raises UserError for anything else."""
        self._first, self._last, self._tracing = 0, 0, False
        if not steps or workdir is None:
            return
        self._folder = str(workdir / 'profile')
        with contextlib.suppress(ValueError):
            self._first, self._last = map(int, steps.split(':'))
        if not 1 <= self._first <= self._last:
            raise UserError(f'--profile={steps}: expected START:STOP, such as --profile=100:110')
        if in_bucket(workdir):
            raise UserError(f'--profile={steps}: expected a workdir on this machine, not {workdir}')

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps the dispatch of a step, which the trace then shows by its number."""
        if number == self._first:
            self._first = 0  # matches no step, so the trace starts only once
            with tolerate('profile'):
                jax.profiler.start_trace(self._folder)
                self._tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=number):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Waits for the devices and writes the trace, if one is being taken."""
        if self._first:
            logging.warning('profile: not taken, this launch had no step %d', self._first)
            self._first = 0
        elif self._tracing:
            self._tracing = False
            jax.block_until_ready(jax.live_arrays())
            with tolerate('profile'):
                jax.profiler.stop_trace()
                logging.info('profile: written to %s', self._folder)
