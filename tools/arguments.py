"""Parses the arguments of a tool and reports its mistakes, each in one line."""

import argparse
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath

from errors import RunError, UserError
from runtime.command_line import refuse
from runtime.storage import open_location


class Arguments(argparse.ArgumentParser):
    """Parses the arguments of a tool, whose docstring is its help. A mistake is one line."""

    def __init__(self, doc: str | None) -> None:
        """Takes the docstring of the tool, which shows how to call it."""
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage=argparse.SUPPRESS, description=doc, formatter_class=raw, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line."""
        refuse(message)


def one_line_errors(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Makes a tool's `main` end with one line and an exit code where it raises a RunError."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except RunError as error:
            refuse(error)

    return wrapped


def existing_run(workdir: str) -> epath.Path:
    """Returns the folder of an existing run. Raises UserError if there is none."""
    path = open_location(workdir)
    if not path.is_dir():
        raise UserError(f'{workdir}: expected the workdir of a run, found no folder')
    return path


def run_tool(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a tool on the command line. Ends quietly if a reader such as `head` has seen enough.

    Output is UTF-8 in every locale, and names of files keep their bytes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise  # not of standard output
        # Python would complain when it flushes standard output at exit. SIGPIPE stays ignored, or a
        # connection to a bucket could end the program, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            refuse(f'standard output: cannot be written ({error.strerror})')
        code = 128 + signal.SIGPIPE
    sys.exit(code)
