"""Examples as arrays, any of which can be made into a padded batch."""

import hashlib
from collections.abc import Sequence

import numpy as np

from input_pipeline.vocabulary import PAD, Vocabulary

HostBatch = dict[str, np.ndarray]


class LabelledTexts:
    """A split of labelled texts, encoded once and kept as one flat array.

    Shapes: N examples, B rows of a batch, T padded width.
    """

    def __init__(
        self, texts: Sequence[str], labels: np.ndarray, vocabulary: Vocabulary, max_length: int
    ) -> None:
        """`labels`: int32[N]. Texts longer than `max_length` ids are cut off."""
        encoded = [vocabulary.encode(text, max_length) for text in texts]
        self.labels = np.asarray(labels, np.int32)
        self.lengths = np.array([ids.size for ids in encoded], np.int32)
        self.num_truncated = sum(len(text.split()) > max_length - 2 for text in texts)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._ids = np.concatenate(encoded)

    def __len__(self) -> int:
        """N."""
        return self.labels.size

    def batch(self, rows: np.ndarray, width: int) -> HostBatch:
        """token_ids int32[B, T], lengths and labels int32[B], weights float32[B] (ones)."""
        lengths = self.lengths[rows]
        positions = np.arange(width)
        flat = np.minimum(self._starts[rows, None] + positions, self._ids.size - 1)
        return {
            'token_ids': np.where(positions < lengths[:, None], self._ids[flat], np.int32(PAD)),
            'lengths': lengths,
            'labels': self.labels[rows],
            'weights': np.ones(len(rows), np.float32),
        }

    def fingerprint(self) -> str:
        """Hex SHA-256 of all ids, lengths and labels."""
        arrays = (self._ids, self.lengths, self.labels)
        return hashlib.sha256(b''.join(a.astype('<i4').tobytes() for a in arrays)).hexdigest()
