"""A ViT computes its CLS token alone in the last block, and this is timm's, to rounding."""

import pytest
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.classifier import Classifier
from models.trunk import blocks
from models.vit import PatchProjection, build_vit

SHAPE = {"image_size": 32, "patch_size": 8, "dim": 24, "heads": 3}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def classifier(depth: int = 3, *, conv_stem: bool = False) -> Classifier:
    """In float64, of random weights, and with stochastic depth in every block but the first."""
    network = Classifier(build_vit(**SHAPE, depth=depth, conv_stem=conv_stem), 5, 0.5 if depth > 1 else 0.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    network.choose_paths(torch.rand(4, len(network.drop_paths), generator=generator, dtype=torch.float64))
    return network.double()


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(features: Tensor, trunk: nn.Module) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    named = dict(trunk.named_parameters())
    return dict(zip(named, torch.autograd.grad((features * weight).sum(), list(named.values())), strict=True))


@pytest.mark.parametrize(("depth", "conv_stem"), [(3, False), (3, True), (1, False)])
def test_cls_alone_is_the_cls_of_all_tokens(depth, conv_stem):
    trunk = classifier(depth, conv_stem=conv_stem).train().trunk
    cls, full = trunk(images()), VisionTransformer.forward(trunk, images())
    torch.testing.assert_close(cls, full, **EXACT)
    torch.testing.assert_close(gradients(cls, trunk), gradients(full, trunk), **EXACT)
    assert trunk.forward_features(images()).shape == (4, 17, 24)


def test_stochastic_depth_acts_on_the_last_block():
    """A sample whose last two branches are left out has the CLS token that the block before gives."""
    network = classifier().train()
    for path in network.drop_paths[-2:]:
        path.scale_B = torch.tensor([0.0, 1.0, 0.0, 1.0])
    trunk, before = network.trunk, []
    hook = trunk.blocks[-1].register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    found = trunk(images())
    hook.remove()
    same = [torch.equal(a, b) for a, b in zip(found, trunk.norm(before[0][:, 0]), strict=True)]
    assert same == [True, False, True, False]


def test_names_shapes_and_order_are_timms():
    theirs = VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=3, num_classes=0).state_dict()
    ours = build_vit(**SHAPE, depth=2).module.state_dict()
    assert [(n, t.shape) for n, t in ours.items()] == [(n, t.shape) for n, t in theirs.items()]


def test_products_that_no_cls_token_needs_are_not_computed():
    """Multiply-adds of all matrix products but attention's own: the last block's are T * 12 D^2 where all is computed,
    T * 2 D^2 (keys and values) and 10 D^2 (query, projection, MLP of one token) here."""
    with torch.device("meta"):
        trunk = build_vit(**SHAPE, depth=1).module
        image = torch.empty(1, 3, 32, 32)
    tokens, dim = 17, 24
    saved = 2 * (tokens * 12 - (tokens * 2 + 10)) * dim**2
    assert products(trunk, image) == products(trunk.forward_features, image) - saved


def products(forward, image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        forward(image)
    found = counter.get_flop_counts()["Global"]
    return sum(count for kind, count in found.items() if kind in (torch.ops.aten.addmm, torch.ops.aten.mm))


def test_every_block_is_one_graph():
    network = classifier().train()
    expected = network(images())
    units = blocks(network.trunk)
    assert len(units) == 3
    for block in units:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(network(images()), expected, **EXACT)
    assert network.trunk.forward_features(images()).shape == (4, 17, 24)


@pytest.mark.parametrize("patch_size", [4, (2, 8)])
def test_the_patch_projection_is_timms_convolution(patch_size):
    own = PatchProjection(16, patch_size, 3, 10).double()
    x = images()[:, :, :16, :16].clone().requires_grad_()
    found, expected = own(x), PatchEmbed.forward(own, x)
    torch.testing.assert_close(found, expected, **EXACT)
    inputs = x, *own.parameters()
    of_found, of_expected = (torch.autograd.grad(each.square().sum(), inputs) for each in (found, expected))
    torch.testing.assert_close(of_found, of_expected, **EXACT)


@pytest.mark.parametrize("shape", [(30, 30), (8, 35)])
def test_what_is_left_beside_whole_patches_is_left_out_as_by_timms(shape):
    own, x = PatchProjection(shape, 8, 3, 10).double(), torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(own(x), PatchEmbed.forward(own, x), **EXACT)


def test_a_patch_projection_that_is_not_strict_takes_other_sizes_as_timms_does():
    own = PatchProjection(16, 4, 3, 10, strict_img_size=False).double()
    torch.testing.assert_close(own(images()), PatchEmbed.forward(own, images()), **EXACT)


def test_images_of_another_size_are_refused_in_words():
    with pytest.raises(ValueError, match=r"images \(32 x 16\) must be of 32 x 32 pixels"):
        classifier().trunk(images()[..., :16])
