"""Strict mode, what stands in its place, and the trial that decides between them."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend

from engine.recipe.sections import Parallel
from engine.training.determinism import deterministic, refused_in_trial
from models.architecture import of_name
from tests.training.trunks import Unpooled

CPU = torch.device("cpu")
REFUSED = "max_unpooling2d_forward_out"


def trial(build, size: int = 8, precision: str = "float32") -> str | None:
    return refused_in_trial(build, size, Parallel(compile=False, precision=precision), CPU)


def flags() -> tuple[object, ...]:
    attention = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        *(attention.cudnn_sdp_enabled(), attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled()),
    )


def put() -> None:
    torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))


@pytest.mark.parametrize(
    ("wanted", "refused", "within"),
    [
        (True, None, (True, False, False, True, True, True)),
        (True, REFUSED, (True, True, False, False, False, False)),
        (False, None, (False, False, False, True, True, True)),
    ],
)
def test_modes_are_as_asked_and_gone_afterwards(wanted, refused, within):
    before = flags()
    with deterministic(wanted, refused):
        assert flags() == within
    assert flags() == before
    with pytest.raises(ZeroDivisionError), deterministic(wanted, refused):
        raise ZeroDivisionError
    assert flags() == before


def test_what_cannot_be_deterministic_raises_warns_or_passes(recwarn):
    with deterministic(True), pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        put()
    with deterministic(False):
        put()
    # Whatever the garbage collector clears away meanwhile may warn of something else.
    assert not [warning for warning in recwarn if "put_" in str(warning.message)]
    with deterministic(True, REFUSED), pytest.warns(UserWarning, match="put_ does not have"):
        put()


def test_attention_beside_a_refused_operation_is_the_plain_one():
    x = torch.randn(2, 2, 5, 8)

    def choice() -> int:
        return torch._fused_sdp_choice(x, x, x)

    assert choice() != SDPBackend.MATH.value
    with deterministic(True, REFUSED):
        assert choice() == SDPBackend.MATH.value
        plain = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(plain, (x @ x.mT / 8**0.5).softmax(-1) @ x)


@pytest.mark.parametrize("precision", ["bf16", "float32", "float64"])
def test_a_trial_finds_what_is_refused_and_leaves_nothing_behind(precision):
    made = []

    def build() -> nn.Module:
        torch.rand(3)
        made.append(weakref.ref(trunk := Unpooled()))
        return trunk

    before, state = flags(), torch.random.get_rng_state()
    assert trial(build, precision=precision) == REFUSED
    assert flags() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [trunk() for trunk in made] == [None]


def test_another_failure_of_the_trial_is_no_refusal():
    with pytest.raises(RuntimeError, match="expected input"):
        trial(lambda: nn.Conv2d(5, 4, 1))


NETWORKS = {
    "vit": {"patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "conv_stem": False},
    "vit_conv": {"patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "conv_stem": True},
    "resnet50": None,
    "timm/test_vit": None,
    "timm/test_resnet": None,
}


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_kind_are_deterministic(name, precision):
    architecture = of_name(name, 32, NETWORKS[name])
    assert trial(lambda: architecture.build().module, 32, precision) is None
