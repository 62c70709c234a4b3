"""The command line: flags are read, and a mistake is told in one line, with exit code 2."""

import argparse
import contextlib
import difflib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from etils import epath

from configs.schema import Config, check, options
from errors import KeyfoldError, UserError
from runtime.storage import in_bucket, open_location


class Arguments(argparse.ArgumentParser):
    """What a tool takes. Its docstring is its help; a mistake is one line."""

    def __init__(self, doc: str | None) -> None:
        """`doc`: the docstring of the tool, which shows how it is called."""
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage=argparse.SUPPRESS, description=doc, formatter_class=raw, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        refuse(message)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`app.run` with errors for people: UserError is a line on standard error and its exit code."""

    def checked_main(argv: Sequence[str]) -> None:
        try:
            if argv[1:]:
                raise UserError(f'{argv[1]}: expected only flags, as in --workdir=DIR')
            main(argv)
        except KeyfoldError as error:
            refuse(error)

    app.run(checked_main, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Fills absl's flags; a mistake ends the program, and so does --help."""
    if {'--help', '-h'} & set(argv):
        print(short_help())
        sys.exit()
    try:
        return flags.FLAGS(argv)
    except KeyError as error:  # what ml_collections raises for a field that a config has not
        refuse(unknown_field(str(error), argv))
    except (flags.Error, AttributeError, ValueError, TypeError) as error:
        refuse(error)


def short_help() -> str:
    """What the program says of itself, and its own flags."""
    lines = [(sys.modules['__main__'].__doc__ or '').rstrip(), '']
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        default = f' (default: {(flag.default_as_str or "")[1:-1]})' if flag.default else ''
        lines.append(f'  --{flag.name:14} {flag.help}{default}')
    return '\n'.join(lines)


def unknown_field(error: str, argv: Sequence[str]) -> str:
    """Names the first override that is no option, and the option with the nearest name."""
    config = config_before_overrides(argv)
    known = [f'config.{name}' for name, _, _ in options(config)] if config else []
    given = [arg.lstrip('-').partition('=')[0] for arg in argv if arg.startswith('--config.')]
    wrong = next((name for name in given if name not in known), error)
    nearest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    hint = f'; did you mean --{nearest[0]}?' if nearest else '; docs/config.md lists all'
    return f'--{wrong}: no such config field{hint}'


def config_before_overrides(argv: Sequence[str]) -> Config | None:
    """Returns the config of the file after --config, or None where that cannot be loaded."""
    words = iter(argv)
    for word in words:
        name, _, path = word.lstrip('-').partition('=')
        if name == 'config' != word:
            with contextlib.suppress(Exception):  # mistakes in the file are reported elsewhere
                config = flags.FLAGS['config'].parser.parse(path or next(words))
                return config if isinstance(config, Config) else None
    return None


def loaded_config(holder: flags.FlagHolder[Any]) -> Config:
    """The checked config of a --config flag. Raises UserError when file or config is unusable."""
    config = holder.value
    if not isinstance(config, Config):
        problem = 'expected a file whose get_config() gives a Config'
        with contextlib.suppress(AttributeError):
            try:
                _ = config.seed
            except OSError as error:  # ml_collections keeps it until a field is asked for
                problem = str(error)
        raise UserError(f'--config: {problem}')
    check(config)
    return config


def usable_workdir(workdir: str | None) -> epath.Path:
    """The folder of a run. Raises UserError when it is a file, can not be reached or not be written.

    Whether a bucket can be written is seen when the run takes its lease there.
    """
    if not workdir:
        raise UserError('--workdir: expected the folder that the run lives in')
    if in_bucket(workdir) and not workdir.startswith('gs://'):
        raise UserError(
            f'--workdir={workdir}: of buckets, Orbax writes to gs://BUCKET/FOLDER alone'
        )
    path = open_location(workdir, for_checkpoints=True)
    remote = in_bucket(workdir)
    parent = path if remote else next(p for p in (path, *path.parents) if p.exists())
    if parent.exists() and not parent.is_dir():
        raise UserError(f'--workdir={workdir}: expected a folder, {parent} is a file')
    if remote:
        return path
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise UserError(
            f'--workdir={workdir}: can not write in {parent} ({error.strerror})'
        ) from error
    return path


def existing_run(workdir: str) -> epath.Path:
    """The folder of a run that is there. Raises UserError where it is not."""
    path = open_location(workdir)
    if not path.is_dir():
        raise UserError(f'{workdir}: expected the workdir of a run, found no folder')
    return path


def refuse(problem: object) -> NoReturn:
    """Ends the program with one line."""
    print('error:', ' '.join(str(problem).split()), file=sys.stderr)
    sys.exit(problem.exit_code if isinstance(problem, KeyfoldError) else UserError.exit_code)
