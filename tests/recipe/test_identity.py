"""Which recipes are one run: round trips, fingerprints, and keys that come with a later schema."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.recipe import identity, sections
from engine.recipe.identity import FREE_KEYS, FREE_SECTIONS, fingerprint, flatten, is_free, resume_differences
from engine.recipe.keys import key
from engine.recipe.load import dump, load, loads, task_of
from engine.recipe.sections import RECIPES, SCHEMA, Pretrain, Train
from tests.recipe.shipped import QUICK, complaint, shipped

# ---- round trip and fingerprint --------------------------------------------------------------------------------------

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


paths = texts | st.lists(texts, min_size=1, max_size=3).map(tuple)


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
        run=sections.PretrainRun(
            dir=draw(texts), seed=draw(st.integers(0, 2**63 - 1)), continue_from=draw(st.none() | texts)
        ),
        moco=sections.Moco(temperature=draw(positives), momentum=draw(fractions)),
        optimizer=sections.Optimizer(
            name=draw(st.sampled_from(["adamw", "lars"])), base_lr=draw(positives), weight_decay=draw(positives)
        ),
        train=sections.Train(
            global_batch_size=draw(st.integers(2, 2**40)),
            epochs=epochs,
            warmup_epochs=draw(st.floats(0, epochs)),
            max_steps=draw(st.none() | counts),
            micro_batch_size=draw(st.none() | counts),
            on_spike=draw(st.sampled_from([None, "warn"])),
        ),
        data=sections.PretrainData(
            source="torchvision" if torchvision else draw(st.sampled_from(["folder", "shards"])),
            root=draw(paths),
            val_root=draw(st.none() | paths),
            dataset=draw(texts) if torchvision else None,
            dataset_options=draw(options) if torchvision else {},
            workers=draw(st.integers(0, 99) | st.just("auto")),
            max_bad_fraction=draw(fractions),
            classes=draw(st.sampled_from(["auto", "folders", "none"])),
        ),
        augment=dataclasses.replace(
            base.augment,
            crop_min=draw(st.floats(0, 1, exclude_min=True)),
            blur_sigma=sigma,
            blur_probability=draw(pairs),
            mean=draw(st.tuples(finite, finite, finite)),
            std=draw(st.tuples(positives, positives, positives)),
        ),
        checkpoint=sections.Checkpoint(every_steps=draw(counts), keep=draw(counts)),
    )


@settings(max_examples=60)
@given(recipe=any_recipe())
def test_yaml_keeps_every_recipe(recipe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    again = load(path)
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)
    assert not resume_differences(again, recipe)


def changed(value):
    """Another value of the same type: what a resume could meet."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(entry / 2 + 0.125 for entry in value)
    if isinstance(value, int | float):
        return value + 1
    return {"a": 1} if isinstance(value, dict) else f"other {value}"


def test_fingerprint_follows_exactly_the_keys_that_a_resume_may_not_change():
    recipe = load(QUICK)
    labelled = shipped("finetune_quickstart")
    expected = {"schema", "run.dir", "data.root", "data.val_root", "data.workers", "train.max_steps"}
    expected |= {"train.micro_batch_size", "train.on_spike", "run.timeout_minutes", "data.max_bad_fraction"}
    expected |= {"data.classes", "data.accept_changes"}
    assert flatten(recipe).keys() >= expected == FREE_KEYS
    sections = ("checkpoint.", "log.", "evaluate.", "parallel.")
    assert {f"{name}." for name in FREE_SECTIONS} == set(sections)
    for each in (recipe, labelled):
        free = {name for name in flatten(each) if is_free(name)}
        assert {name for name in flatten(each) if name.startswith(sections)} | (expected & flatten(each).keys()) == free
    for dotted, value in flatten(recipe).items():
        if dotted in ("schema", "task"):
            continue
        section, leaf = dotted.split(".")
        part = dataclasses.replace(getattr(recipe, section), **{leaf: changed(value)})
        other = dataclasses.replace(recipe, **{section: part})
        free = is_free(dotted)
        assert (fingerprint(other) == fingerprint(recipe)) is free, dotted
        named = [line.partition(" (")[0] for line in resume_differences(recipe, other)]
        assert named == ([] if free else [dotted])


def test_differences_show_both_values():
    other = load(QUICK, ["train.epochs=40", "augment.blur_sigma=[1, 2]", "run.dir=elsewhere"])
    assert resume_differences(load(QUICK), other) == [
        "train.epochs (30 -> 40)",
        "augment.blur_sigma ([0.1, 1.0] -> [1.0, 2.0])",
    ]


def test_fingerprint_sees_values_and_not_how_they_are_written():
    assert fingerprint(load(QUICK, ["train.warmup_epochs=3"])) == fingerprint(load(QUICK, ["train.warmup_epochs=3.0"]))
    assert len(fingerprint(load(QUICK))) == 64


# ---- schemas ---------------------------------------------------------------------------------------------------------

FORMER = sorted((Path(__file__).parents[1] / "runs/former").glob("*/checkpoints/*/MANIFEST.json"))


@pytest.mark.parametrize("manifest", FORMER, ids=lambda path: path.parents[2].name)
def test_recipes_of_former_checkpoints_keep_their_fingerprint(manifest, monkeypatch):
    """But for a key that a resume may change since."""
    monkeypatch.setattr(identity, "FREE_KEYS", FREE_KEYS - {"data.max_bad_fraction"})
    saved = json.loads(manifest.read_text())
    text = saved["state"]["recipe"]
    recipe = loads(text, "recipe", kind=RECIPES[task_of(text)])
    assert recipe.schema == 1
    assert fingerprint(recipe) == saved["recipe_sha256"]
    now = loads(f"schema: {SCHEMA}\n{text}", "recipe", kind=type(recipe))
    assert fingerprint(now) == fingerprint(recipe)
    assert not resume_differences(recipe, now)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterTrain(Train):
    slices: int | None = key("pieces of a batch", since=2, before=None, default=4)
    rise: float = key("a key that has no default", since=2, before=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra:
    shift: tuple[int, int] = key("a key of a section that schema 1 lacks", since=2, before=(0, 0), default=(0, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Later(Pretrain):
    """Pre-training as it may look once schema 2 has gained keys."""

    train: LaterTrain
    extra: Extra


BEFORE = load(QUICK)
OLD = dump(BEFORE).replace(f"schema: {SCHEMA}\n", "")
NEW = f"schema: 2\n{OLD}"


@pytest.fixture
def later(monkeypatch):
    monkeypatch.setitem(RECIPES, "pretrain", Later)
    return lambda text, *overrides: loads(text, "recipe", overrides, Later)


def test_a_key_that_an_older_recipe_lacks_has_the_value_from_before_it(later):
    recipe = later(OLD)
    assert (recipe.schema, recipe.train.slices, recipe.train.rise, recipe.extra.shift) == (1, None, 0.5, (0, 0))
    assert fingerprint(recipe) == fingerprint(BEFORE)
    assert later(dump(recipe)) == recipe


def test_a_newer_recipe_has_the_default_and_must_say_what_has_none(later):
    with pytest.raises(UserError, match=r"train.rise \(missing\) must be a finite number"):
        later(NEW)
    recipe = later(NEW, "train.rise=0.5")
    assert (recipe.schema, recipe.train.slices, recipe.extra.shift) == (2, 4, (0, 0))
    assert fingerprint(recipe) != fingerprint(later(OLD))
    assert resume_differences(later(OLD), recipe) == ["train.slices (null -> 4)"]
    assert later(dump(recipe)) == recipe


def test_a_later_key_counts_only_where_it_differs_from_what_ran_before_it(later):
    same = later(NEW, "train.rise=0.5", "train.slices=null", "extra.shift=[0, 0]")
    assert fingerprint(same) == fingerprint(later(OLD))
    assert not resume_differences(later(OLD), same)
    for override in ("train.slices=4", "train.rise=1", "extra.shift=[0, 1]"):
        other = later(OLD, override)
        assert fingerprint(other) != fingerprint(same)
        assert len(resume_differences(same, other)) == 1


@pytest.mark.parametrize("schema", ["0", str(SCHEMA + 1), "two", "1.5", "true", "null", "[1]", "9" * 30])
def test_a_schema_that_is_not_known_is_refused(schema):
    found = complaint(f"schema={schema}", "some.later.key=1")
    assert found.startswith("schema (")
    assert f"must be an integer from 1 to {SCHEMA}" in found
    assert "update" in found
