"""Decides which labels are classes: not two spellings of one, no missing labels, no amounts."""

import decimal
import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from errors import UserError

MOST_AMOUNTS = 20  # labels that may be one to a row, or numbers with fractions
_MISSING = {'', 'nan', '-nan', 'inf', '-inf', 'na', 'n/a', '#n/a', '<na>', 'null'}
_HIDDEN = {'Cc', 'Cf', 'Zs', 'Zl', 'Zp'}  # categories of Unicode
# Blank or without a glyph, though their categories are those of letters, marks and symbols.
_HIDDEN_TOO = {*'\u034f\u115f\u1160\u2800\u3164\uffa0', *map(chr, range(0xFE00, 0xFE10))}
_TRUTH = {'true': decimal.Decimal(1), 'false': decimal.Decimal(0)}
_QUOTES = '"\'\u2018\u2019\u201c\u201d'


def class_names(labels: Sequence[str], place: Callable[[int], str]) -> tuple[str, ...]:
    """Returns the labels that occur, sorted as numbers if all are numbers, otherwise as text.

    `place` says where a row is. Raises UserError for two spellings of one label, and for labels
    that are no classes.
    """
    keys = {label: canonical(label) for label in dict.fromkeys(labels)}
    numbers = {label: key for label, key in keys.items() if isinstance(key, decimal.Decimal)}
    numeric = len(numbers) == len(keys)
    fractions = numeric and any(key != key.to_integral_value() for key in numbers.values())
    if len(keys) > MOST_AMOUNTS and (fractions or len(keys) > len(labels) / 2):
        raise UserError(
            f'{place(0)}: {len(keys)} different {"numbers" if numeric else "texts"} as the labels '
            f'of {len(labels)} rows, expected classes; is this another column, or an amount?'
        )
    spelled: dict[str | decimal.Decimal, str] = {}
    for label, key in keys.items():
        if (other := spelled.setdefault(_TRUTH.get(str(key), key), label)) != label:
            places = (place(labels.index(spelling)) for spelling in (label, other))
            raise UserError(
                f'{next(places)}: label {label[:40]!a}, but {next(places)} has {other[:40]!a}: '
                'expected one spelling of a label'
            )
    return tuple(sorted(keys, key=numbers.__getitem__ if numeric else str))


def missing_labels(labels: Sequence[str]) -> set[str]:
    """Returns which of the labels stand for no label, such as '', 'nan' and 'N/A'.

    -1 does so beside 0, 1, 2, ..., as in TFDS. Beside words, or as in {-1, 1}, it is a class.
    """
    keys = {label: canonical(label) for label in set(labels)}
    classes = set(keys.values()) - _MISSING
    counted = all(isinstance(key, decimal.Decimal) and (key == -1 or key >= 0) for key in classes)
    missing = _MISSING | ({decimal.Decimal(-1)} if counted and 0 in classes else set())
    return {label for label, key in keys.items() if key in missing}


@functools.lru_cache(2**16)
def canonical(label: str) -> str | decimal.Decimal:
    """Returns what spellings of one label share.

    They may differ in case, space, invisible characters, Unicode form, quotes around it, a mark at
    its end, and the format of a number.
    """
    text = ''.join(visible(unicodedata.normalize('NFKC', label).casefold()))
    text = text.strip(_QUOTES) or text
    text = text.rstrip('.,;:') or text
    try:
        number = decimal.Decimal(text.replace('_', '?'))  # Decimal would read 1_0 as 10
    except decimal.InvalidOperation:
        return text
    return number if number.is_finite() else 'nan'


def visible(text: str) -> Iterator[str]:
    """Yields the characters of a text that print something."""
    for character in text:
        if unicodedata.category(character) not in _HIDDEN and character not in _HIDDEN_TOO:
            yield character
