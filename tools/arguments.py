"""The arguments of a tool: its docstring is its help, and a mistake is one line."""

import argparse
from typing import NoReturn

from runtime.command_line import refuse


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
