"""Stores encoded examples, and pads any of them into a batch."""

import array
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from arrays import HostBatch
from input_pipeline.vocabulary import PAD, Vocabulary


class Ragged:
    """Holds sequences of ids of any lengths in one flat array."""

    def __init__(self, sequences: Iterable[list[int]]) -> None:
        """Consumes N sequences one by one, without holding a list of them."""
        ids, lengths = array.array('i'), array.array('i')
        for sequence in sequences:
            ids.fromlist(sequence)
            lengths.append(len(sequence))
        self.ids, self.lengths = (np.frombuffer(part, np.int32) for part in (ids, lengths))
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def padded(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Returns the sequences `rows` (int64[B]), padded: int32[B, width]."""
        positions = np.arange(width)
        flat = np.minimum(self._starts[rows, None] + positions, self.ids.size - 1)
        return np.where(positions < self.lengths[rows, None], self.ids[flat], np.int32(PAD))


def unknown_share(texts: Sequence[list[int]], unk: int) -> float:
    """Returns the share of ids, given without marks, that are the unknown token `unk`."""
    return sum(ids.count(unk) for ids in texts) / max(1, sum(map(len, texts)))


def digest(*arrays: np.ndarray) -> str:
    """Returns the hex SHA-256 of integer arrays, concatenated as int32."""
    sha = hashlib.sha256()
    for part in arrays:
        sha.update(np.ascontiguousarray(part, '<i4').data)
    return sha.hexdigest()


class LabelledTexts:
    """Holds a split of labelled texts, encoded once.

    Shapes: N examples, B rows of a batch, T padded width, A affixes (starts and ends of words).
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: np.ndarray,
        vocabulary: Vocabulary,
        max_length: int,
        affixes: Sequence[Vocabulary] = (),
        weights: np.ndarray | None = None,
    ) -> None:
        """Encodes the texts, and cuts those longer than `max_length` ids.

        labels: int32[N], or int32[N, C] of 0 and 1. weights: [N] in the loss, 1 by default.
        """
        tokens = unknown = self.num_truncated = 0

        def encoded(part: Vocabulary) -> Iterator[list[int]]:
            nonlocal tokens, unknown
            for text in texts:
                ids = part.ids(text)
                if part is vocabulary:
                    tokens, unknown = tokens + len(ids), unknown + ids.count(vocabulary.unk)
                    self.num_truncated += len(ids) > max_length - 2
                yield vocabulary.marked(ids, max_length)

        self._ids, *self._affixes = (Ragged(encoded(part)) for part in (vocabulary, *affixes))
        self.unknown = unknown / max(1, tokens)
        self._texts = texts
        self.labels = np.asarray(labels, np.int32)
        self._weights = np.full(len(texts), 1 if weights is None else weights, np.float32)
        self.lengths = self._ids.lengths

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, width: int) -> HostBatch:
        """Returns token_ids int32[B, T], lengths int32[B], labels, weights float32[B].

        With affixes, also affix_ids int32[B, T, A].
        """
        affixes = [part.padded(rows, width) for part in self._affixes]
        return ({'affix_ids': np.stack(affixes, axis=-1)} if affixes else {}) | {
            'token_ids': self._ids.padded(rows, width),
            'lengths': self.lengths[rows],
            'labels': self.labels[rows],
            'weights': self._weights[rows],
        }

    def text(self, row: int) -> str:
        """Returns an example's original text."""
        return self._texts[row]

    def fingerprint(self) -> str:
        """Returns the SHA-256, in hex, of all ids, lengths and labels."""
        affixes = [part.ids for part in self._affixes]
        return digest(self._ids.ids, self.lengths, self.labels, *affixes)
