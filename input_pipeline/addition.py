"""Sums to learn: 'a+b' and its digits, each pair made from its number alone.

The task of flax's seq2seq example (https://github.com/google/flax/tree/main/examples/seq2seq),
seeded and with a held-out split: no evaluation pair is in training, in neither order.
"""

from errors import UserError
from input_pipeline.pairs import Pairs

ROUNDS = 6  # of the Feistel network; four already make a good shuffle


def make_additions(
    digits: tuple[int, ...], num_train: int, num_eval: int, split_seed: int, longest: int
) -> tuple[Pairs, Pairs]:
    """Makes both splits: the first `num_train` pairs of the shuffled order, and those after them.

    Raises UserError when there are fewer pairs, or a pair needs more ids than `longest`.
    """
    small, large = digits
    everything = num_pairs(10**small, 10**large)
    wanted, needed = num_train + num_eval, small + large + 2
    if wanted > everything:
        raise UserError(
            f'config.data.num_train + num_eval = {wanted}: expected at most {everything}, which '
            f'is all pairs of {small} and {large} digits'
        )
    if needed > longest:
        raise UserError(
            f'config.data.bucket_lengths: the longest is {longest}, but operands of {small} and '
            f"{large} digits with '+' and the end mark need {needed}"
        )
    pairs = [pair(digits, number, split_seed) for number in range(wanted)]
    return pairs[:num_train], pairs[num_train:]


def pair(operand_digits: tuple[int, ...], number: int, split_seed: int) -> tuple[str, str]:
    """Returns the pair with this number in the shuffled order, such as ('7+15', '22')."""
    small, large = (10**digits for digits in operand_digits)
    first, second = operands(shuffled(number, num_pairs(small, large), split_seed), small, large)
    return f'{first}+{second}', str(first + second)


def num_pairs(small: int, large: int) -> int:
    """Counts the unordered pairs {a, b} with a < small, b < large and small <= large."""
    return small * large - small * (small - 1) // 2


def operands(index: int, small: int, large: int) -> tuple[int, int]:
    """Returns the unordered pair with an index below num_pairs, in one order or the other.

    Row a holds the pairs (a, b) with a <= b < large. Rows a and small - 1 - a, laid end to end,
    have the same length for every a, so the index folds out by one division; `small` is even.
    """
    a, b = divmod(index, 2 * large - small + 1)
    if b < large - a:
        b += a
    else:
        a, b = small - 1 - a, b - (large - a) + small - 1 - a
    return (b, a) if b < small and (a + b) % 2 else (a, b)


def shuffled(index: int, size: int, seed: int) -> int:
    """Permutes range(size) as the seed decides, without a table.

    A Feistel network permutes the next larger power of four; values beyond `size` are permuted
    on until one falls inside, which keeps it one to one.
    """
    half = (size.bit_length() + 1) // 2
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(ROUNDS):
            left, right = right, left ^ mixed(seed, turn, right) & ((1 << half) - 1)
        index = left << half | right
        if index < size:
            return index


def mixed(seed: int, turn: int, value: int) -> int:
    """Returns 64 bits that look random (the finaliser of splitmix64)."""
    word = (seed * ROUNDS + turn + 1) * 0x9E3779B97F4A7C15 + value * 0xD1342543DE82EF95
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = ((word ^ word >> shift) * factor) & (2**64 - 1)
    return word ^ word >> 31
