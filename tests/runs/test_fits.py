"""Whether a step fits the GPUs, in words."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.data.splits import open_labelled_splits, open_splits
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs import run
from engine.runs.auto import settled
from engine.runs.finetune import Finetuning, make_classifiers
from engine.runs.fits import memory_in_words, memory_planned
from engine.runs.pretrain import Pretraining, make_moco, step_gib
from engine.runs.preview import preview
from engine.training.memory import GIB
from models.architecture import vit
from tests.recipe.shipped import FILES
from tests.runs.small import finetune_recipe, undrawn


@pytest.fixture
def gpus(world, monkeypatch):
    """A world of so many GPUs, each with so many GiB."""

    def make(count: int, gib: float):
        properties = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return replace(world, size=count, device=torch.device("cuda"))

    return make


BATCH = ["train.global_batch_size=1024", "parallel.precision=bf16"]


@pytest.mark.parametrize(
    ("name", "values", "ranks", "has", "passed"),
    [
        ("quickstart", BATCH, 1, 0.29, ["parallel.activation_checkpoint=full", "train.micro_batch_size=512"]),
        ("quickstart", BATCH, 1, 0.25, ["train.micro_batch_size=512"]),
        ("quickstart", BATCH, 1, 0.05, []),
        # A tenth of the GPU is for what is not counted.
        ("quickstart", BATCH, 1, 0.303, ["parallel.activation_checkpoint=selective", "train.micro_batch_size=512"]),
        # Odd batches have parts, too.
        ("quickstart", [*BATCH, "train.global_batch_size=1125"], 1, 0.25, ["train.micro_batch_size=375"]),
        ("resnet50_100ep", [], 4, 100, ["parallel.activation_checkpoint=selective"]),  # BatchNorm: no micro-batches
    ],
)
def test_what_does_not_fit_is_said_with_what_does(gpus, name, values, ranks, has, passed):
    (line,) = memory_in_words(load(FILES[name], values), gpus(ranks, has), step_gib)
    assert re.match(
        r"warning   a step takes [\d.]+ GiB, counted, and this GPU has room for [\d.]+ GiB of its [\d.]+ GiB: ", line
    )
    assert re.findall(r"pass (\S+) \([\d.]+ GiB\) or ", line) == passed
    (more,) = re.findall(r"start (\d+) processes \([\d.]+ GiB\)$", line)
    ways = [([override], ranks) for override in passed] + [([], int(more))]
    for overrides, number in ways:
        (line,) = memory_in_words(load(FILES[name], [*values, *overrides]), gpus(number, has), step_gib)
        assert re.fullmatch(r"memory    [\d.]+ GiB of this GPU's [\d.]+ GiB, counted", line)


def test_a_network_that_refuses_one_way_is_not_counted_for_less_of_it(gpus):
    """A network is made for each count, and one of timm's goes through a step for it."""
    counted = []

    def count(recipe, ranks):
        counted.append(ranks)
        return step_gib(recipe, ranks)

    (line,) = memory_in_words(load(FILES["resnet50_100ep"]), gpus(4, 20), count)
    assert re.search(r"of its 20 GiB: start 32 processes \([\d.]+ GiB\)$", line)
    # As it is; selective and full; micro-batches, refused for BatchNorm; then more ranks.
    assert counted == [4, 4, 4, 4, 8, 16, 32]


def test_more_processes_divide_the_batch_and_are_whole_nodes(gpus):
    """As many as there are now, several times."""
    recipe = load(FILES["quickstart"], ["train.global_batch_size=1125", "parallel.precision=bf16"])
    (line,) = memory_in_words(recipe, gpus(3, 0.05), step_gib)
    assert re.search(r"start (9|15|45|75|225|375|1125) processes", line)


def test_more_processes_than_micro_batches_see_their_images_at_once(gpus):
    values = ["train.global_batch_size=64", "train.micro_batch_size=32", "parallel.precision=bf16"]
    recipe = load(FILES["quickstart"], values)
    now, eight = step_gib(recipe, 1), step_gib(load(FILES["quickstart"], [*values, "train.micro_batch_size=null"]), 8)
    assert eight < now
    (line,) = memory_in_words(recipe, gpus(1, 1.01 * eight / 0.9), lambda r, ranks: step_gib(r, ranks) + (ranks < 8))
    assert line.endswith(f": start 8 processes and pass train.micro_batch_size=null ({eight:.1f} GiB)")


def test_as_many_ranks_as_images_are_told_of_no_more_of_them(gpus):
    recipe = load(FILES["quickstart"], ["train.global_batch_size=2", "parallel.precision=bf16"])
    assert memory_in_words(recipe, gpus(2, 0.001), step_gib)[0].endswith("GiB: take larger GPUs")


def test_the_first_of_several_ranks_says_it_and_none_without_a_gpu(gpus, world):
    recipe = load(FILES["vit_s"])
    assert memory_in_words(recipe, world, step_gib) == []
    assert memory_in_words(recipe, replace(gpus(8, 79), rank=1), step_gib) == []
    assert len(memory_in_words(recipe, gpus(8, 79), step_gib)) == 1


def test_counting_leaves_the_process_as_it_is(gpus):
    """So that a run makes the same bits with it and without."""

    def now() -> tuple:
        drawn = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return *drawn, torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()

    before, recipe = now(), load(FILES["resnet50_100ep"], ["model.name=timm/resnet18", "model.image_size=64"])
    assert memory_in_words(recipe, gpus(4, 79), step_gib)[0].endswith("of this GPU's 79 GiB, counted")
    assert now() == before


def test_what_cannot_be_counted_ends_no_run(gpus):
    def refuse(recipe, gpus):
        raise UserError("it has data of its own")

    recipe, said = load(FILES["vit_s"]), ["memory    not counted: it has data of its own"]
    assert memory_in_words(recipe, gpus(1, 79), refuse) == memory_planned(recipe, 1, refuse) == said


def test_a_run_that_is_not_started_is_counted_for_numbers_of_gpus():
    """What the recipe leaves to the machine is a GPU's."""
    recipe = load(FILES["own_photos"])
    on_gpu = load(FILES["own_photos"], ["parallel.precision=bf16", "parallel.compile=true"])
    one, four, eight = (step_gib(on_gpu, gpus) for gpus in (1, 4, 8))
    words = "memory    of each GPU, counted: "
    assert memory_planned(recipe, 1, step_gib) == [f"{words}{one:.0f} GiB on 1, {eight:.1f} GiB on 8"]
    assert memory_planned(recipe, 4, step_gib) == [f"{words}{four:.1f} GiB on 4"]
    odd = load(FILES["own_photos"], ["train.global_batch_size=510"])
    assert re.fullmatch(rf"{words}\d+ GiB on 1", memory_planned(odd, 1, step_gib)[0])


def test_pretraining_and_finetuning_say_it_when_they_begin(gpus, world, tmp_path):
    recipe = load(FILES["quickstart"], ["parallel.precision=bf16"])
    splits = open_splits(recipe.data, FILES["quickstart"], world, batch=128)
    tasks = [Pretraining(recipe, FILES["quickstart"], world, splits, splits, make_moco(recipe))]
    recipe = finetune_recipe(tmp_path)
    splits = open_labelled_splits(recipe.data, world, seed=0, batch=100)
    weights = undrawn(vit(32, 8, 64, 2, 4, conv_stem=False), 32)
    networks = make_classifiers(recipe, weights, len(splits.train.classes))
    tasks.append(Finetuning(recipe, world, splits, weights, *networks))
    for task in tasks:
        task.world = gpus(1, 1)
        said = f"memory    {task_gib(task):.1f} GiB of this GPU's 1.0 GiB, counted"
        assert said in task.memory()
        task.world = gpus(1, 0.01)
        assert any(line.startswith("warning   a step takes ") for line in task.memory())


def test_it_is_said_of_a_run_that_begins_and_not_twice_of_one_that_does_not(world, monkeypatch, capsys):
    """`--print` counts for the GPUs of the run, which are not those of its own process."""
    recipe = load(FILES["quickstart"])
    splits = open_splits(recipe.data, FILES["quickstart"], world, batch=128)
    task = Pretraining(settled(recipe, world), FILES["quickstart"], world, splits, splits, make_moco(recipe))
    monkeypatch.setattr(Pretraining, "memory", lambda task: ["memory    of this GPU"])
    run._say_opening(task)
    assert capsys.readouterr().out.count("memory    of this GPU") == 1
    text = preview(recipe, FILES["quickstart"], world, 2)
    assert text.count("# memory    of each GPU, counted: ") == text.count("# memory") == 1


def task_gib(task: Pretraining | Finetuning) -> float:
    return (step_gib if isinstance(task, Pretraining) else task.step_gib)(task.recipe, 1)
