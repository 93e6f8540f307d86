"""The shipped recipes say what the paper says, and each is readable alone."""

import dataclasses
from operator import attrgetter

import pytest

from engine.recipe import load as recipes
from engine.recipe.identity import flatten
from engine.recipe.load import dump, load, loads, locate
from engine.recipe.plain import parse
from engine.recipe.sections import SCHEMA
from tests.recipe.shipped import FILES, PRETRAIN, QUICK, shipped

# Network, optimizer, base lr, weight decay, batch, epochs, warm-up, m0, T, crop_min, frozen patches.
PUBLISHED = {
    "resnet50_100ep": ("resnet50", "lars", 0.6, 1e-6, 4096, 100, 10, 0.99, 1, 0.2, False),
    "resnet50_300ep": ("resnet50", "lars", 0.3, 1e-6, 4096, 300, 10, 0.99, 1, 0.2, False),
    "resnet50_1000ep": ("resnet50", "lars", 0.3, 1.5e-6, 4096, 1000, 10, 0.996, 1, 0.2, False),
    "vit_s": ("vit_small", "adamw", 1.5e-4, 0.1, 4096, 300, 40, 0.99, 0.2, 0.08, True),
    "vit_s_1024": ("vit_small", "adamw", 1.5e-4, 0.1, 1024, 300, 40, 0.99, 0.2, 0.08, True),
    "vit_b": ("vit_base", "adamw", 1.5e-4, 0.1, 4096, 300, 40, 0.99, 0.2, 0.08, True),
    "vit_l": ("vit_large", "adamw", 1.5e-4, 0.1, 4096, 300, 40, 0.99, 0.2, 0.08, True),
    "vit_h": ("vit_huge", "adamw", 1.5e-4, 0.1, 4096, 300, 40, 0.99, 0.2, 0.08, True),
    "vit_conv_s": ("vit_conv_small", "adamw", 1.5e-4, 0.1, 4096, 300, 40, 0.99, 0.2, 0.08, False),
    "vit_conv_b": ("vit_conv_base", "adamw", 1.5e-4, 0.1, 4096, 300, 40, 0.99, 0.2, 0.08, False),
    "quickstart": ("vit", "adamw", 4e-3, 0.1, 128, 30, 3, 0.95, 0.2, 0.5, True),
    "quickstart_conv": ("vit_conv", "adamw", 4e-3, 0.1, 128, 22, 2.2, 0.95, 0.2, 0.5, False),
}
OWN = {"own_photos_small", "own_photos", "own_photos_node"}  # for any photographs, on any machine
PUBLISHED |= {
    "own_photos_small": ("vit_conv", "adamw", 2e-3, 0.1, 128, 200, 10, 0.97, 0.2, 0.2, False),
    "own_photos": ("vit_small", "adamw", 1.5e-4, 0.1, 512, 300, 40, 0.99, 0.2, 0.08, True),
    "own_photos_node": ("vit_small", "adamw", 1.5e-4, 0.1, 1024, 300, 40, 0.99, 0.2, 0.08, True),
}
TOP_1 = {
    "resnet50_100ep": "68.9",
    "resnet50_300ep": "72.8",
    "resnet50_1000ep": "74.6",
    "vit_s": "73.2",
    "vit_b": "76.7",
    "vit_l": "77.6",
    "vit_h": "78.1",
}
# Patch, dim, blocks, heads, conv stem.
SHAPES = {
    "vit_s": (16, 384, 12, 12, False),
    "vit_s_1024": (16, 384, 12, 12, False),
    "vit_b": (16, 768, 12, 12, False),
    "vit_l": (16, 1024, 24, 16, False),
    "vit_h": (14, 1280, 32, 16, False),
    "vit_conv_s": (16, 384, 11, 12, True),
    "vit_conv_b": (16, 768, 11, 12, True),
    "own_photos_small": (16, 192, 6, 6, True),
    "own_photos": (16, 384, 12, 12, False),
    "own_photos_node": (16, 384, 12, 12, False),
    "quickstart": (7, 96, 2, 4, False),
    "quickstart_conv": (8, 96, 2, 4, True),
}


def test_every_configuration_is_shipped_and_no_other():
    assert sorted(PUBLISHED) == PRETRAIN


@pytest.mark.parametrize("name", PRETRAIN)
def test_shipped_recipe_says_what_the_paper_says(name):
    recipe = shipped(name)
    model, optimizer, train, moco = recipe.model, recipe.optimizer, recipe.train, recipe.moco
    assert PUBLISHED[name] == (
        *(model.name, optimizer.name, optimizer.base_lr, optimizer.weight_decay),
        *(train.global_batch_size, train.epochs, train.warmup_epochs, moco.momentum, moco.temperature),
        *(recipe.augment.crop_min, model.freeze_patch_projection),
    )
    assert train.max_steps is None
    assert recipe.run.dir == f"runs/{name}"
    names = (*recipes.VIT_KEYS, "conv_stem")
    assert recipes.shape(model) == (dict(zip(names, SHAPES[name], strict=True)) if name in SHAPES else None)
    header = FILES[name].read_text().partition("\ntask:")[0]
    assert (f"Published: {TOP_1[name]} % top-1" if name in TOP_1 else "Published: none") in " ".join(header.split())


@pytest.mark.parametrize("name", sorted(set(PRETRAIN) - {"quickstart", "quickstart_conv"} - OWN))
def test_imagenet_recipes_share_the_augmentation_of_the_paper(name):
    recipe = shipped(name)
    augment = dataclasses.asdict(recipe.augment)
    del augment["crop_min"]
    assert augment == {
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "blur_sigma": (0.1, 2.0),
        "blur_probability": (1.0, 0.1),
        "solarize_probability": (0.0, 0.2),
        "flip_probability": 0.5,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    assert (recipe.model.projector_hidden_dim, recipe.model.output_dim, recipe.model.image_size) == (4096, 256, 224)
    assert recipe.parallel.precision == "bf16"
    assert recipe.parallel.compile


@pytest.mark.parametrize("name", sorted(set(PRETRAIN) - {"quickstart", "quickstart_conv"} - OWN))
def test_monitoring_reads_less_than_one_per_cent_of_the_images(name):
    """Of ImageNet's 1000 classes, with its 50,000 validation images. A trained image costs no less than one that is
    looked at: it is read as well, and goes eight times forward or as much."""
    recipe = shipped(name)
    epochs, every, bank = recipe.train.epochs, recipe.evaluate.knn_every_epochs, recipe.evaluate.knn_bank
    rows = epochs // every + 1  # and at the start
    assert rows * (1000 * bank + 50_000) < 0.01 * epochs * 1_281_167


@pytest.mark.parametrize("name", sorted({"quickstart", "quickstart_conv", *OWN}))
def test_recipes_for_any_machine_leave_it_to_the_machine(name):
    recipe = shipped(name)
    assert (recipe.data.workers, recipe.parallel.compile, recipe.parallel.precision) == ("auto", "auto", "auto")


@pytest.mark.parametrize("name", sorted(name for name in FILES if hasattr(shipped(name), "parallel")))
def test_a_recipe_says_what_bf16_leaves_in_float32(name):
    (line,) = [line for line in FILES[name].read_text().splitlines() if line.startswith("  precision:")]
    assert "BatchNorm and the loss stay in float32" in line


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_stands_alone(name):
    """It writes every key but those that leave something out, or to the named network; and fewer than 60."""
    recipe, raw = shipped(name), parse(FILES[name].read_text(), name)
    assert recipe.schema == SCHEMA == raw["schema"]
    written = {f"{section}.{leaf}" for section, part in raw.items() if isinstance(part, dict) for leaf in part}
    assert len(written) < 60
    unwritten = flatten(recipe).keys() - written - {"schema", "task"}
    assert all(attrgetter(dotted)(recipe) in (None, {}) for dotted in unwritten), unwritten


def test_quickstart_data_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = locate(load(QUICK).data.root, QUICK)
    assert (root / "train.tar").is_file()
    assert (root / "val.tar").is_file()


@pytest.mark.parametrize("name", FILES)
def test_yaml_keeps_shipped_recipes(name):
    recipe = shipped(name)
    assert loads(dump(recipe), "dump", kind=type(recipe)) == recipe
