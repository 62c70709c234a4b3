"""Generates sentences that look like film reviews: a sentiment task that needs no download.

No person wrote them: input_pipeline/reviews.txt is their grammar, and a seed decides what is drawn
from it. The label is computed along with the text. A clause starts with an opinion word; each frame
around it keeps or flips its polarity ('no one could say that ...'); where two clauses disagree, the
frame says which one decides ('although ... , ...'). So words alone tell little: on 10,000 training
and 1,500 evaluation sentences of seed 0, a logistic regression scores 68.3% on word counts and
80.9% on counts of words and word pairs, and a bidirectional LSTM of 64 units passes 99.5% in its
fifth epoch. With other seeds word counts score 63 to 68%.

Grammar: rules `name: option | option` end with a semicolon. A slot {x} is filled with an option of
rule x, {+x} with one of the current polarity, where rule 'x-' blames and 'x+' praises, and {-x}
with one of the other polarity. A frame keeps the polarity of what is put into it, a 'flipped' frame
reverses it. Nouns that end in -s are plural.
"""

import random
import re
from pathlib import Path
from typing import NamedTuple

from errors import UserError

LABEL_NAMES = ('negative', 'positive')
MAX_REVIEWS = 200_000  # The grammar has more, but hardly any short ones remain by then.
MAX_WORDS = 40
MAX_TRIES = 100  # Consecutive draws without a new review that mean the grammar is exhausted.

Split = tuple[list[str], list[int]]


def read_rules(text: str) -> dict[str, list[str]]:
    """Returns the options of every rule of a grammar, by name."""
    rules = (' '.join(rule.split()).split(': ') for rule in text.split(';'))
    return {name: options.split(' | ') for name, options in rules}


RULES = read_rules(Path(__file__).with_suffix('.txt').read_text(encoding='utf-8'))
ASPECTS = ['story', 'acting', 'look', 'sound', 'humour', 'pace']


class Clause(NamedTuple):
    """Holds a piece of text and its polarity."""

    text: str
    positive: bool

    def within(self, frame: str, flips: bool = False) -> 'Clause':
        """Returns the clause placed at the {} of a frame, which may flip it."""
        return Clause(frame.replace('{}', self.text), self.positive != flips)


class _Writer:
    """Draws from the grammar by `random()` alone, whose stream is the same on every Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self._random() < probability

    def pick(self, options: list[str]) -> str:
        """Returns one of the options, all equally likely."""
        return options[int(self._random() * len(options))]

    def fill(self, rule: str, positive: bool, **bound: str) -> str:
        """Draws an option of a rule and fills its slots, except {}, from `bound` or by rule."""

        def slot(match: re.Match[str]) -> str:
            side, name = match.groups()
            if name in bound:
                return bound[name]
            polarity = positive != (side == '-')
            return self.fill(name + '-+'[polarity] if side else name, polarity, **bound)

        return re.sub(r'{([-+]?)([a-z ]+)}', slot, self.pick(RULES[rule]))

    def review(self, positive: bool) -> Clause:
        """Writes a fragment, or one or two statements that agree, and neutral facts."""
        if self.chance(0.07):
            review = self._clause(positive, 'film', 'fragment')
        else:
            aspects = sorted(ASPECTS, key=lambda _: self._random())
            review = self._statement(positive, aspects)
            if self.chance(0.15):
                second = self._statement(positive, aspects)
                review = second.within(f'{review.text} . {{}}')
            if self.chance(0.4):
                review = review.within(self.fill('aside', positive))
        review = review.within('{} !' if self.chance(0.1) else '{} .')
        return review._replace(text=re.sub(r'\ba (?=[aeiou])', 'an ', review.text))

    def _statement(self, positive: bool, aspects: list[str]) -> Clause:
        """Writes one verdict: a contrast, two clauses that agree, or a single clause."""
        topic = 'film' if self.chance(0.25) else aspects.pop()
        if self.chance(0.3):
            return self._contrast(positive, topic, aspects.pop())
        if self.chance(0.2):
            first = self._clause(positive, aspects.pop(), 'plain')
            return self._clause(positive, topic).within(f'{first.text} , and {{}}')
        write = self._reported if self.chance(0.2) else self._clause
        return write(positive, topic)

    def _contrast(self, positive: bool, topic: str, other: str) -> Clause:
        """Writes two clauses that disagree: the one on `topic` decides, the other is {lost}."""
        lost = self._clause(not positive, other).text
        slots = self._about(other, not positive)
        frame = self.fill('contrast', not positive, lost=lost, **slots)
        return self._clause(positive, topic).within(frame)

    def _reported(self, positive: bool, topic: str) -> Clause:
        """Writes a clause that people are said to affirm or to deny."""
        flips = self.chance(0.5)
        frame = self.pick(RULES['report flipped' if flips else 'report'])
        return self._clause(positive != flips, topic, 'plain').within(frame, flips)

    def _clause(self, positive: bool, topic: str, frames: str = '') -> Clause:
        """Writes one opinion; a frame that flips gets a word of the other polarity."""
        frames = frames or self.pick(['plain', 'framed', 'whole' if topic == 'film' else 'plain'])
        flips = self.chance(0.22)
        rule = f'{frames} flipped' if flips else frames
        word = positive != flips
        return Clause(self.fill(rule, word, **self._about(topic, word)), word).within('{}', flips)

    def _about(self, topic: str, positive: bool) -> dict[str, str]:
        """Binds what must agree within a clause: a noun, its number, and the verbs that follow."""
        sign = '-+'[positive]
        noun = self.pick(RULES[topic])
        plural = noun.endswith('s')
        shine, love = self.pick(RULES['shine' + sign]), self.pick(RULES['love' + sign])
        return {
            'noun': noun,
            'np': f'the {noun}',
            'is': 'are' if plural else 'is',
            'does': 'do' if plural else 'does',
            'shine': shine,
            'shines': shine if plural else f'{shine} '.replace(' ', 's ', 1).strip(),
            'love': love,
            'loved': love.removesuffix('e') + 'ed',
            'mild': self.pick(RULES[topic + sign]),
        }


def make_reviews(num_train: int, num_eval: int, seed: int = 0) -> tuple[Split, Split]:
    """Generates ((train texts, train labels), (eval texts, eval labels)) without duplicates.

    The evaluation sentences come first, so for one seed they are the same with any `num_train`.
    Raises UserError for sizes that the grammar cannot give.
    """
    if num_train + num_eval > MAX_REVIEWS:
        raise UserError(
            f'config.data.num_train + num_eval = {num_train + num_eval}: expected at most '
            f'{MAX_REVIEWS} reviews'
        )
    writer = _Writer(seed)
    seen: set[str] = set()
    evaluation = _split(writer, num_eval, seen)
    return _split(writer, num_train, seen), evaluation


def _split(writer: _Writer, size: int, seen: set[str]) -> Split:
    """Writes `size` new reviews, half of them positive, in random order."""
    texts: list[str] = []
    labels: list[int] = []
    positives = size // 2
    for left in range(size, 0, -1):
        # Drawing labels without replacement gives a random order and an exact balance.
        positive = writer.chance(positives / left)
        drawn = (writer.review(positive) for _ in range(MAX_TRIES))
        fresh = (new for new in drawn if new.text not in seen and new.text.count(' ') < MAX_WORDS)
        review = next(fresh, None)
        if review is None:
            raise UserError(f'config.data: the grammar has no new review left after {len(seen)}')
        seen.add(review.text)
        positives -= review.positive
        texts.append(review.text)
        labels.append(int(review.positive))
    return texts, labels
