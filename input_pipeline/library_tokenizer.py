"""Encodes with a tokenizer of the `tokenizers` library. An exported model takes this file along."""

import itertools
from collections.abc import Iterable
from typing import Any

from input_pipeline.vocabulary import UNITS, Vocabulary

SEPARATOR = ' [sep] '  # between two text features


class LibraryTokenizer(Vocabulary):
    """Encodes as the library's JSON says, and keeps its ids."""

    def __init__(self, json: str) -> None:
        """Reads the JSON. Raises ValueError if the models here cannot use it."""
        from tokenizers import Tokenizer  # not needed where words are encoded

        try:
            tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f'not the JSON of a tokenizer ({error})') from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # '<eos>' written in a text is no end mark
        by_id = {index: name for name, index in tokenizer.get_vocab().items()}
        self.names = tuple(by_id.get(index, '') for index in range(max(by_id, default=0) + 1))
        marks = tokenizer.encode('').ids
        unknown = [self.names.index(name) for name in ('<unk>', '[UNK]') if name in by_id.values()]
        if len(marks) != 2 or not unknown:
            raise ValueError('no unknown token, or no two marks around a text')
        (self.bos, self.eos), (self.unk, *_) = marks, unknown
        self.first_word = max(self.unk, self.bos, self.eos) + 1
        self.words = self.names[self.first_word :]
        self.units = lambda text: [piece.lower() for _, piece in self.tokens(text, repeat=True)]
        self._tokenizer, self._json = tokenizer, json

    def tokens(self, text: str, repeat: bool = False) -> list[tuple[int, str]]:
        """Returns ids and parts of the text, with an end mark between two features, as in BERT.

        Of the tokens that make up one character, only the first shows it, unless `repeat`.
        """
        found: list[tuple[int, str]] = []
        for part in text.split(SEPARATOR):
            encoding = self._tokenizer.encode(part, add_special_tokens=False)
            ends = [0, *(stop for _, stop in encoding.offsets)]
            written = [
                part[start if repeat else max(start, end) : stop].strip()
                for (start, stop), end in zip(encoding.offsets, ends, strict=False)
            ]
            found += [(self.eos, SEPARATOR.strip()), *zip(encoding.ids, written, strict=True)]
        return found[1:]

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text, without marks."""
        return [index for index, _ in self.tokens(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to EOS; other marks by their names."""
        until_end = itertools.takewhile(lambda index: index != self.eos, map(int, ids))
        return str(self._tokenizer.decode(list(until_end), skip_special_tokens=False))

    def facts(self, prefix: str = '') -> dict[str, object]:
        """Returns the JSON that `restored` makes the tokenizer from."""
        return {f'{prefix}tokenizer': self._json}


def restored(facts: dict[str, Any], kind: str, prefix: str = '') -> Vocabulary:
    """Makes a vocabulary again, from its facts and the data.tokenizer of the run."""
    if f'{prefix}tokenizer' in facts:
        return LibraryTokenizer(facts[f'{prefix}tokenizer'])
    return Vocabulary(facts[f'{prefix}vocabulary'], UNITS.get(kind, str.split))
