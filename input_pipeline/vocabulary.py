"""Words as numbers."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ('<pad>', '<unk>', '<bos>', '<eos>')
FIRST_WORD = len(SPECIALS)


class Vocabulary:
    """The words of the training split; a text is split at white space.

    Ids: 0 padding, 1 unknown, 2 and 3 the marks around every text, then words, frequent first.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """`words`: without the specials, in the order of their ids."""
        self.words = tuple(words)
        self._ids = {word: FIRST_WORD + index for index, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Iterable[str], min_frequency: int) -> 'Vocabulary':
        """The words seen at least `min_frequency` times; equally frequent ones by spelling."""
        counts = collections.Counter(word for text in texts for word in text.split())
        frequent = [(-count, word) for word, count in counts.items() if count >= min_frequency]
        return cls([word for _, word in sorted(frequent)])

    def __len__(self) -> int:
        """The number of ids."""
        return FIRST_WORD + len(self.words)

    def encode(self, text: str, max_length: int) -> np.ndarray:
        """The ids of BOS, words, EOS: int32[T], 2 <= T <= max_length; words beyond are cut off."""
        words = text.split()[: max_length - 2]
        ids = [BOS, *(self._ids.get(word, UNK) for word in words), EOS]
        return np.array(ids, np.int32)

    def file_text(self) -> str:
        """A line for every id."""
        return '\n'.join((*SPECIALS, *self.words)) + '\n'
