"""The promises of the review grammar: labels follow from meaning, and the set holds still."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from errors import UserError
from input_pipeline import reviews

TRAIN, EVAL = 10_000, 1_500
GOLDEN = 'dd4bb1f240cfe8e86da260c64f8ff4dabfe24f22468ed37ea54917e6df482c1b'


def _any(words: str) -> str:
    return f'(?:{"|".join(words.split())})'


# Told apart here by hand, so that a word filed under the wrong polarity is found.
GOOD = _any("""superb wonderful brilliant terrific absorbing charming gripping clever touching
likeable lively handsome elegant haunting lovely witty funny amusing brisk graceful""")
BAD = _any("""dreadful awful terrible dismal boring hollow dull muddled stale wooden bland ugly drab
grating monotonous lame crude witless sluggish clumsy""")
NOT = '(?:not|never|hardly|far from|anything but)'
IT_IS = '(?:the [a-z]+(?: [a-z]+)? (?:is|are)(?: (?:really|very|rather|truly|simply))?)'


@pytest.fixture(scope='module')
def splits() -> tuple[reviews.Split, reviews.Split]:
    """The data set in its default size."""
    return reviews.make_reviews(TRAIN, EVAL)


@pytest.fixture(scope='module')
def labelled() -> list[tuple[str, int]]:
    """Enough reviews, with their labels, that even rare turns of phrase occur."""
    (texts, labels), _ = reviews.make_reviews(80_000, 0, seed=1)
    return list(zip(texts, labels, strict=True))


def test_default_sizes_are_delivered(splits: tuple[reviews.Split, reviews.Split]) -> None:
    """Each split has as many texts and labels as asked for."""
    assert [[len(column) for column in split] for split in splits] == [[TRAIN] * 2, [EVAL] * 2]


def test_same_seed_gives_the_same_sentences(splits: tuple[reviews.Split, reviews.Split]) -> None:
    """The default reviews and labels are these very ones, on every machine and Python version."""
    lines = [f'{y} {x}' for texts, labels in splits for x, y in zip(texts, labels, strict=True)]
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == GOLDEN


def test_another_seed_gives_other_sentences() -> None:
    """The seed matters."""
    assert reviews.make_reviews(50, 50, seed=0) != reviews.make_reviews(50, 50, seed=1)


def test_train_and_eval_share_no_sentence(splits: tuple[reviews.Split, reviews.Split]) -> None:
    """No sentence occurs twice, in one split or across both."""
    texts = splits[0][0] + splits[1][0]
    assert len(set(texts)) == len(texts)


def test_eval_stays_the_same_when_train_grows() -> None:
    """A larger training split is measured on the same evaluation reviews."""
    assert reviews.make_reviews(10, 200)[1] == reviews.make_reviews(400, 200)[1]


@pytest.mark.parametrize('size', [100, 999])
def test_classes_are_balanced(size: int) -> None:
    """Half of each split is positive, an odd review out being negative; the order is mixed."""
    for _, labels in reviews.make_reviews(size, size):
        assert sum(labels) == size // 2
        assert 0.4 < np.mean(np.diff(labels) != 0) < 0.6


@pytest.mark.parametrize(
    ('pattern', 'label'),
    [
        (f'{IT_IS} {GOOD}', 1),
        (f'{IT_IS} {BAD}', 0),
        (f'{IT_IS} {NOT} {GOOD}', 0),
        (f'{IT_IS} {NOT} {BAD}', 1),
        (f'{IT_IS} (?:nothing short of|never less than) {GOOD}', 1),
        ('the [a-z]+ never (?:bores|irritates)', 1),
        ('neither the [a-z]+ nor the [a-z]+ (?:shines|delights)', 0),
        ('it is hard to (?:love|admire) [a-z ]+', 0),
        ('it is hard not to (?:love|admire) [a-z ]+', 1),
        (f'no one could call the [a-z]+ {BAD}', 1),
        (f'no one could say that {IT_IS} {BAD}', 1),
        (f'it is (?:not true|wrong to say) that {IT_IS} {NOT} {BAD}', 0),
        (f'no one will deny that {IT_IS} {GOOD}', 1),
        (f'what an? {BAD} [a-z]+(?: about a [a-z]+)?', 0),
        (f'not an? {BAD} [a-z]+(?: about a [a-z]+)?', 1),
    ],
)
def test_negation_turns_its_clause(
    labelled: list[tuple[str, int]], pattern: str, label: int
) -> None:
    """A negation turns the opinion, two negations leave it, what only looks like one does too."""
    _assert_label(labelled, pattern, label)


@pytest.mark.parametrize(
    ('pattern', 'label'),
    [
        (f'{IT_IS} {GOOD} , (?:but|yet) {IT_IS} {BAD}', 0),
        (f'{IT_IS} {BAD} [.] even so , {IT_IS} {GOOD}', 1),
        (f'{IT_IS} {NOT} {BAD} , (?:but|yet) {IT_IS} {BAD}', 0),
        (f'{IT_IS} {BAD} , (?:but|yet) {IT_IS} {NOT} {BAD}', 1),
        (f'(?:although|though) {IT_IS} {GOOD} , {IT_IS} {BAD}', 0),
        (f'{IT_IS} {GOOD} , (?:although|though|even if) {IT_IS} {BAD}', 1),
        (f'despite (?:the|its) {BAD} [a-z ]+ , {IT_IS} {GOOD}', 1),
        (f'{IT_IS} {GOOD} , despite (?:the|its) {BAD} [a-z ]+', 1),
        (f'(?:critics called it|i expected) an? {GOOD} [a-z]+ , (?:yet|but) {IT_IS} {BAD}', 0),
        (f'my friends (?:hated|detested) it , yet {IT_IS} {GOOD}', 1),
    ],
)
def test_the_winning_clause_decides(
    labelled: list[tuple[str, int]], pattern: str, label: int
) -> None:
    """'X but Y' means Y, 'although X, Y' means Y, and praise that the speaker disowns is none."""
    _assert_label(labelled, pattern, label)


@pytest.mark.parametrize('opinion', [GOOD, BAD])
@pytest.mark.parametrize(
    ('verdict', 'label'),
    [('(?:is better than|outclasses)', 1), ('(?:is worse than|is no match for)', 0)],
)
def test_what_a_film_is_compared_with_does_not_decide(
    labelled: list[tuple[str, int]], verdict: str, label: int, opinion: str
) -> None:
    """Better than the dreadful original is as positive as better than the superb one."""
    _assert_label(labelled, f'(?:this|the) [a-z]+ {verdict} the {opinion} [a-z ]+', label)


def test_facts_beside_the_point_go_with_either_label(labelled: list[tuple[str, int]]) -> None:
    """A 'not' or 'no one' in a neutral fact is no opinion."""
    for fact in (
        'it is not a western . ',
        'it was never shown in oslo ',
        'no one in it is a nurse ',
    ):
        labels = [label for text, label in labelled if fact in text]
        assert len(labels) > 50
        assert 0.35 < np.mean(labels) < 0.65


def _assert_label(labelled: list[tuple[str, int]], pattern: str, label: int) -> None:
    found = [(text, y) for text, y in labelled if re.fullmatch(pattern + ' [.!]', text)]
    assert len(found) >= 3, f'only {len(found)} reviews match'
    assert [text for text, y in found if y != label] == []


def test_sentences_read_as_english(labelled: list[tuple[str, int]]) -> None:
    """No empty slot, doubled word or wrong article, and verbs agree with their nouns."""
    slips = r'[^a-z .,!]|  |\b(\w+) (?:and )?\1\b|\ba [aeiou]|\ban [^aeiou]|\w[.,!]|[^.!]$'
    assert [text for text, _ in labelled if re.search(slips, text)] == []
    nouns = [noun for topic in reviews.ASPECTS for noun in reviews.RULES[topic]]
    plural, singular = (
        '|'.join(noun for noun in nouns if (noun[-1] == 's') == ends_in_s)
        for ends_in_s in (True, False)
    )
    wrong = f'(?:{plural}) (?:is|does|shines|bores)|(?:{singular}) (?:are|do|shine|bore)'
    found = [text for text, _ in labelled if re.search(f'the (?:{wrong}) ', text)]
    assert [text for text in found if 'both the ' not in text] == []


def test_lengths_vary_within_the_limit(splits: tuple[reviews.Split, reviews.Split]) -> None:
    """Reviews run from three words to forty, counting punctuation."""
    lengths = [len(text.split()) for texts, _ in splits for text in texts]
    assert (min(lengths), max(lengths)) == (3, reviews.MAX_WORDS)
    assert np.std(lengths) > 5


def test_every_word_is_met_often_enough_to_be_learned(
    splits: tuple[reviews.Split, reviews.Split],
) -> None:
    """The vocabulary is small, no word in it is rare, and evaluation brings no new one."""
    (train, _), (evaluation, _) = splits
    counts = Counter(word for text in train for word in text.split())
    assert 300 <= len(counts) <= 700
    assert min(counts.values()) >= 5
    assert {word for text in evaluation for word in text.split()} <= counts.keys()


def test_unigram_logistic_regression_stays_under_85_percent(
    splits: tuple[reviews.Split, reviews.Split],
) -> None:
    """Words without their order help, as in real reviews, but do not solve the task."""
    (train, train_labels), (evaluation, eval_labels) = splits
    vocabulary = {word: i for i, word in enumerate(sorted({w for t in train for w in t.split()}))}
    weights = _logistic_regression(_counts(train, vocabulary), np.array(train_labels))
    accuracy = np.mean((_counts(evaluation, vocabulary) @ weights > 0) == np.array(eval_labels))
    assert 0.6 < accuracy < 0.85


def _counts(texts: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    counts = np.zeros((len(texts), len(vocabulary) + 1))
    counts[:, -1] = 1  # The bias.
    for row, text in zip(counts, texts, strict=True):
        for word in text.split():
            row[vocabulary[word]] += 1
    return counts


def _logistic_regression(
    features: np.ndarray, labels: np.ndarray, decay: float = 1.0
) -> np.ndarray:
    """Newton's method: a few steps reach the optimum, so no learning rate matters."""
    weights = np.zeros(features.shape[1])
    for _ in range(8):
        chance = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (chance - labels) + decay * weights
        curvature = (features.T * (chance * (1 - chance))) @ features
        weights -= np.linalg.solve(curvature + decay * np.eye(len(weights)), gradient)
    assert np.abs(gradient).max() < 1e-3, 'not converged'
    return weights


@pytest.mark.parametrize('sizes', [(reviews.MAX_REVIEWS, 1), (10**12, 0)])
def test_asking_for_too_many_sentences_is_refused(sizes: tuple[int, int]) -> None:
    """A size that is too large ends in one clear line, before any work."""
    with pytest.raises(UserError, match=r'num_eval = \d+: expected at most 200000') as refusal:
        reviews.make_reviews(*sizes)
    assert '\n' not in str(refusal.value)


def test_an_exhausted_grammar_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """When every draw repeats a review, generation ends instead of running for ever."""
    monkeypatch.setattr(
        reviews._Writer, 'review', lambda _, positive: reviews.Clause('dull .', positive)
    )
    with pytest.raises(UserError, match='no new review left after 1'):
        reviews.make_reviews(2, 0)
