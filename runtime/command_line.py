"""Parses the command line. A mistake in it ends the program with one line and exit code 2."""

import ast
import io
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from absl import app, flags
from etils import epath
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from configs.checks import did_you_mean
from configs.schema import Config, check, options
from errors import RunError, UserError
from runtime.storage import in_bucket, open_location

MOST_CHARACTERS = 400  # of an error


class NumberOrText(flags.ArgumentParser[float | str]):
    """Parses an override of a number; `check` decides alike for these and for a file's values."""

    def parse(self, argument: str | float) -> float | str:
        """Returns the number that a text spells, or else the text."""
        try:
            return float(argument)
        except ValueError:
            return argument


class TupleOrWords(tuple_parser.TupleParser):
    """Parses an override of a tuple, as Python writes it or as words between commas."""

    def parse(self, argument: object) -> tuple[object, ...]:
        """Returns ('a', 'b') for a,b and (a,b). A word that holds a comma needs quotes."""
        if isinstance(argument, str):
            try:
                ast.literal_eval(argument)
            except (SyntaxError, ValueError):
                bare = argument[1:-1] if argument[:1] + argument[-1:] in ('()', '[]') else argument
                argument = tuple(filter(None, map(str.strip, bare.split(','))))
        return super().parse(argument)


for kind in (int, float):
    config_flags.register_flag_parser_for_type(kind, NumberOrText())
config_flags.register_flag_parser_for_type(tuple, TupleOrWords())


def run(main: Callable[[], None]) -> None:
    """Runs `main` by absl's `app.run`; a RunError becomes one line and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows escapes
        sys.stdout.reconfigure(errors='backslashreplace')
    if not (sys.stdout or sys.stderr):  # both closed
        sys.stdout = sys.stderr = open(os.devnull, 'w')  # noqa: SIM115
    if sys.warnoptions:  # PYTHONWARNINGS=error would end a run for what a library warns of
        warnings.simplefilter('default')

    def checked_main(argv: Sequence[str]) -> None:
        try:
            if argv[1:]:
                raise UserError(f'{argv[1]}: expected only flags, as in --workdir=DIR')
            main()
        except RunError as error:
            refuse(error)

    app.run(checked_main, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl's flags. Ends the program after --help, or with one line for a mistake."""
    try:
        config: Config | None = None
        for path in config_paths(argv):
            config = load_config(path)
        if {'--help', '-h'} & set(argv):
            print(short_help(config))
            sys.exit()
        if config:
            require_options(argv, config)
        return flags.FLAGS(argv)
    except (UserError, flags.Error, LookupError, AttributeError, ValueError, TypeError) as error:
        refuse(error)


def config_paths(argv: Sequence[str]) -> Iterator[str]:
    """Yields the path after each --config. absl uses the last, but loads all."""
    words = iter(argv[1:] if 'config' in flags.FLAGS else ())
    for word in words:
        name, _, path = word.lstrip('-').partition('=')
        if name == 'config' != word and (path := path or next(words, '')):
            yield path


def load_config(path: str) -> Config:
    """Runs a config file, without overrides. Raises UserError for any mistake in it."""
    file = Path(path.partition(':')[0])
    if not file.is_file():
        files = sorted(Path('configs').glob('*.py'))
        configs = ', '.join(str(f) for f in files if 'def get_config' in f.read_text())
        raise UserError(f'{file}: no such file; there are {configs or "none"}')
    try:
        config = flags.FLAGS['config'].parser.parse(path)
    except UserError:
        raise
    except Exception as error:  # the file is code, so anything can be raised
        # ml_collections raises TypeError and ValueError again, with a traceback as their text.
        cause = error.__context__ or error
        lines = [getattr(cause, 'lineno', 0)]  # of a SyntaxError
        frames = traceback.extract_tb(cause.__traceback__)
        lines += [frame.lineno for frame in frames if Path(frame.filename) == file]
        hint = ''
        if isinstance(cause, AttributeError | TypeError):
            quoted = str(cause).split("'")[-2:-1]  # the unknown attribute or keyword
            known = {name.rpartition('.')[2] for name in option_names()}
            hints = (did_you_mean(name, known) for name in quoted if name not in known)
            hint = next(hints, '').replace('config.', '')
        found = f'{type(cause).__name__}: {cause}{hint}'
        raise UserError(f'{file}, line {lines[-1]}: {found}') from error
    if not isinstance(config, Config):
        raise UserError(f'{file}: expected get_config() to return a Config')
    return config


def option_names() -> set[str]:
    """Returns the names of all options, in whatever section of whatever task that is imported."""
    kinds: list[Any] = [kind for kind in get_type_hints(Config).values() if is_dataclass(kind)]
    tasks = [kind for section in kinds for kind in section.__subclasses__()]
    return {field.name for kind in (Config, *kinds, *tasks) for field in fields(kind)}


def short_help(config: Config | None = None) -> str:
    """Returns the program's docstring, its own flags, and the options of the config, if given."""
    lines = [(sys.modules['__main__'].__doc__ or '').rstrip(), '']
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        default = f' (default: {(flag.default_as_str or "")[1:-1]})' if flag.default else ''
        lines.append(f'  --{flag.name:14} {flag.help}{default}')
    if 'config' in flags.FLAGS:
        lines.append('  --config.FIELD=VALUE  Overrides an option; --config=FILE --help lists all.')
    for name, value, field in options(config) if config else ():
        check, resumable = field.metadata['check'], field.metadata['resumable']
        notes = [f'expected: {check[1]}'] if check else []
        notes += ['may differ on a resume'] if resumable else []
        lines += [f'  --config.{name}={value!r}', f'      {field.metadata["meaning"]}']
        lines[-1] += f' ({"; ".join(notes)})' if notes else ''
    return '\n'.join(lines)


def require_options(argv: Sequence[str], config: Config) -> None:
    """Raises UserError for an override that is no option, and names the one that was meant."""
    known = [name for name, _, _ in options(config)]
    for argument in argv:
        name = argument.lstrip('-').partition('=')[0].removeprefix('config.')
        if argument.startswith('--config.') and name not in known:
            raise UserError(f'--config.{name}: no such option{did_you_mean(name, known)}')


def checked_config(holder: flags.FlagHolder[Any]) -> Config:
    """Returns the checked config of a --config flag. Raises UserError if it is unusable."""
    config = holder.value
    if not isinstance(config, Config):
        raise UserError('--config: expected a file such as configs/reviews.py')
    check(config)
    return config


def check_workdir(workdir: str | None) -> epath.Path:
    """Returns the folder of a run. Raises UserError if it is a file, unreachable or not writable.

    The same holds for `checkpoints/` and `ledger/` in it, if they exist. A bucket that is not
    writable is found when the run takes its lease there.
    """
    if not workdir:
        raise UserError('--workdir: expected the folder of the run, such as --workdir=runs/reviews')
    if in_bucket(workdir) and not workdir.startswith('gs://'):
        raise UserError(f'--workdir={workdir}: expected a local folder or gs://BUCKET/FOLDER')
    path, remote = open_location(workdir, for_checkpoints=True), in_bucket(workdir)
    parent = path if remote else next(p for p in (path, *path.parents) if os.path.lexists(p))
    for folder in (parent,) if remote else (parent, path / 'checkpoints', path / 'ledger'):
        if not folder.is_dir() and (folder.exists() or os.path.islink(folder)):
            found = 'file' if folder.exists() else 'link to nothing'
            raise UserError(f'--workdir={workdir}: expected a folder, {folder} is a {found}')
        try:
            if not remote and folder.exists():
                tempfile.TemporaryDirectory(dir=folder).cleanup()
        except OSError as error:
            problem = f'cannot write in {folder} ({error.strerror})'
            raise UserError(f'--workdir={workdir}: {problem}') from error
    for file in (path / 'config.json', path / 'metrics.csv', path / 'summary.json'):
        if not remote and file.is_dir():
            raise UserError(f'--workdir={workdir}: expected a file, {file} is a folder')
    return path


def require_free(workdir: epath.Path) -> None:
    """Raises UserError if a workdir without a checkpoint holds what a new run would overwrite.

    A run that was killed before its first checkpoint leaves a config.json, and no steps in ledger/.
    """
    summary, config = workdir / 'summary.json', workdir / 'config.json'
    found = list(workdir.glob('ledger/*.npy'))
    if summary.exists():
        found.append(summary)
    if config.exists() and b'"num_shards"' not in config.read_bytes():
        found.append(config)
    if found:
        raise UserError(
            f'{workdir}: expected an empty folder or a run, found {found[0].name} and no '
            'checkpoint; bring back checkpoints/, or use another --workdir'
        )


def one_line(text: object, most: int = MOST_CHARACTERS) -> str:
    """Returns the text on one line, without its middle if it has more than `most` characters."""
    line = ' '.join(str(text).split())
    if len(line) <= most:
        return line
    end = most // 3  # often says what to do
    return f'{line[: most - end - 5]} ... {line[-end:]}'


def refuse(problem: object) -> NoReturn:
    """Ends the program with one line, and the exit code of the problem, by default 2."""
    print('error:', one_line(problem, MOST_CHARACTERS - len('error: ')), file=sys.stderr)
    sys.exit(problem.exit_code if isinstance(problem, RunError) else UserError.exit_code)
