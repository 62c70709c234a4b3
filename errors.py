"""What can go wrong, by name, each with its exit code.

A `RunError` reaches people as one line: what was found, what is expected, what to do. Any other
exception is a bug: a traceback and exit code 1.
"""

import signal


class RunError(Exception):
    """Base class of user-facing errors."""

    exit_code = 1


class UserError(RunError):
    """A mistake in the command, config, data or environment."""

    exit_code = 2


class Damaged(UserError):
    """A checkpoint is readable, but not what was written."""


class Unavailable(RunError):
    """Another process or the storage failed, or resources ran out. Trying again may help."""


class NonFinite(RunError):
    """A loss or gradient is not finite, and the config says to stop."""

    exit_code = 3


class TakenOver(RunError):
    """Another run took over the workdir."""

    exit_code = 4


class SaveFailed(RunError):
    """A checkpoint or another durable file could not be written."""

    exit_code = 5


REQUEUE = 75
"""Exit code of a run asked to stop: start it again (EX_TEMPFAIL, sysexits.h)."""
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # ask a run to stop
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
    SIGNALS.remove(signal.SIGHUP)


def first_line(error: BaseException) -> str:
    """Returns an exception's first line that says something, or else its name."""
    lines = (line.strip()[:300] for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
