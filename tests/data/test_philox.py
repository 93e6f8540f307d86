import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.philox import (
    AUGMENT,
    CROP,
    ORDER,
    PERMUTE,
    philox4x32,
    random_bits,
    random_word,
    uniform,
    uniform_array,
)

WORD = st.integers(0, 2**32 - 1)

# The known-answer vectors that Random123 publishes for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def run(counter, key):
    return tuple(int(word) for word in philox4x32(tuple(torch.tensor(word) for word in counter), key))


def philox_in_integers(counter, key):
    """The paper's definition in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_published_vectors(counter, key, result):
    assert run(words(counter), words(key)) == words(result)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
@settings(max_examples=50)
def test_equals_the_definition(counter, key):
    assert run(counter, key) == philox_in_integers(counter, key)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=WORD,
    sample=st.integers(0, 2**48 - 1),
    view=st.integers(0, 255),
    stream=st.integers(0, 255),
    block=WORD,
)
@settings(max_examples=50)
def test_an_address_becomes_counter_and_key_as_documented(seed, epoch, sample, view, stream, block):
    counter = (sample % 2**32, epoch, view + 2**8 * stream + 2**16 * (sample // 2**32), block)
    expected = philox_in_integers(counter, (seed % 2**32, seed // 2**32))
    assert random_bits(seed, epoch, torch.tensor([sample]), view, stream, block).tolist() == [list(expected)]


@given(seed=st.integers(0, 2**64 - 1), epoch=WORD, samples=st.lists(st.integers(0, 2**48 - 1), min_size=1))
def test_numpy_draws_the_same_words(seed, epoch, samples):
    bits_B4 = random_bits(seed, epoch, torch.tensor(samples), 3, PERMUTE)
    assert random_word(seed, epoch, np.array(samples), 3, PERMUTE).tolist() == bits_B4[:, 0].tolist()


def test_uniform_scales_the_words_of_blocks_in_order():
    sample_B = torch.arange(5)
    bits = torch.cat([random_bits(3, 1, sample_B, 0, CROP, block) for block in range(3)], 1)
    assert torch.equal(uniform(3, 1, sample_B, 0, CROP, 10), bits[:, :10].double() / 2**32)
    assert uniform(3, 1, sample_B, 0, CROP, 10).dtype == torch.float64
    for few, samples in ((1, 5), (4, 5), (10, 5), (10, 0)):
        by_numpy = uniform_array(3, 1, sample_B[:samples].numpy(), 0, CROP, few)
        assert by_numpy.dtype == np.float64
        assert by_numpy.shape == (samples, few)
        assert np.array_equal(by_numpy, uniform(3, 1, sample_B[:samples], 0, CROP, few).numpy())


def test_a_sample_draws_the_same_in_any_batch_and_from_any_kind_of_epoch():
    sample_B = torch.tensor([7, 0, 2**40, 99, 12])
    whole = uniform(5, 3, sample_B, 1, AUGMENT, 6)
    for i in range(len(sample_B)):
        assert torch.equal(uniform(5, torch.tensor(3), sample_B[i : i + 1], 1, AUGMENT, 6), whole[i : i + 1])
    assert torch.equal(uniform(5, 3, sample_B.flip(0), 1, AUGMENT, 6), whole.flip(0))
    assert torch.equal(uniform(5, 3, sample_B, 1, AUGMENT, 2), whole[:, :2])


def test_numbers_are_uniform():
    u = uniform(11, 0, torch.arange(2**14), 0, ORDER, 16)
    assert u.min() >= 0
    assert u.max() < 1
    bins = torch.histc(u.float(), 256, 0, 1)
    expected = u.numel() / 256
    chi_squared = ((bins - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 255) < 6 * (2 * 255) ** 0.5
    bits = random_bits(11, 0, torch.arange(2**14), 0, ORDER)
    set_fraction = (bits[..., None] >> torch.arange(32) & 1).double().mean((0, 1))
    assert (set_fraction - 0.5).abs().max() < 6 * 0.5 / (4 * 2**14) ** 0.5


def test_neighbouring_addresses_are_unrelated():
    sample_B = torch.arange(2**14)
    draws = [
        uniform(11, 0, sample_B, 0, CROP, 8),
        uniform(12, 0, sample_B, 0, CROP, 8),
        uniform(11 + 2**32, 0, sample_B, 0, CROP, 8),
        uniform(11, 1, sample_B, 0, CROP, 8),
        uniform(11, 0, sample_B + 1, 0, CROP, 8),
        uniform(11, 0, sample_B + 2**32, 0, CROP, 8),
        uniform(11, 0, sample_B, 1, CROP, 8),
        uniform(11, 0, sample_B, 0, AUGMENT, 8),
    ]
    columns = torch.cat(draws, 1)  # [sample, 64]: also the eight numbers of one draw among themselves
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 6 / len(sample_B) ** 0.5
    for one, other in itertools.combinations(draws, 2):
        assert not torch.equal(one, other)


@pytest.mark.slow
def test_compiled_draws_are_the_same_and_a_new_epoch_compiles_nothing():
    compiled = torch.compile(lambda epoch, sample_B: uniform(2**63 + 5, epoch, sample_B, 1, AUGMENT, 6), fullgraph=True)
    for epoch in range(3):
        sample_B = torch.arange(8) + 2**31 * epoch
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            drawn = compiled(torch.tensor(epoch), sample_B)
        assert torch.equal(drawn, uniform(2**63 + 5, epoch, sample_B, 1, AUGMENT, 6))
