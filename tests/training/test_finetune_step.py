"""Rates and weight decay of fine-tuning, layer by layer, against timm's."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay

from engine.recipe.sections import FinetuneOptimizer
from engine.training.finetune_step import decaying_groups
from models.classifier import Classifier
from models.drop_path import ChosenDropPath
from models.resnet import build_resnet
from models.timm_trunk import build_timm

RATES = FinetuneOptimizer(base_lr=1.0, min_lr=0.0, weight_decay=0.1, layer_decay=0.5)


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_convnext",
        "test_resnet",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
        "pit_ti_224",
    ],
)
def test_rates_and_weight_decay_are_timms_of_the_whole_network(name):
    size = 160 if name.startswith("test") else 224
    with torch.device("meta"):
        trunk = build_timm(name, image_size=size)
        classifier, whole = Classifier(trunk, 5, 0.2), timm.create_model(name, num_classes=5, drop_path_rate=0.2)
    own = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    named = {id(p): n.removeprefix("trunk.") for n, p in classifier.named_parameters()}
    named |= {id(p): n for n, p in whole.named_parameters()}
    ours, theirs = (
        {named[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        for groups in (
            decaying_groups(classifier, RATES),
            param_groups_layer_decay(whole, 0.1, own, layer_decay=0.5),
        )
    )
    trunks = dict(trunk.module.named_parameters()).keys()
    assert {name: ours[name] for name in trunks} == {name: theirs[name] for name in trunks}
    assert (ours["head.weight"], ours["head.bias"]) == ((1, 0.1), (1, 0))
    paths = {path: module.drop_prob for path, module in whole.named_modules() if isinstance(module, DropPath)}
    assert {p: m.probability for p, m in trunk.module.named_modules() if isinstance(m, ChosenDropPath)} == {
        path: probability for path, probability in paths.items() if probability > 0
    }


def test_a_resnet_of_ours_has_layers_too():
    scales = {group["lr_scale"] for group in decaying_groups(Classifier(build_resnet([3, 4, 6, 3], 64), 3), RATES)}
    assert scales == {0.5**n for n in range(18)}  # classifier, 16 blocks, stem
