"""The recipe: what it refuses and in which words, what YAML keeps of it, and that the shipped ones say the paper's."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.recipe import load as recipes
from engine.recipe import sections as tasks
from engine.recipe.identity import FREE_KEYS, FREE_SECTIONS, fingerprint, flatten, is_free
from engine.recipe.identity import resume_differences as differences
from engine.recipe.load import check_world, dump, load, loads, locate
from engine.recipe.plain import parse, unparse
from engine.recipe.sections import Finetune, Linear

FOLDER = Path(__file__).parents[2] / "recipes"
QUICK, CONV, RESNET = (FOLDER / f"{name}.yaml" for name in ("quickstart", "quickstart_conv", "resnet50_100ep"))
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml") if "\ntask: pretrain\n" in path.read_text())
LABELLED = sorted({path.stem for path in FOLDER.glob("*.yaml")} - set(SHIPPED))

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
    "quickstart": (7, 96, 2, 4, False),
    "quickstart_conv": (8, 96, 2, 4, True),
}


def complaint(*overrides, path=QUICK):
    """The words of the UserError that a recipe with these overrides ends in; one line, always."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the shipped recipes ---------------------------------------------------------------------------------------------


def test_every_configuration_is_shipped_and_no_other():
    assert sorted(PUBLISHED) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_says_what_the_paper_says(name):
    recipe = load(FOLDER / f"{name}.yaml")
    model, optimizer, train, moco = recipe.model, recipe.optimizer, recipe.train, recipe.moco
    assert PUBLISHED[name] == (
        *(model.name, optimizer.name, optimizer.base_lr, optimizer.weight_decay),
        *(train.global_batch_size, train.epochs, train.warmup_epochs, moco.momentum, moco.temperature),
        *(recipe.augment.crop_min, model.freeze_patch_projection),
    )
    assert train.max_steps is None and recipe.run.dir == f"runs/{name}"
    names = (*recipes.SHAPE_KEYS, "conv_stem")
    assert recipes.shape(model) == (dict(zip(names, SHAPES[name], strict=True)) if name in SHAPES else None)
    header = (FOLDER / f"{name}.yaml").read_text().partition("\ntask:")[0]
    assert (f"Published: {TOP_1[name]} % top-1" if name in TOP_1 else "Published: none") in " ".join(header.split())


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - {"quickstart", "quickstart_conv"}))
def test_imagenet_recipes_share_the_augmentation_of_the_paper(name):
    recipe = load(FOLDER / f"{name}.yaml")
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
    assert recipe.parallel.precision == "bf16" and recipe.parallel.compile


def test_a_recipe_stands_alone_with_every_key_of_its_sections_but_the_shapes():
    for name in SHIPPED:
        text = (FOLDER / f"{name}.yaml").read_text()
        for dotted in flatten(load(FOLDER / f"{name}.yaml")):
            leaf = dotted.rpartition(".")[2]
            assert f"{leaf}:" in text or leaf in recipes.SHAPE_KEYS, (name, dotted)


def test_quickstart_data_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = locate(load(QUICK).data.root, QUICK)
    assert (root / "train.tar").is_file() and (root / "val.tar").is_file()


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a mapping of keys to values; found nothing"),
        ("# nothing\n", "found nothing"),
        ("just words", "must be a mapping of keys to values; found just words"),
        ("- a\n- b\n", "must be a mapping"),
        ("task: [unclosed", "must be plain YAML"),
        ("run: {dir: a}\nrun: {dir: b}\n", "on line 2: the key run twice, first on line 1"),
        ("task: pretrain\nrun:\n  seed: 1\n  dir: a\n  seed: 2\n", "on line 5: the key seed twice, first on line 3"),
        ("run: !!python/object/apply:os.getcwd []", "on line 1: a tag, anchor or alias"),
        ("run: !!timestamp x", "a tag, anchor or alias"),
        ("a: &a [1]\nb: *a\n", "on line 1: a tag, anchor or alias"),
        ("1: x", "a key that is not text"),
        ("? [a]\n: x", "a key that is not text"),
        ("a: 1\n---\nb: 2\n", "must be plain YAML"),
        ("a: " + "[" * 5000, "too many brackets"),
        ("a: " + "9" * 5000, "must be plain YAML"),
        ("a: \0", "must be plain YAML"),
        ("run: {dir: a}\n", "task (missing) must be one of pretrain"),
        ("task: sleep\n", "task (sleep) must be one of pretrain"),
        ("task: [pretrain]\n", "task (['pretrain']) must be one of pretrain"),
        ("task: pretrain\n", "run.dir (missing) must be printable text"),
        ("task: pretrain\nrun: 3\n", "run (3) must be a mapping"),
        ("task: pretrain\nrun:\n", "run (null) must be a mapping"),
    ],
)
def test_refused_file(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert words in complaint(path=path)


def test_unreadable_file(tmp_path):
    missing = tmp_path / "none.yaml"
    assert f"recipe ({missing}) must be a readable file: No such file or directory" in complaint(path=missing)
    assert "must be a readable file: Is a directory" in complaint(path=tmp_path)
    assert "must be a readable file" in complaint(path="a\0b")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa\x00\x01")
    assert "must be plain YAML" in complaint(path=tmp_path / "binary.yaml")


def test_numbers_and_words_read_as_they_look():
    lr = {text: load(QUICK, [f"optimizer.base_lr={text}"]).optimizer.base_lr for text in ("1e-3", "1E-3", "1.e-3", "1")}
    assert lr == {"1e-3": 0.001, "1E-3": 0.001, "1.e-3": 0.001, "1": 1.0}
    assert type(lr["1"]) is float
    assert load(QUICK, ["run.dir=no"]).run.dir == "no"
    assert load(QUICK, ["run.dir=2024-01-01"]).run.dir == "2024-01-01"
    for text in ("010", "1_0", "1:30", "0x10"):
        assert f"train.epochs ({text}) must be an integer >= 1" in complaint(f"train.epochs={text}")


def test_every_key_without_a_default_is_missed_by_its_name(tmp_path):
    optional = {f"model.{leaf}" for leaf in (*recipes.SHAPE_KEYS, "projector_hidden_dim", "output_dim")}
    optional |= {"train.max_steps", "data.val_root", "data.dataset", "data.dataset_options", "evaluate.crop_fraction"}
    optional |= {"task", "evaluate.online_probe"}
    for dotted in set(flatten(load(RESNET))) - optional:
        section, leaf = dotted.split(".")
        raw = dataclasses.asdict(load(RESNET))
        del raw[section][leaf]
        (tmp_path / "recipe.yaml").write_text(unparse(raw))
        found = complaint(path=tmp_path / "recipe.yaml")
        assert found.startswith(f"{dotted} (missing) must be ") and found.endswith(f"or pass {dotted}=VALUE")
    raw = dataclasses.asdict(load(RESNET))
    for dotted in optional - {"task"}:
        section, leaf = dotted.split(".")
        del raw[section][leaf]
    (tmp_path / "recipe.yaml").write_text(unparse(raw))
    assert load(tmp_path / "recipe.yaml") == load(RESNET)


# ---- keys and overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.base_lrr=1", "optimizer.base_lrr is no key of the recipe; did you mean optimizer.base_lr?"),
        ("optimiser.base_lr=1", "optimiser.base_lr is no key of the recipe; did you mean optimizer.base_lr?"),
        ("model.base_lr=1", "did you mean optimizer.base_lr?"),
        ("epochs=3", "epochs is no key of the recipe; did you mean train.epochs?"),
        ("epoch=3", "did you mean train.epochs?"),
        ("train.zzzzzzzz=3", "train.zzzzzzzz is no key of the recipe; remove it"),
        ("run.dir.deep=3", "run.dir.deep is no key of the recipe; dir holds a value and no keys"),
        ("run.=3", "run. is no key of the recipe"),
        ("a.b.c=3", "a.b is no key of the recipe"),
        ("train=3", "train (3) must be a mapping"),
        ("train={epoch: 3}", "train.epoch is no key of the recipe; did you mean train.epochs?"),
        ("train.epochs", "override (train.epochs) must be of the form dotted.key=value"),
        ("=3", "override (=3) must be of the form dotted.key=value"),
        ("", "override () must be of the form dotted.key=value"),
        ("train.epochs=[", "override (train.epochs=[) must be plain YAML"),
        ("train.epochs={a: 1, a: 2}", "the key a twice"),
        ("task=linear", "task (linear) must be pretrain for this command; pass a recipe of that task"),
    ],
)
def test_refused_override(override, words):
    assert words in complaint(override)


def test_overrides_reach_every_depth_and_the_last_holds():
    overrides = ["data.source=torchvision", "data.dataset=CIFAR10", "data.dataset_options.train=true"]
    recipe = load(QUICK, [*overrides, "train.max_steps=1", "train.max_steps=7", "data.val_root="])
    assert recipe.data.dataset_options == {"train": True}
    assert recipe.train.max_steps == 7 and recipe.data.val_root is None
    assert load(QUICK, ["augment.blur_sigma=[1, 2]"]).augment.blur_sigma == (1.0, 2.0)
    assert load(QUICK, ["run.dir=a=b"]).run.dir == "a=b"


# ---- types and ranges ------------------------------------------------------------------------------------------------

INTEGER = ["ten", "1.5", "true", "null", "[1]", "{a: 1}", "99999999999999999999", "-1"]
NUMBER = ["much", "true", "null", "[1]", ".nan", ".inf", "1e999", "1" + "0" * 400]
WRONG = {
    "run.dir": ["3", "null", "''", "true", '"a\\nb"', '"a\\0b"'],
    "run.seed": INTEGER,
    "model.name": ["vit_tiny", "timm/", "3", "timm/a b", "timm/../x"],
    "model.image_size": [*INTEGER, "0"],
    "model.patch_size": ["0", "ten"],
    "model.dim": ["0", "ten"],
    "model.depth": ["0", "ten"],
    "model.heads": ["0", "ten"],
    "model.freeze_patch_projection": ["1", "yes", "null"],
    "model.projector_hidden_dim": [*INTEGER, "0"],
    "model.output_dim": [*INTEGER, "0"],
    "moco.temperature": [*NUMBER, "0", "-1"],
    "moco.momentum": [*NUMBER, "-0.1", "1.1"],
    "optimizer.name": ["sgd", "3", "null", "[]"],
    "optimizer.base_lr": [*NUMBER, "0", "-1"],
    "optimizer.weight_decay": [*NUMBER, "-1"],
    "train.global_batch_size": [*INTEGER, "0", "1"],
    "train.epochs": [*INTEGER, "0"],
    "train.warmup_epochs": [*NUMBER, "-1"],
    "train.max_steps": ["0", "ten", "1.5"],
    "data.source": ["zip", "null"],
    "data.root": ["3", "null", "''"],
    "data.val_root": ["3", "''"],
    "data.dataset": ["3", "''"],
    "data.dataset_options": ["3", "null", "[1]", "{a: .nan}", "{a: [{b: 1e999}]}", "{a b: 1}"],
    "data.workers": INTEGER,
    "data.max_bad_fraction": [*NUMBER, "-0.1", "1.1"],
    "augment.crop_min": [*NUMBER, "0", "1.1"],
    "augment.hue": [*NUMBER, "-0.1", "0.6"],
    "augment.blur_sigma": ["1", "[1]", "[0, 1]", "[1, 2, 3]", "[1, x]", "[1, .nan]"],
    "augment.blur_probability": ["1", "[0, 1.1]", "[-1, 0]"],
    "augment.solarize_probability": ["1", "[0, 1.1]", "[true, 0]"],
    "augment.mean": ["0", "[0, 0]", "[0, 0, x]"],
    "augment.std": ["0", "[1, 1]", "[1, 1, 0]"],
    "checkpoint.every_steps": [*INTEGER, "0"],
    "checkpoint.keep": [*INTEGER, "0"],
    "log.every_steps": [*INTEGER, "0"],
    "evaluate.knn_every_epochs": INTEGER,
    "evaluate.crop_fraction": [*NUMBER, "0", "1.1"],
    "evaluate.online_probe": ["1", "yes", "null"],
    "parallel.compile": ["1", "yes", "null"],
    "parallel.precision": ["fp16", "32"],
    "parallel.shard": ["none", "1"],
    "parallel.replicate": [*INTEGER, "0"],
}
WRONG |= {f"augment.{name}": [*NUMBER, "-0.1"] for name in ("brightness", "contrast", "saturation")}
WRONG |= {f"augment.{name}_probability": [*NUMBER, "-0.1", "1.1"] for name in ("jitter", "grayscale", "flip")}


def test_every_key_refuses_what_it_cannot_be():
    assert set(WRONG) == set(flatten(load(QUICK))) - {"task"}
    for dotted, values in WRONG.items():
        for value in values:
            found = complaint(f"{dotted}={value}")
            assert found.startswith(f"{dotted} (") and ") must be " in found and f"pass {dotted}=VALUE" in found, found
            assert len(found) < 400


def test_the_words_name_type_and_range():
    assert complaint("train.epochs=ten") == (
        "train.epochs (ten) must be an integer >= 1; change the recipe or pass train.epochs=VALUE"
    )
    assert "train.max_steps (0) must be an integer >= 1 or null" in complaint("train.max_steps=0")
    assert "optimizer.name (sgd) must be one of adamw, lars" in complaint("optimizer.name=sgd")
    assert "a list of 2, each a finite number > 0" in complaint("augment.blur_sigma=1")
    assert "parallel.compile (yes) must be true or false" in complaint("parallel.compile=yes")
    assert "augment.crop_min (0) must be a finite number > 0 and <= 1" in complaint("augment.crop_min=0")
    assert "resnet50 or timm/<name>" in complaint("model.name=vit_tiny")


# ---- combinations ----------------------------------------------------------------------------------------------------

OWN_SHAPE = [f"model.{name}=null" for name in recipes.SHAPE_KEYS]


@pytest.mark.parametrize(
    ("path", "overrides", "words"),
    [
        (QUICK, ["model.image_size=30"], "model.image_size (30) must be divisible by model.patch_size (7)"),
        (QUICK, ["model.heads=5"], "model.dim (96) must be divisible by model.heads (5)"),
        (QUICK, ["model.dim=90", "model.heads=3"], "model.dim (90) must be divisible by 4"),
        (QUICK, ["model.depth=null"], "model.depth (null) must be an integer >= 1 for vit"),
        (CONV, ["model.heads=null"], "model.heads (null) must be an integer >= 1 for vit_conv"),
        (CONV, ["model.patch_size=7"], "model.patch_size (7) must be 2, 4, 8, 16 or 32"),
        (CONV, ["model.patch_size=1"], "model.patch_size (1) must be 2, 4, 8, 16 or 32"),
        (CONV, ["model.patch_size=32", "model.dim=100"], "model.dim (100) must be divisible by 16"),
        (CONV, ["model.freeze_patch_projection=true"], "must be false for vit_conv, which is no plain ViT"),
        (RESNET, ["model.freeze_patch_projection=true"], "must be false for resnet50"),
        (RESNET, ["model.name=timm/convnext_tiny", "model.freeze_patch_projection=true"], "must be false for timm/"),
        (RESNET, ["model.patch_size=16"], "model.patch_size (16) must be null for resnet50"),
        (RESNET, ["model.name=timm/vit_base_patch16_224", "model.dim=8"], "model.dim (8) must be null for timm/"),
        (QUICK, ["train.warmup_epochs=30.5"], "train.warmup_epochs (30.5) must be at most train.epochs (30)"),
        (QUICK, ["data.source=torchvision"], "data.dataset (null) must be the name of a class of torchvision.datasets"),
        (QUICK, ["data.dataset=CIFAR10"], "data.dataset (CIFAR10) must be null under data.source shards"),
        (QUICK, ["data.dataset_options={a: 1}"], "data.dataset_options ({'a': 1}) must be {} under data.source shards"),
        (QUICK, ["augment.blur_sigma=[2, 1]"], "augment.blur_sigma ([2.0, 1.0]) must be a list of the smallest"),
        (QUICK, ["parallel.shard=replicate", "parallel.replicate=2"], "must be 1 under parallel.shard replicate"),
        (QUICK, ["parallel.shard=full", "parallel.replicate=2"], "must be 1 under parallel.shard full"),
    ],
)
def test_values_at_odds(path, overrides, words):
    assert words in complaint(*overrides, path=path)


def test_combinations_that_are_right():
    load(QUICK, ["train.warmup_epochs=30", "parallel.shard=hybrid", "parallel.replicate=4", "train.max_steps=1"])
    load(CONV, ["model.image_size=30"])
    load(RESNET, ["model.name=timm/vit_base_patch16_224.mae", "model.freeze_patch_projection=true"])
    assert recipes.shape(load(RESNET, ["model.name=timm/resnet18"]).model) is None
    own = load(QUICK, [*OWN_SHAPE, "model.name=vit_small", "model.image_size=224", "model.depth=3"])
    assert recipes.shape(own.model) == {"patch_size": 16, "dim": 384, "depth": 3, "heads": 12, "conv_stem": False}


def test_the_world_divides_the_batch_and_the_replicas_divide_the_world():
    recipe = load(QUICK, ["parallel.shard=hybrid", "parallel.replicate=2"])
    for world in (2, 4, 128):
        check_world(recipe, world)
    with pytest.raises(UserError, match=r"global_batch_size \(128\) must be divisible by .* \(6\).*batch_size=132"):
        check_world(recipe, 6)
    with pytest.raises(
        UserError, match=r"global_batch_size \(128\) must be divisible by the number of processes \(256\)"
    ):
        check_world(recipe, 256)
    with pytest.raises(UserError, match=r"parallel.replicate \(2\) must be a divisor of .* \(1\)"):
        check_world(recipe, 1)


# ---- round trip, identity, files -------------------------------------------------------------------------------------

# Printable: neither controls nor separators, but for the space. Built, not filtered: most random text has one.
texts = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=20)
fractions = st.floats(0, 1)
positives = st.floats(0, exclude_min=True, allow_infinity=False)
counts = st.integers(1, 2**63 - 1)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def any_recipe(draw):
    """A right recipe of open values: every section but the shapes is drawn."""
    base = load(QUICK)
    torchvision = draw(st.booleans())
    options = st.dictionaries(st.sampled_from(["train", "split", "_x"]), plain, max_size=3)
    epochs = draw(st.integers(1, 10**6))
    sigma = tuple(sorted((draw(positives), draw(positives))))
    pairs = st.tuples(fractions, fractions)
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return dataclasses.replace(
        base,
        run=tasks.Run(dir=draw(texts), seed=draw(st.integers(0, 2**63 - 1))),
        moco=tasks.Moco(temperature=draw(positives), momentum=draw(fractions)),
        optimizer=tasks.Optimizer(
            name=draw(st.sampled_from(["adamw", "lars"])), base_lr=draw(positives), weight_decay=draw(positives)
        ),
        train=tasks.Train(
            global_batch_size=draw(st.integers(2, 2**40)),
            epochs=epochs,
            warmup_epochs=draw(st.floats(0, epochs)),
            max_steps=draw(st.none() | counts),
        ),
        data=tasks.Data(
            source="torchvision" if torchvision else draw(st.sampled_from(["folder", "shards"])),
            root=draw(texts),
            val_root=draw(st.none() | texts),
            dataset=draw(texts) if torchvision else None,
            dataset_options=draw(options) if torchvision else {},
            workers=draw(st.integers(0, 99)),
            max_bad_fraction=draw(fractions),
        ),
        augment=dataclasses.replace(
            base.augment,
            crop_min=draw(st.floats(0, 1, exclude_min=True)),
            blur_sigma=sigma,
            blur_probability=draw(pairs),
            mean=draw(st.tuples(finite, finite, finite)),
            std=draw(st.tuples(positives, positives, positives)),
        ),
        checkpoint=tasks.Checkpoint(every_steps=draw(counts), keep=draw(counts)),
    )


@settings(deadline=None, max_examples=60)
@given(recipe=any_recipe())
def test_yaml_keeps_every_recipe(recipe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    again = load(path)
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe) and not differences(again, recipe)


def test_yaml_keeps_text_that_looks_like_something_else_or_holds_odd_characters():
    looks = [
        "1e-3",
        "1.5",
        "010",
        "12",
        "true",
        "null",
        "~",
        "",
        ".nan",
        "-.inf",
        "no",
        "1:30",
        "<<",
        "=",
        "*a",
        "&a",
        "!t",
    ]
    odd = ["\x85", "\u2028", "\ufeff", "\xe9", "a: b", "a #b", " a ", "a\nb", "\t", "'", '"', "\\", "-", "?", "x" * 300]
    data = {text: [text, {text: text}] for text in looks + odd}
    assert parse(unparse(data), "text") == data


@pytest.mark.parametrize("name", SHIPPED)
def test_yaml_keeps_shipped_recipes(name, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump(load(FOLDER / f"{name}.yaml")))
    assert load(tmp_path / "recipe.yaml") == load(FOLDER / f"{name}.yaml")


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_ends_in_anything_but_a_user_error(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "open.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    complaint(path=path)
    if isinstance(text, str):
        assert "\n" not in complaint(f"run.seed=x{text}")


def changed(value):
    """Another value of the same type: what a resume could meet."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(entry / 2 + 0.125 for entry in value)
    if isinstance(value, int | float):
        return value + 1
    return {"a": 1} if isinstance(value, dict) else f"other {value}"


@pytest.mark.parametrize("name", LABELLED)
def test_yaml_keeps_the_recipes_of_labelled_tasks_and_they_say_every_key(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    kind = Linear if "\ntask: linear\n" in text else Finetune
    recipe = load(FOLDER / f"{name}.yaml", kind=kind)
    assert loads(dump(recipe), "dump", kind=kind) == recipe
    for dotted in flatten(recipe):
        assert f"{dotted.rpartition('.')[2]}:" in text, dotted


def test_fingerprint_follows_exactly_the_keys_that_a_resume_may_not_change():
    recipe = load(QUICK)
    labelled = load(FOLDER / "finetune_quickstart.yaml", kind=Finetune)
    expected = {"run.dir", "data.root", "data.val_root", "data.workers", "train.max_steps"}
    assert flatten(recipe).keys() >= expected == FREE_KEYS
    sections = ("checkpoint.", "log.", "evaluate.", "parallel.")
    assert {f"{name}." for name in FREE_SECTIONS} == set(sections)
    for each in (recipe, labelled):
        free = {name for name in flatten(each) if is_free(name)}
        assert {name for name in flatten(each) if name.startswith(sections)} | expected == free
    for dotted, value in flatten(recipe).items():
        if dotted == "task":
            continue
        section, leaf = dotted.split(".")
        part = dataclasses.replace(getattr(recipe, section), **{leaf: changed(value)})
        other = dataclasses.replace(recipe, **{section: part})
        free = is_free(dotted)
        assert (fingerprint(other) == fingerprint(recipe)) is free, dotted
        named = [line.partition(" (")[0] for line in differences(recipe, other)]
        assert named == ([] if free else [dotted])


def test_differences_show_both_values():
    other = load(QUICK, ["train.epochs=40", "augment.blur_sigma=[1, 2]", "run.dir=elsewhere"])
    assert differences(load(QUICK), other) == [
        "train.epochs (30 -> 40)",
        "augment.blur_sigma ([0.1, 1.0] -> [1.0, 2.0])",
    ]


def test_fingerprint_sees_values_and_not_how_they_are_written():
    assert fingerprint(load(QUICK, ["train.warmup_epochs=3"])) == fingerprint(load(QUICK, ["train.warmup_epochs=3.0"]))
    assert len(fingerprint(load(QUICK))) == 64


def test_paths_are_looked_for_here_and_then_beside_the_recipe(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "recipes"
    (beside / "data").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    assert locate("data", beside / "r.yaml") == beside / "data"
    assert locate("none", beside / "r.yaml") == Path("none")
    assert locate(str(tmp_path), beside / "r.yaml") == tmp_path
    (here / "data").mkdir()
    assert locate("data", beside / "r.yaml") == Path("data")


def test_reading_a_recipe_imports_nothing_slow():
    check = "import engine.recipe.load, sys; assert not {'torch', 'timm', 'numpy', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=FOLDER.parent)
