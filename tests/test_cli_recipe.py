"""What a command says stands in its recipe's place, and a percentage is read as it is written."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import run
from engine.cli import read_share, request
from engine.errors import UserError
from engine.recipe.sections import Linear

VIT = Path(__file__).parents[1] / "recipes/linear_vit.yaml"


def test_what_is_said_stands_for_the_recipes_and_an_override_for_both(tmp_path):
    (tmp_path / "train.tar").touch()
    said = {"data.root": str(tmp_path), "data.val_root": str(tmp_path / "true"), "run.dir": "12", "data.workers": None}
    recipe = request(Linear, VIT, said, ["train.epochs=3"])
    assert (recipe.data.root, recipe.data.val_root) == (str(tmp_path), str(tmp_path / "true"))
    assert recipe.data.source == "shards"
    assert (recipe.run.dir, recipe.train.epochs) == ("12", 3)
    assert recipe.data.workers == request(Linear, VIT, {}, []).data.workers
    assert request(Linear, VIT, said, ["run.dir=other"]).run.dir == "other"


def test_the_recipes_own_roots_are_found_beside_it(tmp_path, monkeypatch):
    (tmp_path / "recipes/images").mkdir(parents=True)
    file = tmp_path / "recipes/own.yaml"
    file.write_text(VIT.read_text().replace("data/imagenet/train", "images").replace("data/imagenet/val", "null"))
    monkeypatch.chdir(tmp_path)
    data = request(Linear, file, {}, []).data
    assert (data.root, data.val_root) == (str(tmp_path / "recipes/images"), None)


def test_several_roots_stand_for_the_recipes(tmp_path):
    said = {"data.root": (f"{tmp_path}/a, b", "c"), "data.val_root": "v"}
    assert request(Linear, VIT, said, []).data.root == (f"{tmp_path}/a, b", "c")


def test_a_torchvision_recipe_keeps_its_source_and_other_roots_are_looked_at(tmp_path):
    said = {"data.root": str(tmp_path), "data.val_root": str(tmp_path)}
    of_torchvision = ["data.source=torchvision", "data.dataset=CIFAR10"]
    assert request(Linear, VIT, said, of_torchvision).data.source == "torchvision"
    assert request(Linear, VIT, said | {"data.source": "shards"}, []).data.source == "shards"
    for key, missing, other in (("data.root", "--val", "--train"), ("data.val_root", "--train", "--val")):
        with pytest.raises(UserError, match=rf"^{missing} \(missing\) must be given with {other}; pass both"):
            request(Linear, VIT, {key: str(tmp_path)}, [])


def test_a_path_that_cannot_be_is_told_before_pytorch_is_loaded(capsys):
    for main in (partial(request, Linear, VIT, {}), lambda overrides: run.main(["quickstart", *overrides])):
        with pytest.raises(
            UserError, match=r"^run.dir \(~nobody-here/a\) must name a user that exists, unlike nobody-here"
        ):
            main(["run.dir=~nobody-here/a"])
    assert "PyTorch" not in capsys.readouterr().err


def test_the_launch_must_suit(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"^train.global_batch_size \(1024\) must be divisible"):
        request(Linear, VIT, {}, [])


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("10%", 0.1), ("0.1%", 0.001), ("100%", 1), ("100.0%", 1), (".5%", 0.005), ("7.%", 0.07)],
)
def test_percentages(text, share):
    assert read_share(text, "k") == share


@pytest.mark.parametrize(
    "text",
    [
        *("", "%", "1", "0.1", "0%", "0.0%", "101%", "100.1%", "-1%", "+1%", "nan%", "inf%", "1e400%", "1e0%", "1%%"),
        *(" 1%", "1%\n", "1 %", "1_0%", ".%", "1,5%", "\u0661%", "1\uff05", "ten%"),
        *("9" * 5000 + "%", "0." + "0" * 400 + "1%"),
    ],
)
def test_what_is_no_percentage_is_one_line(text):
    with pytest.raises(UserError) as error:
        read_share(text, "data.labels")
    assert str(error.value).startswith("data.labels (")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(") must be a percentage above 0% and up to 100%, such as 1%; pass data.labels=1%")


@given(st.text(max_size=12) | st.from_regex(r"[0-9.+e-]{0,8}%", fullmatch=True))
@settings(max_examples=200)
def test_any_text_is_a_share_or_one_line(text):
    complaint = ""
    try:
        assert 0 < read_share(text, "k") == float(text[:-1]) / 100 <= 1
    except UserError as error:
        complaint = str(error)
    assert len(complaint.splitlines()) <= 1


@given(st.floats(1e-6, 100).map(lambda x: round(x, 6)))
@settings(max_examples=100)
def test_any_percentage_up_to_a_hundred_is_read(value):
    assert read_share(f"{value:f}%", "k") == float(f"{value:f}") / 100
