"""Pairs of texts as arrays, any of which can be made into a padded batch."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from errors import UserError
from input_pipeline.encoded import HostBatch, Ragged, fingerprint
from input_pipeline.examples import brief
from input_pipeline.vocabulary import Vocabulary, units


class PairSplit(NamedTuple):
    """One split, read whole: N sources and N targets, in the source's order."""

    sources: list[str]
    targets: list[str]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, ...]]) -> 'PairSplit':
        """Makes a split from (source, target) one by one."""
        sources, targets = zip(*pairs, strict=True)
        return cls(list(sources), list(targets))


class PairDataset(NamedTuple):
    """A training split and an evaluation split of pairs."""

    train: PairSplit
    evaluation: PairSplit


class EncodedPairs:
    """A split of pairs, encoded once. Every sequence ends with EOS, and none begins with BOS.

    Both sides of a batch have one width, the bucket of the longest side of any of its pairs.
    Shapes: N examples, B rows of a batch, T padded width.
    """

    def __init__(
        self, split: PairSplit, source: Vocabulary, target: Vocabulary, max_length: int, cut: bool
    ) -> None:
        """Sides of more than `max_length` ids are cut off if `cut`, else refused with UserError."""
        self.num_truncated = num_too_long(split, source, target, max_length, cut)
        self._source, self._target = source, target
        self._sources = Ragged([source.encode_open(text, max_length) for text in split.sources])
        self._targets = Ragged([target.encode_open(text, max_length) for text in split.targets])
        self.lengths = np.maximum(self._sources.lengths, self._targets.lengths)

    def __len__(self) -> int:
        """N."""
        return self.lengths.size

    def batch(self, rows: np.ndarray, width: int) -> HostBatch:
        """sources, targets int32[B, T], their lengths int32[B], weights float32[B] (ones)."""
        return {
            'sources': self._sources.padded(rows, width),
            'source_lengths': self._sources.lengths[rows],
            'targets': self._targets.padded(rows, width),
            'target_lengths': self._targets.lengths[rows],
            'weights': np.ones(len(rows), np.float32),
        }

    def text(self, row: int) -> str:
        """A pair as the model sees it."""
        source, target = self._sources[row], self._targets[row]
        return f'{self._source.decode(source)!r} -> {self._target.decode(target)!r}'

    def fingerprint(self) -> str:
        """Hex SHA-256 of all ids and lengths."""
        return fingerprint(
            self._sources.ids, self._sources.lengths, self._targets.ids, self._targets.lengths
        )


def num_too_long(
    split: PairSplit, source: Vocabulary, target: Vocabulary, max_length: int, cut: bool
) -> int:
    """How many pairs have a side that does not fit. Raises UserError if any has, unless `cut`."""
    widths = np.array(
        [
            1 + max(len(units(a, source.unit)), len(units(b, target.unit)))
            for a, b in zip(*split, strict=True)
        ]
    )
    count = int(np.sum(widths > max_length))
    if count and not cut:
        worst = int(np.argmax(widths))
        raise UserError(
            f'config.data.bucket_lengths: {count} of {len(widths)} pairs are longer than '
            f'{max_length}, and {brief.repr(split.sources[worst])} -> '
            f'{brief.repr(split.targets[worst])} needs {widths[worst]}; add a wider bucket, or '
            "set config.data.too_long = 'cut'"
        )
    return count


def encode_sources(
    texts: Sequence[str], vocabulary: Vocabulary, max_length: int, allow_unknown: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Texts to predict from -> sources int32[B, max_length], source_lengths int32[B].

    Raises UserError for a text that is empty, too long or, unless `allow_unknown`, has a unit that
    is not in the vocabulary.
    """
    for number, text in enumerate(texts, start=1):
        where = f'text {number}, {brief.repr(text)}'
        if not text.strip():
            raise UserError(f'{where}: expected some text')
        if not allow_unknown and (unknown := vocabulary.unknown(text)):
            raise UserError(
                f'{where}: {brief.repr(unknown[0])} is not in the vocabulary of the run'
            )
        if (width := 1 + len(units(text, vocabulary.unit))) > max_length:
            raise UserError(f'{where}: needs a width of {width}, expected at most {max_length}')
    sequences = Ragged([vocabulary.encode_open(text, max_length) for text in texts])
    return sequences.padded(np.arange(len(texts)), max_length), sequences.lengths
