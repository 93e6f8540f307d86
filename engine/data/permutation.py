"""A permutation of 0 to N - 1 drawn by (seed, epoch), computed for the places that are asked for: nothing is stored.

A Feistel network on pairs of numbers (Luby and Rackoff 1988), for an N that is no square with cycle walking (Black and
Rogaway 2002): the N places lie in the cells of a square, row by row; the network permutes all cells, and a place that
is sent to a cell beyond the N is sent on until it comes back among them.

Shapes: P places.
"""

from math import isqrt

import numpy as np

from engine.data.philox import PERMUTE, random_word

_ROUNDS = 10  # of few places, even four, all permutations are then equally likely


def permuted(seed: int, epoch: int, count: int, place_P: np.ndarray) -> np.ndarray:
    """What the permutation of 0 to `count` - 1 has at the places: int64 [P]. count: up to 2^62."""
    side = _even_side(count)
    result_P = _shuffled(seed, epoch, side, place_P)
    while (beyond := np.flatnonzero(result_P >= count)).size:
        result_P[beyond] = _shuffled(seed, epoch, side, result_P[beyond])
    return result_P


def _even_side(count: int) -> int:
    """Of the smallest square with enough cells. Of an odd side the network would reach even permutations alone."""
    return 2 * (isqrt(count - 1) // 2 + 1)


def _shuffled(seed: int, epoch: int, side: int, cell_P: np.ndarray) -> np.ndarray:
    """Where the network sends cells of the square. Each round can be undone, so no two go to the same."""
    row_P, column_P = np.divmod(cell_P, side)
    for number in range(_ROUNDS):
        shift_P = random_word(seed, epoch, column_P, number, PERMUTE) * side >> 32
        row_P, column_P = column_P, (row_P + shift_P) % side
    return row_P * side + column_P
