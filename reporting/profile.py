"""A trace of a few steps, `--profile=START:STOP`, for xprof."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator

import jax
from etils import epath

from errors import UserError
from runtime.storage import brief, in_bucket


class Profile:
    """Traces from the begin of step START to the end of step STOP into WORKDIR/profile."""

    def __init__(self, steps: str = '', workdir: epath.Path | None = None) -> None:
        """`steps`: 'START:STOP', or '' for none. Raises UserError for anything else."""
        self._first, self._last, self._tracing = 0, 0, False
        if not steps or workdir is None:
            return
        self._folder = workdir / 'profile'
        found = re.fullmatch(r'(\d+):(\d+)', steps)
        self._first, self._last = map(int, found.groups()) if found else (0, 0)
        if not 1 <= self._first <= self._last:
            raise UserError(
                f'--profile={steps}: expected START:STOP, steps as in --profile=100:110'
            )
        if in_bucket(workdir):
            raise UserError(f'--profile={steps}: expected a workdir on this machine, not {workdir}')

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the dispatch of a step, which the trace then shows by its number."""
        if number == self._first:
            self._first = 0  # no step has this number: it is not waited for any more
            self._tracing = self._survived(lambda: jax.profiler.start_trace(str(self._folder)))
        with jax.profiler.StepTraceAnnotation('train', step_num=number):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being taken, when the devices have done their work."""
        if not self._tracing:
            if self._first:
                logging.warning('profile: none, this launch had no step %d', self._first)
            return
        self._tracing = False
        jax.block_until_ready(jax.live_arrays())
        if self._survived(jax.profiler.stop_trace):
            logging.info('profile: written to %s', self._folder)

    def _survived(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # OSError, or whatever the profiler makes of it
            logging.error('profile: not written to %s (%s)', self._folder, brief(error))
            return False
        return True
