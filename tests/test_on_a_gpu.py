"""What one GPU is asked to show fits it, and no check's words end those after it."""

import json

import pytest

from engine.recipe.load import load
from engine.runs.pretrain import make_moco
from engine.training.memory import GIB, memory_of
from tests.on_a_gpu import last_object, of_speed
from tests.recipe.shipped import FILES

WORDS = {name: words for name, _, words in of_speed(tiny=False) if "--recipe" in words and "--vs" not in words}


@pytest.mark.parametrize("name", WORDS)
def test_a_step_fits_a_gpu_of_80_gb(name):
    words = WORDS[name]
    batch = [f"train.global_batch_size={words[words.index('--batch') + 1]}"] if "--batch" in words else []
    recipe = load(FILES[words[words.index("--recipe") + 1]], [*batch, *(word for word in words if "=" in word)])
    assert memory_of(recipe, make_moco(recipe), 1).gib < 0.9 * 80e9 / GIB


def test_words_in_braces_are_no_result():
    assert last_object([json.dumps({"mfu": 0.5}), "{'cache': 3}", "{"]) == {"mfu": 0.5}
    assert last_object(["{", "done"]) is None
