"""What a checkpoint says of its run: written and read in one place, earlier forms too."""

import json
from pathlib import Path

import pytest

from engine.checkpoint.manifest import Damaged, Manifest
from engine.checkpoint.state import RunState

CHECKPOINT = Path("runs/mine/checkpoints/step_0000004")
BASIS = {"step": 4, "recipe": "task: pretrain", "bad_images": 1}


def read(state: dict) -> RunState:
    return RunState.read(CHECKPOINT, Manifest(4, 1, "", files={}, tensors={}, state=state))


def test_what_is_written_is_read():
    state = RunState(
        *(4, "task: pretrain", {"train": "a", "val": "b"}, {"train": {"3": "d"}}),
        *(1, "CC0-1.0", "e", "c", "{}", {"torch": "2", "ranks": "8"}),
        order="permuted",
        decoder="simplejpeg 1.9.0",
    )
    assert read(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    ("former", "images"),
    [
        ({"data": "a", "licence": None}, {"train": "a"}),  # pre-training
        ({"data": None, "licence": "CC0-1.0"}, {}),  # imported weights have seen no images
        ({"train": "a", "val": "b", "network": "c"}, {"train": "a", "val": "b"}),  # linear, fine-tuning
    ],
)
def test_earlier_forms_are_read(former, images):
    state = read(BASIS | former)
    assert (state.step, state.recipe, state.bad_images, state.images) == (4, "task: pretrain", 1, images)
    assert (state.licence, state.network) == (former.get("licence"), former.get("network"))
    assert state.image_rules == 1
    assert state.order == "sorted"
    assert state.decoder == "pillow"


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": "4"},
        {"step": True},
        {"image_rules": "2"},
        {"recipe": None},
        {"order": None},
        {"decoder": None},
        {"images": ["a"]},
        {"images": {"train": 1}},
        {"network": 7},
        {"about": []},
        {"made_by": "me"},
    ],
)
def test_anything_else_is_a_damaged_checkpoint(wrong):
    with pytest.raises(Damaged, match="its state is not the state of a run") as caught:
        read(BASIS | {"images": {}} | wrong)
    assert "\n" not in str(caught.value)


def test_a_state_without_a_recipe_is_a_damaged_checkpoint():
    with pytest.raises(Damaged, match="its state is not the state of a run"):
        read({"step": 4})
