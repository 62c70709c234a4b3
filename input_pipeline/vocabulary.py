"""Turns texts into ids, and ids into text: words between white space, or single characters.

For other tokenizers see input_pipeline/library_tokenizer.py. An exported model includes both files.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ('<pad>', '<unk>', '<bos>', '<eos>')
FIRST_WORD = len(SPECIALS)
ALL_LETTERS = slice(None)
Units = Callable[[str], Sequence[str]]
UNITS: dict[str, Units] = {'words': str.split, 'characters': list}  # by data.tokenizer


class Vocabulary:
    """Maps the units of the training split (words between white space, or characters) to ids.

    Ids: 0 padding, 1 unknown, 2 and 3 the marks around a text, then units, most frequent first.
    """

    unk, bos, eos, first_word = UNK, BOS, EOS, FIRST_WORD

    def __init__(
        self, words: Sequence[str], units: Units = str.split, letters: slice = ALL_LETTERS
    ) -> None:
        """Numbers `words`, given without the specials; `units` splits a text.

        `letters` cuts each unit before the lookup, for example to its first four characters.
        """
        self.words = tuple(words)
        self.names = (*SPECIALS, *self.words)  # by id
        self.units, self._letters = units, letters
        self._ids = {word: FIRST_WORD + index for index, word in enumerate(self.words)}

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        min_frequency: int,
        units: Units = str.split,
        letters: slice = ALL_LETTERS,
    ) -> 'Vocabulary':
        """Makes a vocabulary of units seen `min_frequency` times or more; ties by alphabet."""
        parts = collections.Counter(unit[letters] for text in texts for unit in units(text))
        frequent = [(-count, part) for part, count in parts.items() if count >= min_frequency]
        return cls([part for _, part in sorted(frequent)], units, letters)

    def __len__(self) -> int:
        """Returns the number of ids."""
        return len(self.names)

    def tokens(self, text: str) -> list[tuple[int, str]]:
        """Returns the id of each token, without marks, and the part of the text it stands for."""
        return [(self._ids.get(unit[self._letters], UNK), unit) for unit in self.units(text)]

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text, without marks."""
        get, letters = self._ids.get, self._letters
        return [get(unit[letters], UNK) for unit in self.units(text)]

    def marked(self, ids: list[int], max_length: int, start: bool = True) -> list[int]:
        """Returns BOS (if `start`), ids and EOS: at most `max_length` ids. Cuts longer texts."""
        marks = [self.bos] if start else []
        return [*marks, *ids[: max_length - len(marks) - 1], self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to EOS or padding; other marks by their names."""
        until_end = itertools.takewhile(lambda index: index not in (PAD, EOS), ids)
        space = ' ' if self.units is str.split else ''
        return space.join(self.names[index] for index in until_end)

    def facts(self, prefix: str = '') -> dict[str, object]:
        """Returns the JSON for library_tokenizer.restored."""
        return {f'{prefix}vocabulary': list(self.words)}

    def file_text(self) -> str:
        """Returns the contents of the vocabulary file: one line for each id."""
        return '\n'.join(self.names) + '\n'
