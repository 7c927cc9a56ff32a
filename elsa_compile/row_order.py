"""In which order training draws rows: a pure function of the seed and the position.

Nothing is stored and nothing is replayed, so a run that is resumed at any step draws what it would
have drawn.
"""

from collections.abc import Iterator

from elsa_compile.errors import UserInputError

_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST = 100, 8, 64
_ROUNDS = 8
_WORD = (1 << 64) - 1


def permuted(index: int, count: int, key: int) -> int:
    """Place of `index` in a permutation of range(count) that depends on `key` alone.

    A Feistel network over the next power of four, walked until it falls into the range: no
    table, so that an epoch of 10^9 windows costs no memory, and the same numbers with every
    version of every library. (Black, Rogaway: Ciphers with arbitrary finite domains, 2002.)

    Example: `sorted(permuted(i, 5, key) for i in range(5)) == [0, 1, 2, 3, 4]` for any key.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(key, turn, right) & low)
        index = left << half | right
        if index < count:
            return index


def mixed(*values: int) -> int:
    """64 well-mixed bits of some whole numbers (the finaliser of splitmix64, folded)."""
    bits = 0
    for value in values:
        bits = ((bits ^ value) + 0x9E3779B97F4A7C15) & _WORD
        bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & _WORD
        bits ^= bits >> 31
    return bits


def places(step: int, batch_size: int, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(epoch, which of `count`) for every row of a batch."""
    for position in range(first_row(step, batch_size), (step + 1) * batch_size):
        epoch, index = divmod(position, count)
        yield epoch, permuted(index, count, mixed(seed, epoch))


def first_row(step: int, batch_size: int) -> int:
    """Rows drawn before a step, or UserInputError for a step or size that makes no sense."""
    if step < 0 or batch_size < 1:
        raise UserInputError(
            f"step {step} of batch size {batch_size} makes no sense, wanted a step from 0 and at "
            "least one row"
        )
    return step * batch_size


def held_out_count(total: int) -> int:
    """How many of `total` windows or rows are kept from training, to watch it.

    One in a hundred, at least 8 and at most 64, and never more than half. Examples: 1 -> 0,
    10 -> 5, 100 -> 8, 3000 -> 30, 10^6 -> 64.
    """
    wanted = max(_HELD_OUT_LEAST, total // _HELD_OUT_SHARE)
    return min(wanted, _HELD_OUT_MOST, total // 2)
