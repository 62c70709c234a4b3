"""Saves the newest finished step and exits with REQUEUE when the run is asked to stop.

A scheduler that reclaims the machine sends SIGTERM, Ctrl-C SIGINT, a terminal that closes SIGHUP. A
thread hears them, even while the main thread compiles or reads. The processes of a run get a signal
at different times, or only some of them do, and their clocks differ: they vote at every step, and
all save or stop after the same one.
"""

import collections
import logging
import os
import signal
import threading
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from errors import REQUEUE, SIGNALS
from runtime import processes
from training.mesh import Layout

TRAIN, SAVE, STOP = range(3)  # the votes of a process; the largest decides
VOTES_IN_FLIGHT = 2  # a vote is read this many steps later, so that nobody waits for it


class StopRequest:
    """Whether the run was asked to stop. Asked twice, or before its first step, it ends at once."""

    def __init__(self) -> None:
        """Starts deaf: call `listen` to hear signals."""
        self._asked, self._training, self._timeout = False, False, 0
        self._votes: collections.deque[jax.Array] = collections.deque()

    def listen(self, timeout_seconds: int) -> Self:
        """Hears signals from now on, and returns itself. The first one leaves so long to stop."""
        self._timeout = timeout_seconds
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe gets its number
        threading.Thread(target=self._hear, args=(read_end,), daemon=True).start()
        return self

    def _hear(self, pipe: int) -> None:
        while True:
            number = os.read(pipe, 1)[0]
            # The kernel and the shell may both send SIGHUP: that is one request.
            if number not in SIGNALS or (self._asked and number == signal.SIGHUP):
                continue
            name = signal.Signals(number).name
            if self._asked or not self._training:
                processes.end_now(f'{name}: stopped at once; start again to resume', REQUEUE)
            self._asked = True
            logging.warning('%s: saving and stopping; a second signal stops at once', name)
            problem = f'{name}: not saved within {self._timeout} s; resume from an older checkpoint'
            processes.end_after(self._timeout, problem, REQUEUE)

    def agreed(self, layout: Layout, save: bool = False) -> int:
        """Returns TRAIN, SAVE or STOP, the same on all processes. Call it after every step.

        `save`: this process wants a checkpoint. It may ask until it gets one.
        """
        self._training = True
        vote = STOP if self._asked else SAVE if save else TRAIN
        if jax.process_count() == 1:
            return vote
        votes = np.full(jax.local_device_count(), vote, np.uint32)
        self._votes.append(jnp.max(layout.put({'votes': votes})['votes']))
        if len(self._votes) <= VOTES_IN_FLIGHT:
            return TRAIN
        if decision := int(jax.device_get(self._votes.popleft())):
            self._votes.clear()  # they asked for the save that comes now
        return decision
