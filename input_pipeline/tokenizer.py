"""Makes the tokenizer that `data.tokenizer` asks for."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from configs.checks import Check
from configs.schema import option
from errors import UserError
from input_pipeline.library_tokenizer import SEPARATOR, LibraryTokenizer
from input_pipeline.vocabulary import BOS, EOS, SPECIALS, UNITS, UNK, Vocabulary

MODELS: dict[str, Any] = {
    'basic': models.WordLevel,
    'wordpiece': models.WordPiece,
    'bpe': models.BPE,
}
NAMES = (*UNITS, *MODELS)
# BERT's normalizer and word boundaries, but accents stay: in Hindi or Thai they are vowels.
CLEAN = normalizers.BertNormalizer(strip_accents=False, handle_chinese_chars=False)
NORMAL = normalizers.Sequence([normalizers.NFKC(), CLEAN])
# Emoji, and letters of scripts without spaces, with the marks on them.
APART = Regex(r'[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{So}]\p{M}*')
WORDS = (pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(APART, 'isolated'))


def tokenizer_option(default: str, note: str = '') -> Any:
    """Declares data.tokenizer. docs/fork.md explains the names."""
    check = Check(
        lambda name: name in (*NAMES, default) or name.endswith('.json'),
        f'one of {", ".join(NAMES)}, or the path of a tokenizer.json',
    )
    return option(default, f'what becomes a token{note}', check, chosen=True)


def make_vocabulary(
    kind: str, texts: Sequence[str], min_frequency: int, vocab_size: int
) -> Vocabulary:
    """Makes what `data.tokenizer = kind` asks for, trained on the texts of the training split.

    Raises UserError for a file that cannot be used.
    """
    if kind in UNITS:
        return Vocabulary.of(texts, min_frequency, UNITS[kind])
    if kind in MODELS:
        parts = [part for text in texts for part in text.split(SEPARATOR)]
        return LibraryTokenizer(trained(kind, parts, min_frequency, vocab_size))
    try:
        return LibraryTokenizer(epath.Path(kind).expanduser().read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'config.data.tokenizer = {kind!r}: cannot be used ({reason})') from error


def trained(kind: str, texts: Sequence[str], min_frequency: int, vocab_size: int) -> str:
    """Trains a tokenizer. Returns the library's JSON: the same texts give the same JSON.

    `basic` has words and punctuation in lower case, `wordpiece` their parts. `bpe` has parts of
    words as they are written and knows every byte, so nothing is unknown to it.
    """
    specials, unknown = list(SPECIALS), SPECIALS[UNK]
    tokenizer = untrained(kind, MODELS[kind](unk_token=unknown))
    trainer = tokenizer.model.get_trainer()
    trainer.min_frequency, trainer.show_progress = min_frequency, False
    trainer.vocab_size = 2**31 if kind == 'basic' else vocab_size
    trainer.special_tokens = specials
    if kind == 'bpe':
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == 'wordpiece':
        # The library numbers the letters within words in the order of a hash table. It differs from
        # process to process and decides ties. Letters that are given as specials keep their order.
        letters = {letter for text in texts for letter in NORMAL.normalize_str(text)}
        inner = [f'##{letter}' for letter in sorted(letters) if not letter.isspace()]
        trainer.special_tokens = specials + inner
    tokenizer.train_from_iterator(texts, trainer)
    if kind == 'wordpiece':
        tokenizer = untrained(kind, models.WordPiece(tokenizer.get_vocab(), unk_token=unknown))
        tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = TemplateProcessing(
        '<bos> $A <eos>', special_tokens=[('<bos>', BOS), ('<eos>', EOS)]
    )
    return str(tokenizer.to_str())


def untrained(kind: str, model: models.Model) -> Tokenizer:
    """Returns a tokenizer that splits a text into what the model reads."""
    tokenizer = Tokenizer(model)
    if kind == 'bpe':
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = NORMAL
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(WORDS))
        tokenizer.decoder = decoders.WordPiece()
    return tokenizer
