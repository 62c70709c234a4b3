"""Asked to stop, a run saves its newest finished step and ends, with a code that says: go on later.

SIGTERM comes from a scheduler that takes the machine back, SIGINT from Ctrl-C. A thread hears of
them even while the main one compiles or reads. The processes of a pod are told at different
moments, or only some of them are: they count votes in each step, and stop after the same one.
"""

import collections
import logging
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np

from runtime import processes
from training.mesh import Layout

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, worth another try
SIGNALS = (signal.SIGTERM, signal.SIGINT)
VOTES_IN_FLIGHT = 2  # steps after which a vote is read, when it is long counted


class StopRequest:
    """Whether the run was asked to stop. Before its first step, and twice: it ends at once."""

    def __init__(self) -> None:
        """Nobody listens yet."""
        self._asked, self._training, self._timeout = False, False, 0
        self._votes: collections.deque[jax.Array] = collections.deque()

    def listen(self, timeout_seconds: int) -> None:
        """From now on. From the first signal on, the run has `timeout_seconds` to stop."""
        self._timeout = timeout_seconds
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe has it
        threading.Thread(target=self._hear, args=(heard,), daemon=True).start()

    def _hear(self, pipe: int) -> None:
        while True:
            number = os.read(pipe, 1)[0]
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            if self._asked or not self._training:
                processes.end_now(f'{name}: stopped at once; start again to go on', EXIT_CODE)
            self._asked = True
            logging.warning('%s: saving and stopping; once more to stop at once', name)
            problem = f'{name}: not saved within {self._timeout} s; an older checkpoint goes on'
            late = threading.Timer(self._timeout, processes.end_now, (problem, EXIT_CODE))
            late.daemon = True
            late.start()

    def agreed(self, layout: Layout) -> bool:
        """Whether to stop after this step, the same on all processes. Call it after every step."""
        self._training = True
        if jax.process_count() == 1:
            return self._asked
        asked = np.full(jax.local_device_count(), self._asked, np.uint32)
        self._votes.append(jnp.sum(layout.put({'asked': asked})['asked']))
        return len(self._votes) > VOTES_IN_FLIGHT and bool(jax.device_get(self._votes.popleft()))
