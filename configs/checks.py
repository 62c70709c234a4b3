"""What a knob is, and what its value must be: a test, and in words what it expects."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

Check = tuple[Callable[[Any], bool], str]


def knob(default: Any, meaning: str, check: Check | None = None, *, free: bool = False) -> Any:
    """A dataclass field with its meaning, its check, and whether it may change on resume."""
    return dataclasses.field(
        default=default, metadata={'meaning': meaning, 'check': check, 'free': free}
    )


def at_least(low: float) -> Check:
    """A finite number that is not smaller."""
    return lambda value: math.isfinite(value) and value >= low, f'a number >= {low}'


def uint32() -> Check:
    """What a key is made from."""
    return lambda value: 0 <= value < 2**32, 'a whole number in [0, 2**32)'


def fraction() -> Check:
    """A rate or a probability, less than one."""
    return lambda value: 0 <= value < 1, 'a number in [0, 1)'


def letter_counts() -> Check:
    """How many letters of a word's start and of its end; or none of both."""

    def ok(value: tuple[int, ...]) -> bool:
        return not value or (len(value) == 2 and all(type(n) is int and n >= 1 for n in value))

    return ok, 'two whole numbers >= 1, as in (4,3), or ()'


def one_of(*names: str) -> Check:
    """One of a few words."""
    return lambda value: value in names, 'one of ' + ', '.join(names)


def increasing_lengths() -> Check:
    """Widths of buckets, short to long."""

    def ok(value: tuple[int, ...]) -> bool:
        lengths = list(value)
        return (
            bool(lengths)
            and all(type(n) is int and n >= 3 for n in lengths)
            and lengths == sorted(set(lengths))
        )

    return ok, 'increasing whole numbers >= 3 (two sentence marks and a word), as in (8,16,32)'


def names() -> Check:
    """At least one name."""
    return (
        lambda value: bool(value) and all(isinstance(n, str) and n for n in value),
        "names, as in ('sentence',)",
    )


# seq2seq: from here to the end (docs/fork.md)


def probability() -> Check:
    """A probability, certainty included."""
    return lambda value: 0 <= value <= 1, 'a number in [0, 1]'


def digit_counts() -> Check:
    """Digits of two operands."""

    def ok(value: tuple[int, ...]) -> bool:
        whole = all(type(n) is int for n in value)
        return whole and len(value) == 2 and 1 <= value[0] <= value[1] <= 4

    return ok, 'two whole numbers from 1 to 4, the smaller first, as in (2,3)'
