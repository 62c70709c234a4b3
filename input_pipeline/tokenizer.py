"""Makes the tokenizer that `data.tokenizer` asks for."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from configs.schema import option
from errors import UserError
from input_pipeline.library_tokenizer import SEPARATOR, LibraryTokenizer
from input_pipeline.vocabulary import BOS, EOS, SPECIALS, UNITS, UNK, Vocabulary

NAMES = (*UNITS, 'basic', 'wordpiece', 'bpe')
# No accent is stripped: in Hindi or Thai they are vowels.
BASIC = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.BertNormalizer(strip_accents=False, handle_chinese_chars=False),
    ]
)
# Emoji, and letters of scripts without spaces, with the marks on them.
APART = Regex(r'[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{So}]\p{M}*')


def tokenizer_option(default: str, note: str = '') -> Any:
    """Declares data.tokenizer."""
    expected = f'one of {", ".join(NAMES)}, or the path of a tokenizer.json'
    meaning = (
        'what becomes an id: words (between white space), characters, basic (words and punctuation '
        'in lower case), wordpiece, bpe (parts of words, learned), or the path of a tokenizer.json'
    )
    known = (*NAMES, default)
    check = (lambda value: value in known or value.endswith('.json'), expected)
    return option(default, meaning + note, check)


def make_vocabulary(
    kind: str, texts: Sequence[str], min_frequency: int, vocab_size: int
) -> Vocabulary:
    """Makes what `data.tokenizer = kind` asks for, trained on the texts of the training split.

    Raises UserError for a file that cannot be used.
    """
    if kind in UNITS:
        return Vocabulary.of(texts, min_frequency, UNITS[kind])
    try:
        if kind not in NAMES:
            return LibraryTokenizer(epath.Path(kind).expanduser().read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'config.data.tokenizer = {kind!r}: cannot be used ({reason})') from error
    parts = [part for text in texts for part in text.split(SEPARATOR)]
    return LibraryTokenizer(trained(kind, parts, min_frequency, vocab_size))


def trained(kind: str, texts: Sequence[str], min_frequency: int, vocab_size: int) -> str:
    """Trains a tokenizer. Returns the library's JSON: the same texts give the same JSON.

    `basic` has words and punctuation in lower case, `wordpiece` their parts. `bpe` has parts of
    words as they are written and knows every byte, so nothing is unknown to it.
    """
    specials, unknown = list(SPECIALS), SPECIALS[UNK]
    options: dict[str, Any] = {'min_frequency': min_frequency, 'show_progress': False}
    trainer: trainers.Trainer
    if kind == 'bpe':
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        options |= {'initial_alphabet': pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, **options)
    elif kind == 'basic':
        tokenizer = by_words(models.WordLevel({}, unknown))
        trainer = trainers.WordLevelTrainer(vocab_size=2**31, special_tokens=specials, **options)
    else:
        tokenizer = by_words(models.WordPiece(unk_token=unknown))
        # The library numbers the letters within words in the order of a hash table. It differs from
        # process to process and decides ties. Letters that are given as specials keep their order.
        letters = {letter for text in texts for letter in BASIC.normalize_str(text)}
        inner = [f'##{letter}' for letter in sorted(letters) if not letter.isspace()]
        specials += inner
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=specials, **options
        )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == 'wordpiece':
        tokenizer = by_words(models.WordPiece(tokenizer.get_vocab(), unk_token=unknown))
        tokenizer.add_special_tokens(list(SPECIALS))
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = TemplateProcessing(
        single=f'{SPECIALS[BOS]} $A {SPECIALS[EOS]}',
        special_tokens=[(SPECIALS[BOS], BOS), (SPECIALS[EOS], EOS)],
    )
    return str(tokenizer.to_str())


def by_words(model: models.Model) -> Tokenizer:
    """Returns a tokenizer that gives a model words and punctuation in lower case."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BASIC
    split = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(APART, 'isolated')]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return tokenizer
