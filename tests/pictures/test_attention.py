"""Attention is that of the block's own weights, and the picture shows it."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from engine.data.decode import CenterCrop, decode
from engine.errors import UserError
from engine.evaluation.subject import open_subject
from engine.pictures.attention import check_attention, class_attention
from engine.pictures.canvas import DOTS, HEADER, MARGIN
from models.resnet import build_resnet
from models.vit import build_vit
from tests.pictures.drawn import VIT, VIT_CONV, show


def attention_by_hand(trunk, image_B3SS: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(d)) of the class token's row, from the weights of the last block alone: [B, H, N]."""
    x_BND = trunk._pos_embed(trunk.patch_embed(image_B3SS))
    for block in trunk.blocks[:-1]:
        x_BND = block(x_BND)
    block = trunk.blocks[-1]
    x_BND = block.norm1(x_BND).double()
    weight_3HdD = block.attn.qkv.weight.double().unflatten(0, (3, block.attn.num_heads, -1))
    bias_3Hd = block.attn.qkv.bias.double().unflatten(0, (3, block.attn.num_heads, -1))
    q_BHd = torch.einsum("bd,hed->bhe", x_BND[:, 0], weight_3HdD[0]) + bias_3Hd[0]
    k_BHNd = torch.einsum("bnd,hed->bhne", x_BND, weight_3HdD[1]) + bias_3Hd[1][:, None]
    score_BHN = torch.einsum("bhe,bhne->bhn", q_BHd, k_BHNd) / q_BHd.shape[-1] ** 0.5
    return score_BHN.exp() / score_BHN.exp().sum(-1, keepdim=True)


def trunks():
    shape = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "heads": 3}
    yield "ours", build_vit(**shape).module
    yield "conv stem", build_vit(**shape | {"depth": 1}, conv_stem=True).module
    options = {"img_size": 64, "num_classes": 0, "depth": 2}
    yield "timm", timm.create_model("vit_tiny_patch16_224", **options)
    yield "registers", timm.create_model("vit_tiny_patch16_224", reg_tokens=3, **options)


@pytest.mark.parametrize("trunk", [pytest.param(trunk, id=name) for name, trunk in trunks()])
@torch.no_grad()
def test_attention_is_that_of_the_blocks_own_weights(trunk):
    trunk.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trunk.parameters():
        parameter.normal_(0, 4 / trunk.embed_dim**0.5, generator=generator)
    check_attention(trunk, "a trunk")
    image_B3SS = torch.randn(2, 3, *trunk.patch_embed.img_size, generator=generator)
    before = trunk(image_B3SS)

    found_BHRC = class_attention(trunk, image_B3SS)
    expected_BHN = attention_by_hand(trunk, image_B3SS)[:, :, trunk.num_prefix_tokens :]
    assert found_BHRC.shape[2:] == trunk.patch_embed.grid_size
    torch.testing.assert_close(found_BHRC.flatten(2).double(), expected_BHN, rtol=1e-4, atol=1e-7)
    assert expected_BHN.amax(2).min() > 2 * expected_BHN.mean()  # far from even, so the order of patches is tested
    assert torch.equal(trunk(image_B3SS), before)  # and the trunk is as it was


def test_attention_wants_a_class_token():
    with torch.device("meta"):
        without = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg")
        resnet, swin = build_resnet([3, 4, 6, 3], 64).module, timm.create_model("swin_tiny_patch4_window7_224")
        for trunk in (resnet, swin, without):
            with pytest.raises(UserError, match=r"CHECKPOINT \(runs/x\) must be of a ViT with a class token"):
                check_attention(trunk, "runs/x")


@pytest.mark.parametrize("checkpoint", [VIT, VIT_CONV])
def test_attention_picture(checkpoint, images, tmp_path, capsys):
    file = images / "odd ones" / "1.png"
    show("attention", checkpoint, file, tmp_path / "a.png")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"file": str(tmp_path / "a.png")}
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape[1] == 800 * DOTS
    # 12 heads stand in 3 rows of 4: the two large squares are as high as 3 small ones with their names.
    small = (800 - 2 * MARGIN - 4 * 6 - 3 * 6 - 2 * 2 * 26) / 10
    large = 3 * small + 2 * 26
    square = picture[HEADER * DOTS : int((HEADER + large) * DOTS), MARGIN * DOTS : int((MARGIN + large) * DOTS)]
    subject = open_subject(checkpoint, "cpu")
    image_3SS = CenterCrop(subject.image_size)(decode(file.read_bytes()))
    assert np.abs(square.mean((0, 1)) - image_3SS.float().mean((1, 2)).numpy()).max() < 2
    # The brightest patch of head 1 is where its attention is largest.
    mean, std = (torch.tensor(values)[:, None, None] for values in (subject.mean, subject.std))
    weight_RC = attention_by_hand(subject.network, ((image_3SS / 255 - mean) / std)[None])[0, 0, 1:].unflatten(
        0, (4, 4)
    )
    x, y, patch = MARGIN + 2 * large + 24, HEADER, small / 4
    centres = [[(x + (c + 0.5) * patch, y + (r + 0.5) * patch) for c in range(4)] for r in range(4)]
    light = [[int(picture[int(v * DOTS), int(u * DOTS)].sum()) for u, v in row] for row in centres]
    assert np.argmax(light) == weight_RC.argmax()
