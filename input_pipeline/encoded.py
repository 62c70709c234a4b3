"""Examples as arrays, any of which can be made into a padded batch."""

import hashlib
from collections.abc import Sequence

import numpy as np

from input_pipeline.vocabulary import PAD, Vocabulary

HostBatch = dict[str, np.ndarray]  # every array [B, ...]


class Ragged:
    """Sequences of ids of any lengths, kept as one flat array."""

    def __init__(self, sequences: Sequence[np.ndarray]) -> None:
        """`sequences`: N times int32[T], each of its own T."""
        self.lengths = np.array([ids.size for ids in sequences], np.int32)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self.ids = np.concatenate(sequences)

    def __getitem__(self, index: int) -> np.ndarray:
        """One sequence, int32[T]."""
        return self.ids[self._starts[index] :][: self.lengths[index]]

    def padded(self, rows: np.ndarray, width: int) -> np.ndarray:
        """The sequences `rows` (int64[B]) as int32[B, width]."""
        positions = np.arange(width)
        flat = np.minimum(self._starts[rows, None] + positions, self.ids.size - 1)
        return np.where(positions < self.lengths[rows, None], self.ids[flat], np.int32(PAD))


def fingerprint(*arrays: np.ndarray) -> str:
    """Hex SHA-256 of whole numbers as int32, array after array."""
    return hashlib.sha256(b''.join(a.astype('<i4').tobytes() for a in arrays)).hexdigest()


class LabelledTexts:
    """A split of labelled texts, encoded once.

    Shapes: N examples, B rows of a batch, T padded width, A affixes (starts and ends of words).
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: np.ndarray,
        vocabulary: Vocabulary,
        max_length: int,
        affixes: Sequence[Vocabulary] = (),
    ) -> None:
        """`labels`: int32[N]. Texts longer than `max_length` ids are cut off."""
        self._texts, *self._affixes = (
            Ragged([part.encode(text, max_length) for text in texts])
            for part in (vocabulary, *affixes)
        )
        self._vocabulary = vocabulary
        self.labels = np.asarray(labels, np.int32)
        self.lengths = self._texts.lengths
        self.num_truncated = sum(len(text.split()) > max_length - 2 for text in texts)

    def __len__(self) -> int:
        """N."""
        return self.labels.size

    def batch(self, rows: np.ndarray, width: int) -> HostBatch:
        """token_ids int32[B, T], lengths and labels int32[B], weights float32[B] (ones).

        affix_ids int32[B, T, A] as well, if there are any.
        """
        affixes = [part.padded(rows, width) for part in self._affixes]
        return ({'affix_ids': np.stack(affixes, axis=-1)} if affixes else {}) | {
            'token_ids': self._texts.padded(rows, width),
            'lengths': self.lengths[rows],
            'labels': self.labels[rows],
            'weights': np.ones(len(rows), np.float32),
        }

    def text(self, row: int) -> str:
        """An example as the model sees it, with its label."""
        words = self._vocabulary.decode(self._texts[row][1:])
        return f'{words!r}, label {self.labels[row]}'

    def fingerprint(self) -> str:
        """Hex SHA-256 of all ids, lengths and labels."""
        affixes = [part.ids for part in self._affixes]
        return fingerprint(self._texts.ids, self.lengths, self.labels, *affixes)
