"""The shipped recipes fit the GPUs that they name, by what is counted."""

import re

import pytest

from engine.evaluation.memory import memory_of_linear
from engine.recipe.load import load
from engine.runs.finetune import make_classifiers
from engine.runs.pretrain import make_moco
from engine.training.memory import GIB, memory_of, memory_of_finetuning
from models.architecture import Architecture, of_name
from models.shapes import vit_shape
from tests.recipe.shipped import FILES, TASK, shipped
from tests.runs.small import undrawn

ON_ANY_MACHINE = {"quickstart", "quickstart_conv", "own_photos_small", "finetune_quickstart"}
FITS = re.compile(r"^# Fits (\d+) GPUs? of (\d+) GB: (\d+) GiB each(?: with (\S+))?, counted, not measured\.$", re.M)
NETWORKS = {"ViT-S/16": "vit_small", "ViT-B/16": "vit_base", "ViT-L/16": "vit_large", "ViT-H/14": "vit_huge"}
IMAGENET = 224, 1000  # pixels and classes


def counted(name: str, network: str, gpus: int) -> float:
    """GiB on each GPU, on ImageNet."""
    if TASK[name] == "pretrain":
        recipe = load(FILES[name], ["parallel.compile=true", "parallel.precision=bf16"])
        return memory_of(recipe, make_moco(recipe), gpus).gib
    recipe, (size, classes), architecture = shipped(name), IMAGENET, of_words(network)
    if TASK[name] == "linear":
        return memory_of_linear(recipe, architecture, size, classes, gpus).gib
    networks = make_classifiers(recipe, undrawn(architecture, size), classes)
    return memory_of_finetuning(recipe, *networks, size, gpus).gib


def of_words(network: str) -> Architecture:
    name = NETWORKS.get(network, network)
    return of_name(name, IMAGENET[0], vit_shape(name))


@pytest.mark.parametrize("name", sorted(FILES.keys() - ON_ANY_MACHINE))
def test_a_recipe_fits_the_gpus_that_it_names(name):
    """As many as its command starts, where that says a number."""
    header = FILES[name].read_text().partition("\ntask:")[0]
    lines = FITS.findall(header)
    assert lines
    for gpus, card, said, network in lines:
        found = counted(name, network, int(gpus))
        assert round(found) == int(said), found
        assert found < 0.9 * int(card) * 1e9 / GIB
        assert (network == "") == (TASK[name] == "pretrain")
        nodes, each = (re.search(rf"--{word} (\d+)", header) for word in ("nnodes", "nproc-per-node"))
        assert each is None or int(gpus) == int(each[1]) * int(nodes[1] if nodes else 1)
