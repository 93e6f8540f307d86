"""`auto` for workers, compile and precision: what it takes, what is said of it, what a resume keeps."""

import dataclasses
import json
import os

import pytest
import torch

from engine.recipe.describe import describe_keys
from engine.recipe.load import load
from engine.runs.auto import on_this_machine, settled
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL
from tests.recipe.shipped import shipped

AUTO = ["data.workers=auto", "parallel.compile=auto", "parallel.precision=auto"]


@pytest.fixture
def recipe(tmp_path):
    return lambda *more: load(
        RECIPE, [*SMALL, *AUTO, "model.dim=16", "model.heads=2", f"run.dir={tmp_path}", "train.max_steps=1", *more]
    )


@pytest.fixture
def cores(monkeypatch):
    return lambda number: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)))


def values(recipe) -> tuple:
    return recipe.data.workers, recipe.parallel.compile, recipe.parallel.precision


def test_it_suits_the_machine(recipe, world, cores, monkeypatch):
    for number, workers in ((1, 0), (2, 1), (4, 1), (16, 4), (128, 12)):
        cores(number)
        assert values(settled(recipe(), world)) == (workers, False, "float32")
    gpu = dataclasses.replace(world, device=torch.device("cuda"))
    for has_bf16, precision in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_bf16=has_bf16: has_bf16)
        for compiler, compiles in (("cc", True), ("no such compiler", False)):
            monkeypatch.setenv("CC", compiler)
            cores(10)
            assert values(settled(recipe(), gpu)) == (9, compiles, precision)


def test_values_that_are_given_stay(recipe, world):
    given = recipe("data.workers=3", "parallel.compile=true", "parallel.precision=float64")
    assert settled(given, world) == given
    for name in ("vit_l", "linear_vit", "finetune_vit_b", "resnet50_100ep"):
        assert settled(shipped(name), world) == shipped(name)
    assert settled(shipped("linear_vit", ["data.workers=auto"]), world).data.workers >= 0


def test_a_run_says_and_records_it_and_keeps_its_precision(recipe, world, tmp_path, cores, capfd):
    cores(2)
    pretrain(recipe(), RECIPE, world)
    assert "auto      workers 1, compile false, precision float32\n" in capfd.readouterr().out
    first, text = (tmp_path / "recipe.yaml").read_text().split("\n", 1)
    assert first.endswith("workers 1, compile false, precision float32, deterministic true")
    assert "  workers: auto\n" in text
    assert text.count("auto\n") == 3 + text.count("classes: auto\n")
    cores(1)
    for step, override, kept in ((2, "parallel.precision=bf16", ""), (3, "log.every_steps=1", ", precision bf16")):
        pretrain(recipe(f"train.max_steps={step}", override), RECIPE, world)
        said = capfd.readouterr().out
        assert f"auto      workers 0, compile false{kept}\n" in said
        assert "ranks     1 on CPU, bf16, " in said
    pretrain(recipe("train.max_steps=4"), RECIPE, world)  # of what the step before recorded
    made_by = json.loads((tmp_path / "checkpoints/step_0000004/MANIFEST.json").read_text())["state"]["made_by"]
    assert (made_by["workers"], made_by["compile"], made_by["precision"]) == ("0", "false", "bf16")


def test_what_suits_no_cpu_is_named(recipe, world, cores, monkeypatch):
    cores(2)
    published = shipped("vit_s")
    (line,) = on_this_machine(published, published, world)
    assert line.endswith("pass data.workers=auto parallel.compile=auto parallel.precision=auto")
    ours = recipe()
    (line,) = on_this_machine(ours, settled(ours, world), world)
    assert line == "auto      workers 1, compile false, precision float32"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    *_, line = on_this_machine(ours, settled(ours, world), world)
    assert line == "cpu       8 ranks share 2 cores and take turns: start fewer"
    gpu = dataclasses.replace(world, device=torch.device("cuda"))
    assert on_this_machine(published, published, gpu) == []


def test_keys_say_that_they_may_be_auto():
    keys = {key.name: key.must for key in describe_keys("pretrain")}
    assert keys["data.workers"] == "an integer >= 0 or auto"
    assert keys["parallel.compile"] == "true or false or auto"
    assert keys["parallel.precision"] == "one of bf16, float32, float64, auto"
    assert keys["evaluate.train_root"].endswith(", or a list of such or null")
