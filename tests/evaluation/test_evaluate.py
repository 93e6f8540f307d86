"""`python -m engine.evaluate`: its results, and its one line for every mistake, before any computing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from engine import evaluate
from engine.data.opening import open_source
from engine.data.source import Root
from engine.errors import RunFailed, UserError
from engine.evaluation import subject
from engine.run import main as run_main
from tests.data.images import thinned

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(ROOT / "tests/golden/I_vit_small_shape.pth.tar")
DATA = ROOT / "recipes/data/fashion_mnist"
VIT = str(ROOT / "recipes/linear_vit.yaml")
FINETUNE = str(ROOT / "recipes/finetune_quickstart.yaml")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """train: classes dark and light, 12 images each; val: 4 each; other, flat, one: what is refused."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    counts = {"train/dark": 12, "train/light": 12, "val/dark": 4, "val/light": 4, "other/grey": 3, "flat": 3}
    for name, count in (counts | {"one/dark": 5}).items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (40, 48, 3)) + (120 if "light" in name else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    """train.tar and val.tar: 1,000 and 250 images of the quickstart's."""
    root = tmp_path_factory.mktemp("fashion")
    for name, every in (("train.tar", 5), ("val.tar", 4)):
        thinned(DATA / name, every, root / name)
    return root


def result(capsys, *arguments: object) -> dict:
    evaluate.main([*map(str, arguments), "--workers", "0"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def complaint(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        evaluate.main(list(map(str, arguments)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(folders: Path, train: str = "train", val: str = "val") -> list[str]:
    return ["--train", str(folders / train), "--val", str(folders / val)]


def test_knn_of_a_published_file(folders, capsys):
    found = result(capsys, "knn", CHECKPOINT, *images(folders), "--k", "5")
    assert found.keys() == {"top1", "top5", "k"}
    assert found["k"] == 5
    assert found["top1"] == 1
    assert found["top5"] == 1


@pytest.mark.parametrize("command", ["knn", "linear", "finetune"])
def test_an_architecture_of_timm_with_random_weights(folders, tmp_path, capsys, monkeypatch, command):
    """Nothing is fetched for it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own = {"knn": ["--k", "3"], "linear": ["--fast"], "finetune": ["--recipe", FINETUNE, "--out", tmp_path / "run"]}
    more = ["train.global_batch_size=12", "train.max_steps=2"] if command == "finetune" else []
    arguments = [command, "timm/test_convnext", *images(folders), "--baseline", "initial", *own[command]]
    assert 0 <= result(capsys, *arguments, *more)["top1"] <= 1


def test_several_k_are_a_table_and_all_in_the_result(folders, capsys):
    evaluate.main(["knn", CHECKPOINT, *images(folders), "--k", "3,24", "--workers", "0"])
    said = capsys.readouterr()
    *_, head, three, all_of_them, last = said.out.splitlines()
    assert f"the base encoder of {CHECKPOINT}, on images of 64 pixels: 24 images of train, " in said.err
    assert head.split() == ["k", "top-1", "top-5"]
    assert three.split()[0] == "3"
    assert all_of_them.split()[0] == "24"
    found = json.loads(last)
    assert found["k"] == 3
    assert [each["k"] for each in found["by_k"]] == [3, 24]
    assert found["by_k"][0] == {key: found[key] for key in ("top1", "top5", "k")}
    assert three.split()[1] == f"{found['top1']:.2%}"


def test_images_on_both_sides_are_said_under_whatever_paths(tmp_path, capsys):
    """A copy under other names, in another order, as a tar beside a folder: the same images all the same."""
    source = open_source(Root("shards", DATA / "val.tar"), "all")
    for i in range(240):
        name = source.classes[source.labels[i]]
        for side in ("one", "two") if i < 120 else ("three",):
            (tmp_path / side / name).mkdir(parents=True, exist_ok=True)
            source.read(i).save(tmp_path / side / name / (f"copy-{-i}.png" if side == "two" else f"{i}.png"))
    roots = ["--train", str(tmp_path / "one"), "--val", str(tmp_path / "two")]
    for command in (["knn"], ["linear", "--fast"]):
        evaluate.main([*command, CHECKPOINT, *roots, "--workers", "0"])
        assert "of val's images are among train's" in capsys.readouterr().err
    evaluate.main(["knn", CHECKPOINT, "--train", str(tmp_path / "three"), *roots[2:], "--workers", "0"])
    assert "among train's" not in capsys.readouterr().err
    pixels = ["--baseline", "pixels", "--workers", "0"]  # of which the first, of the margin, are all black
    evaluate.main(["knn", CHECKPOINT, "--train", str(tmp_path / "three"), *roots[2:], *pixels])
    assert "among train's" not in capsys.readouterr().err


def test_a_root_with_train_and_val_serves_both_sides(fashion, capsys):
    apart = result(capsys, "knn", CHECKPOINT, "--train", fashion / "train.tar", "--val", fashion / "val.tar")
    together = result(capsys, "knn", CHECKPOINT, "--train", fashion, "--val", fashion)
    assert apart == together
    assert apart["k"] == 20
    assert 0.3 < apart["top1"] < apart["top5"] < 1


def test_rankme_needs_no_labels(folders, capsys):
    evaluate.main(["rankme", CHECKPOINT, "--data", str(folders / "flat"), "--workers", "0"])
    out, err = capsys.readouterr()
    assert "RankMe is at most the number of images (3), below the features' width (48)" in err
    found = json.loads(out)
    assert found.keys() == {"rankme"}
    assert 1 <= found["rankme"] < 4


def test_baselines_differ_from_the_network_and_pixels_need_none_of_it(fashion, capsys):
    roots = ["--train", fashion / "val.tar", "--val", fashion / "val.tar", "--k", "7"]
    numbers = {b: result(capsys, "knn", CHECKPOINT, *roots, *b)["top1"] for b in ((), ("--baseline", "initial"))}
    numbers[("pixels",)] = result(capsys, "knn", CHECKPOINT, *roots, "--baseline", "pixels")["top1"]
    assert len(set(numbers.values())) == 3
    assert min(numbers.values()) > 0.3


def test_initial_baseline_is_the_network_that_the_run_began_with(fashion, tmp_path, capsys):
    """The row of step 0 that the monitor wrote, to the bit; and the trained network is the last row."""
    recipe = str(ROOT / "recipes/quickstart.yaml")
    few = [f"data.root={fashion}", "train.max_steps=1", "data.workers=0", "run.seed=5"]
    run_main([recipe, f"run.dir={tmp_path}", *few])
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    first, last = (row for row in rows if "knn_top1" in row)
    roots = ["--train", fashion, "--val", fashion]
    initial = result(capsys, "knn", tmp_path, *roots, "--baseline", "initial")
    trained = result(capsys, "knn", tmp_path, *roots)
    assert (initial["top1"], initial["top5"]) == (first["knn_top1"], first["knn_top5"])
    assert (trained["top1"], trained["top5"]) == (last["knn_top1"], last["knn_top5"])


def test_fast_prints_the_whole_table_and_what_it_is_not(folders, capsys):
    evaluate.main(["linear", CHECKPOINT, *images(folders), "--fast", "--features", "mean", "--workers", "0"])
    out = capsys.readouterr().out
    assert "not the paper's protocol" in out
    assert "chosen on val" in out
    assert len(re.findall(r"^[\d.]+ +(?:[\d.]+% *){4}$", out, re.MULTILINE)) == 8
    (head,) = re.findall(r"^learning rate .*$", out, re.MULTILINE)
    assert re.split("  +", head) == ["learning rate", "wd 0", "wd 0.0001", "wd 0.001", "wd 0.01"]
    found = json.loads(out.splitlines()[-1])
    assert found.keys() == {"top1", "top5", "learning_rate", "weight_decay"}
    assert found["top1"] == 1


def test_fast_takes_a_share_of_the_labels(fashion, capsys):
    found, roots = {}, ["--train", str(fashion), "--val", str(fashion)]
    for share in ("2%", "100%"):
        evaluate.main(["linear", CHECKPOINT, *roots, "--fast", "--labels", share, "--workers", "0"])
        said = capsys.readouterr()
        found[share] = json.loads(said.out.splitlines()[-1])["top1"]
        assert f"{20 if share == '2%' else '1,000'} images of train, 250 of val" in said.err
    assert 0.2 < found["2%"] < found["100%"]


def test_linear_takes_roots_and_overrides_from_the_command_line(folders, tmp_path, capsys):
    arguments = ["linear", CHECKPOINT, *images(folders), "--recipe", VIT, "--out", tmp_path / "run"]
    found = result(capsys, *arguments, "train.epochs=2", "train.global_batch_size=16", "optimizer.base_lr=1")
    assert found.keys() == {"top1", "top5", "learning_rate"}
    assert found["learning_rate"] == 1 / 16
    assert {"recipe.yaml", "metrics.jsonl", "tensorboard", "confusion.png", "classes.csv", "checkpoints"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_linear_takes_a_dataset_of_torchvision_and_its_options(tmp_path, capsys):
    arguments = ["linear", CHECKPOINT, "--recipe", VIT, "--source", "torchvision", "--dataset", "FakeData"]
    arguments += ["--train", tmp_path, "--val", tmp_path, "--out", tmp_path / "run", "train.max_steps=1"]
    options = "data.dataset_options={size: 60, image_size: [3, 32, 32], num_classes: 5}"
    assert result(capsys, *arguments, options, "train.global_batch_size=50")["top5"] == 1


@pytest.mark.parametrize(
    "command", [("knn",), ("linear", "--fast"), ("linear", "--recipe", VIT), ("finetune", "--recipe", FINETUNE)]
)
def test_images_that_do_not_suit_are_refused_before_a_network_is_opened(folders, command):
    start = [*command, "no such checkpoint"] if command[0] == "knn" else [command[0], "no such", *command[1:]]
    train, val = ("data.root", "data.val_root") if "--recipe" in command else ("--train", "--val")
    assert complaint(*start, *images(folders, "flat")).startswith(f"{train} (")
    assert "labelled images" in complaint(*start, *images(folders, "flat"))
    assert re.search(rf"{val} \(.*flat\) must hold labelled images", complaint(*start, *images(folders, val="flat")))
    assert "validation classes (grey) must be among the 2 classes" in complaint(*start, *images(folders, val="other"))
    assert "must hold two classes or more; it has one, dark" in complaint(*start, *images(folders, "one", "one"))
    assert re.search(rf"{train} \(.*gone\) must exist", complaint(*start, *images(folders, "gone")))
    assert "data.dataset (No) must be a class of" in complaint(*start, *images(folders), "--dataset", "No")


def test_a_checkpoint_that_is_none(folders, tmp_path):
    assert "CHECKPOINT (none) must exist" in complaint("knn", "none", *images(folders))
    (tmp_path / "a.pth").write_bytes(b"nothing")
    assert complaint("rankme", tmp_path / "a.pth", "--data", folders / "flat")


def test_a_diverged_network_and_unreadable_images_are_failures(folders, tmp_path, monkeypatch):
    class Diverged(nn.Flatten):
        def forward(self, images):
            return super().forward(images) * float("nan")

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"none of 1 images could be read, broken/1.png"):
        evaluate.main(["rankme", CHECKPOINT, "--data", str(tmp_path), "--workers", "0"])
    monkeypatch.setattr(subject.nn, "Flatten", Diverged)
    for command in (["knn", "--k", "3"], ["linear", "--fast"]):
        with pytest.raises(RunFailed, match="features are not finite"):
            evaluate.main([*command, CHECKPOINT, *images(folders), "--baseline", "pixels", "--workers", "0"])


def test_arguments_that_do_not_suit(folders):
    roots = images(folders)
    assert "--k (25) must be at most 24, the number of training images" in complaint(
        "knn", CHECKPOINT, *roots, "--k", "25"
    )
    for k in ("0", "-1", "1.5", "", "3,", "a"):
        assert f"--k ({k}) must be a number >= 1" in complaint("knn", CHECKPOINT, *roots, f"--k={k}")
    assert "--features (middle) must be own, cls" in complaint("knn", CHECKPOINT, *roots, "--features", "middle")
    assert "--crop-fraction (2.0) must be" in complaint("knn", CHECKPOINT, *roots, "--crop-fraction", "2")
    assert "--workers (-1) must be >= 0" in complaint("knn", CHECKPOINT, *roots, "--workers", "-1")
    both = complaint("knn", CHECKPOINT, *roots, "--baseline", "initial", "--encoder", "momentum")
    assert "--encoder (momentum) must be left out" in both
    assert "linear_small (a few thousand images)" in complaint("linear", CHECKPOINT, *roots)
    assert "finetune_small (a few thousand images)" in complaint("finetune", CHECKPOINT, *roots)
    assert "--train (missing)" in complaint("linear", CHECKPOINT, "--fast")
    assert "--val (missing) must be given with --train" in complaint(
        "finetune", CHECKPOINT, "--recipe", FINETUNE, *roots[:2]
    )
    assert "task (linear) must be finetune" in complaint("finetune", CHECKPOINT, *roots, "--recipe", VIT)
    for share in ("10", "0%", "101%", "1e400%", "-1%", "nan%"):
        assert f"--labels ({share}) must be a percentage" in complaint(
            "finetune", CHECKPOINT, *roots, "--recipe", FINETUNE, f"--labels={share}"
        )
    assert "must be left out with --fast" in complaint("linear", CHECKPOINT, *roots, "--fast", "--recipe", VIT)
    assert "must be left out with --fast" in complaint("linear", CHECKPOINT, *roots, "--fast", "train.epochs=3")
    without = complaint("linear", CHECKPOINT, *roots, "--recipe", VIT, "--features", "cls")
    assert "--features (cls) must be left out without --fast" in without
    other = complaint("linear", CHECKPOINT, *roots, "--recipe", ROOT / "recipes/vit_s.yaml")
    assert "task (pretrain) must be linear" in other
    assert "did you mean train.epochs" in complaint("linear", CHECKPOINT, *roots, "--recipe", VIT, "epochs=3")


def test_run_takes_no_linear_recipe():
    with pytest.raises(UserError, match=r"task \(linear\) must be pretrain"):
        run_main([VIT])
