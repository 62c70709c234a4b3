"""What a value of an option may be, how it is converted, and which name was meant."""

import difflib
import numbers
import os
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

WORDS = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}


class Check(NamedTuple):
    """Says what the value of an option may be."""

    test: Callable[[Any], bool]
    expected: str  # the same in words


# Seeds have 32 bits, since two larger ones could give the same key. -1 is the run's seed.
SEED = Check(lambda value: 0 <= value < 2**32, 'a whole number in [0, 2**32)')
STREAM_SEED = Check(lambda value: -1 <= value < 2**32, '-1 or a whole number in [0, 2**32)')


def at_least(low: float) -> Check:
    """Expects a number in [low, 2**31), so that it fits in an int32."""
    return Check(lambda value: low <= value < 2**31, f'a number in [{low}, 2**31)')


def fraction() -> Check:
    """Expects a rate below 1."""
    return Check(lambda value: 0 <= value < 1, 'a number in [0, 1)')


def one_of(*names: str) -> Check:
    """Expects one of these words."""
    return Check(lambda value: value in names, 'one of ' + ', '.join(names))


def names() -> Check:
    """Expects a tuple of one or more names, each once."""
    return Check(
        lambda value: bool(value) and all(value) and len(set(value)) == len(value),
        "one or more names, such as ('sentence',)",
    )


def converted(value: Any, kind: Any) -> Any:
    """Returns `value` as type `kind`. Raises TypeError if that would change or guess anything."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(converted(item, typing.get_args(kind)[0]) for item in value)
    if kind is int and number and (isinstance(value, numbers.Integral) or value == value // 1):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind is str and isinstance(value, str | os.PathLike):
        return str(os.fspath(value))
    if kind in (int, float, str) or not isinstance(kind, type) or not isinstance(value, kind):
        raise TypeError
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns '; did you mean config.NAME?' for the option that `name` abbreviates or misspells."""
    options = list(known)
    section, _, last = name.rpartition('.')

    def likeness(option: str) -> tuple[float, bool]:
        outer = option.rpartition('.')[0]
        return difflib.SequenceMatcher(None, section, outer).ratio(), outer != 'seeds'

    named = [
        option
        for option in options
        if (word := option.rpartition('.')[2]) == last
        or ''.join(part[0] for part in word.split('_')) == last
    ]
    nearest = sorted(named, key=likeness, reverse=True)[:1]
    nearest = nearest or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f'; did you mean config.{nearest[0]}?' if nearest else ''
