"""Holds pairs of texts as ids, and makes padded batches of any of them."""

from collections.abc import Sequence

import numpy as np

from arrays import HostBatch
from errors import UserError
from input_pipeline.encoded import Ragged, digest, unknown_share
from input_pipeline.examples import brief
from input_pipeline.vocabulary import Vocabulary

Pairs = Sequence[tuple[str, ...]]  # N times (source, target)


class EncodedPairs:
    """Holds a split of pairs, encoded once. Sequences end with EOS and do not begin with BOS.

    Both sides of a batch have one width, the bucket of the longest side of any of its pairs.
    Shapes: N examples, B rows of a batch, T padded width.
    """

    def __init__(
        self, pairs: Pairs, source: Vocabulary, target: Vocabulary, max_length: int, cut: bool
    ) -> None:
        """Encodes the pairs. Sides longer than `max_length` ids are cut, or else refused."""
        sources = [source.ids(text) for text, _ in pairs]
        targets = [target.ids(text) for _, text in pairs]
        self.num_truncated = num_too_long(pairs, sources, targets, max_length, cut)
        self._pairs = pairs
        self._sources, self._targets = (
            Ragged([target.marked(ids, max_length, start=False) for ids in side])
            for side in (sources, targets)
        )
        self.lengths = np.maximum(self._sources.lengths, self._targets.lengths)
        self.unknown = unknown_share(sources + targets, target.unk)

    def __len__(self) -> int:
        return self.lengths.size

    def batch(self, rows: np.ndarray, width: int) -> HostBatch:
        """Returns sources and targets int32[B, T], lengths int32[B], weights float32[B] of ones."""
        return {
            'sources': self._sources.padded(rows, width),
            'source_lengths': self._sources.lengths[rows],
            'targets': self._targets.padded(rows, width),
            'target_lengths': self._targets.lengths[rows],
            'weights': np.ones(len(rows), np.float32),
        }

    def text(self, row: int) -> str:
        """Returns a pair as it is written."""
        return ' -> '.join(map(repr, self._pairs[row]))

    def fingerprint(self) -> str:
        """Returns the SHA-256, in hex, of all ids and lengths."""
        return digest(
            self._sources.ids, self._sources.lengths, self._targets.ids, self._targets.lengths
        )


def num_too_long(
    pairs: Pairs, sources: list[list[int]], targets: list[list[int]], max_length: int, cut: bool
) -> int:
    """Counts the pairs with a side that does not fit. Raises UserError for one, unless `cut`."""
    widths = [1 + max(len(a), len(b)) for a, b in zip(sources, targets, strict=True)]
    count = sum(width > max_length for width in widths)
    if count and not cut:
        worst = int(np.argmax(widths))
        raise UserError(
            f'config.data.bucket_lengths: {count} of {len(widths)} pairs are longer than '
            f'{max_length}, and {" -> ".join(map(brief.repr, pairs[worst]))} needs '
            f"{widths[worst]}; add a wider bucket, or set config.data.too_long = 'cut'"
        )
    return count


def encode_sources(
    texts: Sequence[str],
    vocabulary: Vocabulary,
    max_length: int,
    allow_unknown: bool = False,
    cut: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts to predict from: sources int32[B, max_length], source_lengths int32[B].

    Raises UserError for a text that is empty, for one that is too long, unless `cut`, and for one
    with a unit that is not in the vocabulary, unless `allow_unknown`.
    """
    rows = []
    for number, text in enumerate(texts, start=1):
        where = f'text {number}, {brief.repr(text)}'
        if not text.strip():
            raise UserError(f'{where}: expected some text')
        tokens = vocabulary.tokens(text)
        unknown = [piece for index, piece in tokens if index == vocabulary.unk]
        if unknown and not allow_unknown:
            raise UserError(
                f'{where}: {brief.repr(unknown[0])} is not in the vocabulary of the run'
            )
        if (width := 1 + len(tokens)) > max_length and not cut:
            raise UserError(f'{where}: needs a width of {width}, expected at most {max_length}')
        ids = [index for index, _ in tokens]
        rows.append(vocabulary.marked(ids, max_length, start=False))
    sequences = Ragged(rows)
    return sequences.padded(np.arange(len(texts)), max_length), sequences.lengths
