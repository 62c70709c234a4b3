"""The promises of the vocabulary, of encoded texts and of batches."""

from collections.abc import Callable

import numpy as np
import pytest

from configs.schema import Config
from input_pipeline.batches import (
    batch_order,
    bucket,
    eval_batches,
    padding_share,
    train_batches,
)
from input_pipeline.encoded import LabelledTexts
from input_pipeline.vocabulary import BOS, EOS, FIRST_WORD, PAD, SPECIALS, UNK, Vocabulary
from tasks.classification import DataConfig, ModelConfig

Texts = Callable[..., LabelledTexts]
BUCKETS = (6, 9, 14)


def epoch_seed(epoch: int) -> np.ndarray:
    """Words as any key could give them."""
    return np.array([7, epoch], np.uint32)


def encoded(*texts: str, max_length: int = 8) -> LabelledTexts:
    """Texts labelled 0, 1, 2, ... and encoded with the vocabulary a, b, c."""
    return LabelledTexts(texts, np.arange(len(texts)), Vocabulary('abc'), max_length)


def test_vocabulary_holds_frequent_words_in_a_fixed_order() -> None:
    texts = ['b b b a', 'a c d', 'a\tc  é é']
    assert Vocabulary.of(texts, 2).words == ('a', 'b', 'c', 'é')
    assert Vocabulary.of(reversed(texts), 2).words == ('a', 'b', 'c', 'é')
    assert Vocabulary.of(texts, 3).words == ('a', 'b')
    assert len(Vocabulary.of(texts, 3)) == FIRST_WORD + 2
    ends = ['made', 'fade', 'mad', 'den']  # a part counts in every word that has it
    assert Vocabulary.of(ends, 2, letters=slice(-2, None)).words == ('de',)
    assert Vocabulary.of(ends, 2, letters=slice(3)).words == ('mad',)


def test_words_are_encoded_between_marks_and_rare_ones_as_unknown() -> None:
    vocabulary = Vocabulary(['a', 'b'])
    ids = vocabulary.marked(vocabulary.ids('b x  a'), 9)
    assert ids == [BOS, FIRST_WORD + 1, UNK, FIRST_WORD, EOS]


@pytest.mark.parametrize('special', SPECIALS)
def test_a_word_spelled_like_a_special_is_a_word(special: str) -> None:
    texts = [f'{special} {special} a', special]
    assert Vocabulary([]).ids(special) == [UNK]
    assert Vocabulary.of(texts, 2).ids(special) == [FIRST_WORD]


def test_vocabulary_file_has_the_line_of_every_id() -> None:
    vocabulary = Vocabulary(['b', 'a'])
    lines = vocabulary.file_text().splitlines()
    assert lines == [*SPECIALS, 'b', 'a']
    assert vocabulary.ids('a') == [lines.index('a')]


def test_a_truncated_text_keeps_both_marks() -> None:
    texts = encoded('a b c a b c', 'a b c', '', max_length=5)
    rows = texts.batch(np.arange(3), 5)['token_ids']
    a, b, c = FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2
    assert rows.tolist() == [[BOS, a, b, c, EOS]] * 2 + [[BOS, EOS, PAD, PAD, PAD]]
    assert texts.lengths.tolist() == [5, 5, 2]
    assert texts.num_truncated == 1


def test_unknown_words_and_cut_texts_are_counted_once_where_affixes_are_encoded_too() -> None:
    words, starts = Vocabulary(['ab', 'cd']), Vocabulary(['a', 'c'], letters=slice(1))
    split = LabelledTexts(['ab xx cd ab', 'cd'], np.zeros(2), words, 5, [starts])
    assert (split.unknown, split.num_truncated) == (1 / 5, 1)
    assert split.batch(np.arange(2), 5)['token_ids'].tolist() == [[2, 4, 1, 5, 3], [2, 5, 3, 0, 0]]


def test_a_batch_is_its_examples_padded(random_texts: Texts) -> None:
    texts = random_texts(40, 14)
    rows = np.array([39, 0, 7, 7])
    batch = texts.batch(rows, 16)
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        'token_ids': (np.int32, (4, 16)),
        'lengths': (np.int32, (4,)),
        'labels': (np.int32, (4,)),
        'weights': (np.float32, (4,)),
    }
    for index, row in enumerate(rows):
        alone = texts.batch(np.array([row]), int(texts.lengths[row]))
        length = batch['lengths'][index]
        assert batch['token_ids'][index, :length].tolist() == alone['token_ids'][0].tolist()
        assert (batch['token_ids'][index, length:] == PAD).all()
        assert (batch['token_ids'][index, :length] != PAD).all()
        assert batch['labels'][index] == texts.labels[row]


@pytest.mark.parametrize('count', [1, 8, 20, 24])
def test_evaluation_counts_every_example_once_at_one_width(random_texts: Texts, count: int) -> None:
    texts = random_texts(count, BUCKETS[-1])
    config = Config(eval_batch_size=8, data=DataConfig(bucket_lengths=BUCKETS), model=ModelConfig())
    batches = list(eval_batches(texts, config, slice(0, 8)))
    assert len(batches) == -(-count // 8)
    assert {batch['token_ids'].shape for batch in batches} == {(8, BUCKETS[-1])}
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert whole['weights'].dtype == np.float32
    assert whole['weights'].tolist() == [1.0] * count + [0.0] * (len(batches) * 8 - count)
    expected = texts.batch(np.arange(count), BUCKETS[-1])
    for name, values in expected.items():
        np.testing.assert_array_equal(whole[name][:count], values)


def test_evaluation_is_the_same_for_any_split_over_processes(random_texts: Texts) -> None:
    texts = random_texts(21, BUCKETS[-1])
    config = Config(eval_batch_size=8, data=DataConfig(bucket_lengths=BUCKETS), model=ModelConfig())
    whole = list(eval_batches(texts, config, slice(0, 8)))
    halves = zip(*(eval_batches(texts, config, slice(i, i + 4)) for i in (0, 4)), strict=True)
    for batch, (first, second) in zip(whole, halves, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), values)


def test_bucket_is_the_shortest_that_holds_the_length() -> None:
    assert [bucket(length, BUCKETS) for length in (2, 6, 7, 9, 10, 14)] == [6, 6, 9, 9, 14, 14]


def test_a_batch_has_the_bucket_of_its_longest_example(random_texts: Texts) -> None:
    texts = random_texts(60, BUCKETS[-1])
    data = DataConfig(bucket_lengths=BUCKETS, window_batches=4)
    config = Config(batch_size=8, num_steps=20, data=data, model=ModelConfig())
    batches = list(train_batches(texts, config, epoch_seed, slice(0, 8), 0))
    assert len(batches) == 20
    assert {batch['token_ids'].shape[1] for batch in batches} == set(BUCKETS)
    for batch in batches:
        assert batch['token_ids'].shape[1] == bucket(int(batch['lengths'].max()), BUCKETS)
    # A process whose own rows are short pads to the width of the others' longest row.
    mine = train_batches(texts, config, epoch_seed, slice(0, 2), 0)
    assert [b['token_ids'].shape[1] for b in mine] == [b['token_ids'].shape[1] for b in batches]


def test_sorting_in_windows_saves_padding(random_texts: Texts) -> None:
    lengths = random_texts(400, 40).lengths

    def padding(window_batches: int) -> int:
        order = batch_order(lengths, 8, window_batches, epoch_seed)
        rows = [lengths[order(step)] for step in range(48)]
        return sum(int(row.size * row.max() - row.sum()) for row in rows)

    assert padding(16) < padding(4) < padding(1)
    assert padding(16) < padding(1) / 4


def test_a_window_holds_the_examples_of_its_stretch_of_the_stream(random_texts: Texts) -> None:
    lengths = random_texts(30, 14).lengths
    stream = batch_order(lengths, 1, 1, epoch_seed)
    windows = batch_order(lengths, 4, 3, epoch_seed)
    for index in range(20):  # 12 does not divide 30: windows straddle epochs
        window = [row for i in range(3) for row in windows(3 * index + i)]
        assert sorted(window) == sorted(stream(12 * index + i)[0] for i in range(12))


def test_fingerprint_changes_with_one_label_or_one_token() -> None:
    texts = ('a b', 'c c a', 'b')
    labels = np.array([0, 1, 0])
    vocabulary = Vocabulary('abc')
    prints = {
        LabelledTexts(texts, labels, vocabulary, 8).fingerprint(),
        LabelledTexts(texts, np.array([0, 1, 1]), vocabulary, 8).fingerprint(),
        LabelledTexts(('a b', 'c b a', 'b'), labels, vocabulary, 8).fingerprint(),
        LabelledTexts(('a', 'b c c a', 'b'), labels, vocabulary, 8).fingerprint(),
        LabelledTexts(('c c a', 'a b', 'b'), labels, vocabulary, 8).fingerprint(),
        LabelledTexts(texts, labels, Vocabulary('acb'), 8).fingerprint(),
    }
    assert len(prints) == 6
    assert LabelledTexts(texts, labels, vocabulary, 8).fingerprint() in prints


def test_padding_share_is_that_of_the_batches(random_texts: Texts) -> None:
    data = DataConfig(bucket_lengths=BUCKETS, window_batches=5)
    config = Config(num_steps=5, batch_size=8, data=data, model=ModelConfig())
    texts = random_texts(40, 14)
    batches = list(train_batches(texts, config, epoch_seed, slice(0, 8), 0))
    ids = np.concatenate([batch['token_ids'].ravel() for batch in batches])
    assert len({batch['token_ids'].shape for batch in batches}) > 1
    assert padding_share(texts.lengths, config) == pytest.approx(np.mean(ids == PAD), rel=1e-12)
    many = padding_share(np.tile(texts.lengths, 1000), config)
    assert many == pytest.approx(np.mean(ids == PAD), abs=0.1)
