"""Random numbers that are a pure function of who asks: Philox4x32-10 (Salmon et al. 2011), in int64 tensor arithmetic.

There is no state. A draw is addressed by (seed, epoch, sample, view, stream, block), so it is the same whatever the
batch, the rank, the worker or the restart in which it is made.

Shapes: B samples, N blocks of four 32-bit words each.
"""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Numbers = TypeVar("Numbers", Tensor, np.ndarray)

# The streams: who draws.
ORDER, CROP, AUGMENT, SUBSET = 0, 1, 2, 3
RANDAUGMENT, ERASE_WHETHER, ERASE_HOW, MIX, DROP_PATH = 4, 5, 6, 7, 8  # of fine-tuning
PERMUTE = 9

_WORD = 0xFFFFFFFF
# Philox's multipliers less 2^32: a product with a 32-bit word then always fits a signed 64-bit integer.
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_CHUNK = 2**14  # samples drawn at a time: what the CPU's cache holds, four times as fast as a million at once


def random_bits(
    seed: int, epoch: int | Tensor, sample_B: Tensor, view: int, stream: int, block: int | Tensor = 0
) -> Tensor:
    """Four random 32-bit words per sample: int64 [B, 4], each in [0, 2^32). A block tensor [N] gives [B, N, 4].

    The key is `seed` (its low 64 bits). The counter's words are: the sample's low 32 bits; the epoch; view (8 bits),
    stream (8 bits) and the sample's bits 32 to 47; the block. So samples lie in [0, 2^48), epochs and blocks in
    [0, 2^32), views and streams in [0, 2^8). In compiled code pass the epoch as a 0-d int64 tensor: a changing
    Python number compiles again.
    """
    if isinstance(block, Tensor):
        sample_B = sample_B.unsqueeze(-1)
    return torch.stack(_words(seed, epoch, sample_B, view, stream, block), -1)


def random_word(seed: int, epoch: int, sample_B: np.ndarray, view: int, stream: int) -> np.ndarray:
    """The first word of each sample's `random_bits`: int64 [B]. By numpy, which is faster than torch on few numbers."""
    return _words(seed, epoch, sample_B, view, stream, 0)[0]


def random_64(seed: int, epoch: int, images: int, stream: int) -> np.ndarray:
    """A random 64-bit number for each of so many samples: uint64 [N]."""
    words = [random_bits(seed, epoch, sample, 0, stream)[:, :2] for sample in torch.arange(images).split(_CHUNK)]
    words_N2 = torch.cat(words).numpy().astype(np.uint64)
    return words_N2[:, 0] << np.uint64(32) | words_N2[:, 1]


def uniform(seed: int, epoch: int | Tensor, sample_B: Tensor, view: int, stream: int, count: int) -> Tensor:
    """`count` numbers per sample, uniform in [0, 1) in steps of 2^-32: float64 [B, count]. Uses blocks from 0 on."""
    block_N = torch.arange((count + 3) // 4, device=sample_B.device)
    bits_BN4 = random_bits(seed, epoch, sample_B, view, stream, block_N)
    return bits_BN4.flatten(1)[:, :count].double() * 2.0**-32


def uniform_array(seed: int, epoch: int, sample_B: np.ndarray, view: int, stream: int, count: int) -> np.ndarray:
    """`uniform` by numpy, for few samples at a time: float64 [B, count]."""
    words = _words(seed, epoch, sample_B[:, None], view, stream, np.arange((count + 3) // 4))
    bits_BN4 = np.stack(np.broadcast_arrays(*words), -1)
    return bits_BN4.reshape(len(sample_B), math.prod(bits_BN4.shape[1:]))[:, :count] * 2.0**-32


def _words(
    seed: int, epoch: int | Tensor, sample_B: Numbers, view: int, stream: int, block: int | Numbers
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    place = (sample_B >> 32 << 16) + (view + (stream << 8))
    return philox4x32((sample_B & _WORD, epoch & _WORD, place, block), (seed & _WORD, seed >> 32 & _WORD))


def philox4x32(counter: tuple, key: tuple[int, int]) -> tuple:
    """The bijection itself, ten rounds. Words are int64 tensors, int64 arrays or ints in [0, 2^32) that broadcast
    together; the first and the third must not be ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # The high word lacks what the multiplier lacks, 2^32 times the factor: add it back. The low word lacks nothing.
        high_0, high_1 = (product_0 >> 32) + c0, (product_1 >> 32) + c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & _WORD, high_0 ^ c3 ^ k1, product_0 & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3
