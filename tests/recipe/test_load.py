"""Keys, overrides, types, ranges and combinations: what a recipe refuses, and in which words."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import UserError, one_line
from engine.recipe import load as recipes
from engine.recipe.describe import describe_keys
from engine.recipe.identity import fingerprint, flatten, is_free
from engine.recipe.load import check_world, dump, load, loads, locate, located
from engine.recipe.paths import check_paths, expand
from engine.recipe.plain import unparse
from engine.recipe.sections import RECIPES, SCHEMA, Recipe
from tests.recipe.shipped import CONV, FOLDER, QUICK, RESNET, complaint, shipped

# ---- which keys there are --------------------------------------------------------------------------------------------

REQUIRED = {
    "pretrain": """
        run.dir model.name model.freeze_patch_projection moco.temperature moco.momentum
        optimizer.name optimizer.base_lr optimizer.weight_decay
        train.global_batch_size train.epochs train.warmup_epochs data.source data.root data.workers augment.crop_min
        parallel.compile parallel.precision
    """,
    "linear": """
        run.dir optimizer.base_lr train.global_batch_size train.epochs data.source data.root data.workers
        augment.crop_min
    """,
    "finetune": """
        run.dir optimizer.base_lr optimizer.weight_decay train.global_batch_size train.epochs train.warmup_epochs
        data.source data.root data.workers augment.crop_min parallel.compile parallel.precision
    """,
}
EXAMPLES = {"pretrain": "resnet50_100ep", "linear": "linear_vit", "finetune": "finetune_vit_b"}


def text_of(recipe: Recipe, names: Iterable[str]) -> str:
    """YAML of some of a recipe's keys."""
    raw = {"schema": recipe.schema, "task": recipe.task}
    for section, leaf in (name.split(".") for name in names):
        raw.setdefault(section, {})[leaf] = getattr(getattr(recipe, section), leaf)
    return unparse(raw)


@pytest.mark.parametrize("task", RECIPES)
def test_every_key_without_a_default_is_missed_by_its_name(task):
    recipe, required = shipped(EXAMPLES[task]), set(REQUIRED[task].split())
    for missing in required:
        with pytest.raises(UserError) as caught:
            loads(text_of(recipe, required - {missing}), "text", kind=type(recipe))
        found = str(caught.value)
        assert found.startswith(f"{missing} (missing) must be ")
        assert found.endswith(f"or pass {missing}=VALUE")


@pytest.mark.parametrize("task", RECIPES)
def test_a_key_left_out_and_its_default_written_out_are_the_same(task):
    recipe, docs = shipped(EXAMPLES[task]), describe_keys(task)
    short = text_of(recipe, REQUIRED[task].split())
    left_out = loads(short, "text", kind=type(recipe))
    defaults = [f"{key.name}={key.default}" for key in docs if key.default is not None]
    for same in (loads(short, "text", defaults, type(recipe)), loads(dump(left_out), "dump", kind=type(recipe))):
        assert repr(flatten(same) | {"schema": SCHEMA}) == repr(flatten(left_out))  # not even 1 for 1.0
        assert fingerprint(same) == fingerprint(left_out)


@pytest.mark.parametrize("task", RECIPES)
def test_every_key_is_described(task):
    docs = describe_keys(task)
    assert [key.name for key in docs] == list(flatten(shipped(EXAMPLES[task])))
    for key in docs:
        assert len(key.meaning) > 5, key
        assert key.meaning == one_line(key.meaning).rstrip("."), key
        assert key.is_free is is_free(key.name)
    assert {key.name for key in docs if key.default is None} == {"task", *REQUIRED[task].split()}
    assert ("train.max_steps", "an integer >= 1 or null", "null") in [key[:3] for key in docs]
    assert ("augment.flip_probability", "a finite number from 0 to 1", "0.5") in [key[:3] for key in docs]


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
        (
            "task=linear",
            "pass a recipe of that task, or this one to `mocov3 evaluate linear CHECKPOINT --recipe RECIPE`",
        ),
        ("model.name=vit_smal", "or timm/<name>; did you mean vit_small?"),
        ("model.name=resnet5", "or timm/<name>; did you mean resnet50?"),
        ("model.name=vit_tiny", "or timm/<name>; did you mean timm/vit_tiny_patch16_224?"),
        ("model.name=resnet18", "or timm/<name>; did you mean timm/resnet18?"),
        ("model.name=vit_b", "or timm/<name>; did you mean vit_base?"),
        ("model.name=tiny_vit", "or timm/<name>; change the recipe or pass model.name=VALUE"),
        ("data.root=", "or a list of such; `data.root=` alone says null too: pass data.root=VALUE"),
    ],
)
def test_refused_override(override, words):
    assert words in complaint(override)


def test_overrides_reach_every_depth_and_the_last_holds():
    overrides = ["data.source=torchvision", "data.dataset=CIFAR10", "data.dataset_options.train=true"]
    recipe = load(QUICK, [*overrides, "train.max_steps=1", "train.max_steps=7", "data.val_root="])
    assert recipe.data.dataset_options == {"train": True}
    assert recipe.train.max_steps == 7
    assert recipe.data.val_root is None
    assert load(QUICK, ["augment.blur_sigma=[1, 2]"]).augment.blur_sigma == (1.0, 2.0)
    assert load(QUICK, ["run.dir=a=b"]).run.dir == "a=b"


# ---- types and ranges ------------------------------------------------------------------------------------------------

INTEGER = ["ten", "1.5", "true", "null", "[1]", "{a: 1}", "99999999999999999999", "-1"]
NUMBER = ["much", "true", "null", "[1]", ".nan", ".inf", "1e999", "1" + "0" * 400]
WRONG = {
    "run.timeout_minutes": [*NUMBER, "0", "-5", "1e10", "5 minutes"],
    "run.dir": ["null", "''", "[a, b]", '"a\\nb"', '"a\\0b"'],
    "run.continue_from": ["[]", "''"],
    "run.seed": INTEGER,
    "model.weights": ["[]", "''", "[a, b]"],
    "model.name": ["tiny_vit", "timm/", "3", "timm/a b", "timm/../x"],
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
    "train.micro_batch_size": ["0", "ten", "1.5"],
    "train.on_spike": ["stop", "1", "true"],
    "data.source": ["zip", "null"],
    "data.root": ["null", "''", "\n", "[]", "[a, 3]", "[[a]]", "[a, '']"],
    "data.val_root": ["a\tb", "''", "[null]"],
    "data.dataset": ["3", "''"],
    "data.dataset_options": ["3", "null", "[1]", "{a: .nan}", "{a: [{b: 1e999}]}", "{a b: 1}"],
    "data.workers": [*INTEGER, "Auto", "automatic"],
    "data.classes": ["folder", "null", "true"],
    "data.accept_changes": ["1", "yes", "null"],
    "data.exif_orientation": ["1", "yes", "null"],
    "data.max_pixels": ["0", "-1", "1.5", "many", "true"],
    "data.range": ["1", "[0]", "[0, 1, 2]", "[0, x]", "[0, .inf]", "[1, 1]", "[2, 1]"],
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
    "checkpoint.keep_every_epochs": ["much", "true", ".nan", "0", "-1"],
    "checkpoint.asynchronous": ["1", "yes", "null"],
    "checkpoint.max_failures": ["0", "-1", "1.5", "null"],
    "evaluate.train_root": ["''", "[]"],
    "evaluate.val_root": ["''", "[null]"],
    "evaluate.knn_bank": ["0", "ten", "1.5"],
    "evaluate.crop_fraction": [*NUMBER, "0", "1e-9", "1.1"],
    "evaluate.online_probe": ["1", "yes", "null"],
    "parallel.compile": ["1", "yes", "null", "Auto"],
    "parallel.precision": ["fp16", "32"],
    "parallel.shard": ["none", "1"],
    "parallel.replicate": [*INTEGER, "0"],
    "parallel.deterministic": ["1", "yes", "null"],
    "parallel.activation_checkpoint": ["true", "half", "null"],
}
WRONG |= {f"augment.{name}": [*NUMBER, "-0.1"] for name in ("brightness", "contrast", "saturation")}
WRONG |= {f"augment.{name}_probability": [*NUMBER, "-0.1", "1.1"] for name in ("jitter", "grayscale", "flip")}


def test_one_root_of_labelled_images_needs_the_other():
    for one, other in (("train_root", "val_root"), ("val_root", "train_root")):
        assert f"evaluate.{other} (null) must be given with evaluate.{one}; " in complaint(f"evaluate.{one}=labelled")


def test_every_key_refuses_what_it_cannot_be():
    assert set(WRONG) == set(flatten(load(QUICK))) - {"schema", "task"}
    for dotted, values in WRONG.items():
        for value in values:
            found = complaint(f"{dotted}={value}")
            assert found.startswith(f"{dotted} ("), found
            assert ") must be " in found, found
            assert f"pass {dotted}=VALUE" in found, found
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
    assert "wide_resnet101_2 or timm/<name>" in complaint("model.name=vit_tiny")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs='3'", "train.epochs ('3') must be an integer >= 1;"),
        ("train.epochs=3\u00a0", r"train.epochs ('3\xa0') must be an integer >= 1;"),
        ("train.max_steps='null'", "train.max_steps ('null') must be an integer >= 1 or null;"),
        ("parallel.compile='true'", "parallel.compile ('true') must be true or false"),
        ("augment.blur_sigma='[0.1, 2]'", "augment.blur_sigma ('[0.1, 2]') must be a list of 2"),
        ("optimizer.name='adamw '", "optimizer.name ('adamw ') must be one of adamw, lars"),
        ("model.name='vit_small '", "model.name ('vit_small ') must be"),
        (f"train.epochs={10**22}", f"train.epochs ({10**22}) must be an integer >= 1, and below 2**63;"),
        (f"train.max_steps={2**63}", f"train.max_steps ({2**63}) must be an integer >= 1 or null, and below 2**63;"),
        (f"run.seed={-(10**22)}", f"run.seed ({-(10**22)}) must be an integer >= 0;"),
        (f"augment.hue={10**400}", "must be a finite number from 0 to 0.5, and below 2**1023;"),
    ],
)
def test_what_is_shown_is_not_what_is_asked_for(override, words):
    assert words in complaint(override)


# ---- combinations ----------------------------------------------------------------------------------------------------

OWN_SHAPE = [f"model.{name}=null" for name in recipes.VIT_KEYS]


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
        (CONV, ["model.name=resnet50"], f"must be null for resnet50, whose shape is fixed; pass {' '.join(OWN_SHAPE)}"),
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


def test_the_micro_batch_divides_the_images_of_a_process():
    recipe = load(QUICK, ["train.micro_batch_size=32"])
    for world in (1, 2, 4):
        check_world(recipe, world)
    for world, size, fits in ((8, 32, 16), (4, 12, 8)):
        words = (
            rf"train.micro_batch_size \({size}\) must be a divisor of .* \({128 // world}\); pass .*={fits}, or null"
        )
        with pytest.raises(UserError, match=words):
            check_world(load(QUICK, [f"train.micro_batch_size={size}"]), world)


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


TYPED = [
    "/data/my set #2",
    "~/runs/a",
    "3",
    "true",
    "a: b",
    "- x",
    " a ",
    "a'b",
    "#",
    "&x",
    "*x",
    "!x",
    "{a}",
    "$A/b",
    "\u00e9",
]


@pytest.mark.parametrize("key", ["run.dir", "run.continue_from", "model.weights", "data.root", "data.val_root"])
def test_a_path_on_the_command_line_is_what_was_typed_and_stays_so_in_the_recipe(key):
    section, name = key.split(".")
    for text in TYPED:
        recipe = load(QUICK, [f"{key}={text}"])
        assert getattr(getattr(recipe, section), name) == text
        assert loads(dump(recipe), "dumped") == recipe
    for text, value in {'"a #b"': "a #b", "'3'": "3", "null": None}.items():
        if value is not None or key in ("run.continue_from", "model.weights", "data.val_root"):
            assert getattr(getattr(load(QUICK, [f"{key}={text}"]), section), name) == value


def test_several_roots_are_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(QUICK, ["data.root=[$DATA/a, 'b #2', '3']", "data.val_root=[v]"])
    assert (recipe.data.root, recipe.data.val_root) == (("$DATA/a", "b #2", "3"), ("v",))
    assert loads(dump(recipe), "dumped") == recipe
    monkeypatch.setenv("DATA", "/data")
    assert located(recipe, QUICK).data.root == ("$DATA/a", f"{tmp_path}/b #2", f"{tmp_path}/3")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_any_path_is_what_was_typed(text):
    assume(text != "null" and not (text[0] + text[-1] in ("[]", "''", '""') and len(text) > 1))
    assert load(QUICK, [f"data.root={text}"]).data.root == text


def test_home_and_variables_are_expanded_where_a_path_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    monkeypatch.setenv("SCRATCH", f"{tmp_path}/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("~/a") == tmp_path / "home/a"
    assert expand("$SCRATCH/a") == expand("${SCRATCH}/a") == locate("$SCRATCH/a", "r.yaml") == tmp_path / "scratch/a"
    assert expand("a~/b") == Path("a~/b")
    for path, unknown in {
        "$NOWHERE/a": r"variables that are set; set \$NOWHERE, or",
        "a/${NOWHERE}": r"variables that are set; set \$\{NOWHERE\}, or",
        "~nobody-here/a": "a user that exists, unlike nobody-here;",
    }.items():
        for key in ("run.dir", "data.root", "evaluate.train_root"):
            both = [f"{key}={path}", *(["evaluate.val_root=b"] if key.startswith("evaluate") else [])]
            with pytest.raises(UserError) as caught:
                check_paths(load(QUICK, both))
            assert re.match(rf"{key} \(.*\) must name {unknown} write the path out", str(caught.value))
    (tmp_path / "$NOWHERE/a").mkdir(parents=True)
    (tmp_path / "~/a").mkdir(parents=True)
    assert (expand("$NOWHERE/a"), expand("~/a")) == (Path("$NOWHERE/a"), Path("~/a")), "a run of a former version"
    there = located(load(QUICK, ["data.root=$SCRATCH/a", "data.val_root=b"]), QUICK).data
    assert (there.root, there.val_root) == ("$SCRATCH/a", f"{tmp_path}/b")


def test_a_run_directory_that_can_be_none_is_told_from_one_that_is_new(tmp_path):
    (tmp_path / "file").touch()
    for name, why in (("a" * 300, "File name too long"), ("file/run", "Not a directory")):
        with pytest.raises(UserError, match=rf"^run.dir \(.*\) must be the path of a folder: {why}; "):
            check_paths(load(QUICK, [f"run.dir={tmp_path / name}"]))
    check_paths(load(QUICK, [f"run.dir={tmp_path}/new/run"]))


def test_reading_a_recipe_imports_nothing_slow():
    slow = {"torch", "timm", "numpy", "torchvision"}
    check = f"import sys, engine.recipe.load, engine.recipe.describe; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=FOLDER.parent)


def test_a_tab_that_indents_is_named(tmp_path):
    (tmp_path / "tab.yaml").write_text("run:\n\tdir: x\n")
    assert complaint(path=tmp_path / "tab.yaml").endswith("found on line 2: a tab; indent with spaces")
