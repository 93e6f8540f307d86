"""A classifier on a trunk: the same as timm's, with stochastic depth that is chosen from outside."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.classifier import Classifier
from models.drop_path import ChosenDropPath
from models.resnet import build_resnet
from models.timm_trunk import build_timm
from models.vit import build_vit


def test_the_classifier_is_timms():
    """Weights moved over by name, the same logits; and its branches are dropped as often as timm drops them."""
    shape = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 4, "heads": 3}
    ours = Classifier(build_vit(**shape), classes=7, drop_path=0.3)
    theirs = VisionTransformer(32, 8, embed_dim=24, depth=4, num_heads=3, num_classes=7, drop_path_rate=0.3)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    for parameter in ours.parameters():  # a ViT of ours is built without values
        nn.init.normal_(parameter, std=0.2)
    state = {name.removeprefix("trunk."): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    rates = [[block.drop_path1, block.drop_path2] for block in theirs.blocks]
    expected = [path.drop_prob for pair in rates for path in pair if not isinstance(path, nn.Identity)]
    assert [path.probability for path in ours.drop_paths] == pytest.approx(expected)
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_a_branch_is_dropped_for_the_samples_chosen_and_grows_for_the_others():
    path = ChosenDropPath(0.25)
    classifier = Classifier(build_vit(image_size=16, patch_size=8, dim=8, depth=2, heads=2), 3, 0.25)
    classifier.choose_paths(torch.tensor([[0.2, 0.9], [0.25, 0.1]], dtype=torch.float64))
    scales = torch.stack([path.scale_B for path in classifier.drop_paths])
    torch.testing.assert_close(scales, torch.tensor([[0, 4 / 3], [4 / 3, 0]]))
    path.scale_B = torch.tensor([0.0, 2.0])
    branch = torch.randn(2, 3, 4)
    assert not path(branch)[0].any()
    assert torch.equal(path(branch)[1], 2 * branch[1])
    assert path.eval()(branch) is branch


def test_batch_norm_takes_the_batch_as_one():
    """Not as two views: an odd batch passes, and the statistics move once."""
    classifier = Classifier(build_vit(image_size=16, patch_size=8, dim=16, depth=1, heads=2, conv_stem=True), 3)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(5, 3, 16, 16)
    first = classifier.trunk.patch_embed.proj[1]
    classifier.train()(images)
    assert first.num_batches_tracked == 1
    mean_C = classifier.trunk.patch_embed.proj[0](images).mean((0, 2, 3))
    torch.testing.assert_close(first.running_mean, 0.1 * mean_C)


def test_other_trunks_drop_paths_too_or_say_that_they_cannot():
    trunk = build_timm("convnext_atto", image_size=32)
    paths = Classifier(trunk, 3, 0.2).drop_paths
    assert len(paths) == 11
    assert paths[-1].probability == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"model.drop_path \(0.2\) must be 0 for this trunk, which has no stochastic"):
        Classifier(build_resnet([3, 4, 6, 3], 64), 3, 0.2)
    mixer = build_timm("mixer_s32_224", image_size=224)
    with pytest.raises(ValueError, match="is not of one branch"):  # it has one for the two branches of a block
        Classifier(mixer, 3, 0.2)


def test_what_a_librarys_authors_never_train_stays_as_it_is():
    """Weights of classifiers that the trunk does not have."""
    with torch.device("meta"):
        classifier = Classifier(build_timm("efficientvim_m1", image_size=64), 3)
    assert [name for name, parameter in classifier.named_parameters() if not parameter.requires_grad] == [
        "trunk.weights"
    ]
