"""Turns words or characters into ids, and ids into text."""

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ('<pad>', '<unk>', '<bos>', '<eos>')
FIRST_WORD = len(SPECIALS)
ALL_LETTERS = slice(None)


def units(text: str, unit: str) -> Sequence[str]:
    """Returns the words or the characters of a text."""
    return text if unit == 'character' else text.split()


class Vocabulary:
    """Maps the units of the training split (words between white space, or characters) to ids.

    Ids: 0 padding, 1 unknown, 2 and 3 the marks around a text, then units, most frequent first.
    """

    def __init__(
        self, words: Sequence[str], unit: str = 'word', letters: slice = ALL_LETTERS
    ) -> None:
        """Numbers `words`, given without the specials; `unit` is 'word' or 'character'.

        Only the `letters` of a unit have an id, for example its first four or its last three.
        """
        self.words = tuple(words)
        self.names = (*SPECIALS, *self.words)  # by id
        self.unit, self.letters = unit, letters
        self._ids = {word: FIRST_WORD + index for index, word in enumerate(self.words)}

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        min_frequency: int,
        unit: str = 'word',
        letters: slice = ALL_LETTERS,
    ) -> 'Vocabulary':
        """Makes a vocabulary of units seen at least `min_frequency` times; ties by spelling."""
        counts = collections.Counter(unit_ for text in texts for unit_ in units(text, unit))
        parts: collections.Counter[str] = collections.Counter()
        for word, count in counts.items():
            parts[word[letters]] += count
        frequent = [(-count, part) for part, count in parts.items() if count >= min_frequency]
        return cls([part for _, part in sorted(frequent)], unit, letters)

    def __len__(self) -> int:
        """Returns the number of ids."""
        return FIRST_WORD + len(self.words)

    def encode(self, text: str, max_length: int, start: bool = True) -> np.ndarray:
        """Returns the ids of BOS (if `start`), units and EOS: int32[T], T <= max_length.

        Cuts longer texts.
        """
        marks = [BOS] if start else []
        ids = [self._ids.get(word[self.letters], UNK) for word in units(text, self.unit)]
        return np.array([*marks, *ids[: max_length - len(marks) - 1], EOS], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to EOS or padding; other marks by their names."""
        until_end = itertools.takewhile(lambda index: index not in (PAD, EOS), ids)
        return (' ' if self.unit == 'word' else '').join(self.names[index] for index in until_end)

    def file_text(self) -> str:
        """Returns the contents of the vocabulary file: one line for each id."""
        return '\n'.join(self.names) + '\n'

    def unknown(self, text: str) -> list[str]:
        """Returns the units of a text that have no id."""
        return [word for word in units(text, self.unit) if word not in self._ids]
