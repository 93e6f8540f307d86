"""`embed`, `predict` and `duplicates` as users call them: files with a row for each image, the same by any ranks."""

import csv
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine import duplicates, embed, predict
from engine.checkpoint.layout import read_pointer
from engine.data.opening import open_source
from engine.data.source import Root
from engine.errors import RunFailed, UserError
from tests.distributed.launch import on_ranks
from tests.runs.small import CHECKPOINT, FEW, VAL, finetune_recipe, linear_recipe, run_finetune, run_linear

COUNT = 300  # two batches and a partial one; one is unreadable, and some are copies


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Of two classes, with `train` and `val`: row 5 again as row 200, smaller, and rows 7, 8 and 9 as JPEG of one."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = coarse.resize((90, 70), Image.Resampling.BICUBIC)
        folder = root / ("train" if i < 250 else "val") / ("cat" if i % 2 else "dog, large")
        folder.mkdir(parents=True, exist_ok=True)
        if i in (7, 9):
            image.save(folder / f"{i:03}-again.jpg", quality=80 + i)
        if i == 6:
            image.resize((60, 47)).save(folder / "600.png")
        image.save(folder / f"{i:03}.png")
    (root / "train" / "cat" / "999.png").write_bytes(b"no image")
    return root


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_embed_writes_a_row_for_each_image(images, tmp_path, capsys):
    out = tmp_path / "a.npy"
    embed.main([CHECKPOINT, str(out), "--data", str(images), "--workers", "0"])
    said = capsys.readouterr()
    rows = COUNT + 3
    assert last_json(said.out) == {"images": rows, "width": 48, "file": str(out)}
    assert f"1 of {rows + 1} images could not be read and have no row" in said.err
    feature_ND, listed = np.load(out, mmap_mode="r"), table(out.with_suffix(".csv"))
    assert (feature_ND.shape, feature_ND.dtype, len(listed)) == ((rows, 48), np.float32, rows)
    assert [int(line["row"]) for line in listed] == list(range(rows))
    assert {line["label"] for line in listed} == {"cat", "dog, large"}
    assert sum(line["name"].startswith("val/") for line in listed) == 50

    encoder = engine.load(CHECKPOINT)
    for row in (0, 130, rows - 1):
        file = images / listed[row]["name"]
        assert file.parent.name == listed[row]["label"]
        ours = encoder(encoder.transform(Image.open(file))[None])[0]
        torch.testing.assert_close(torch.tensor(feature_ND[row]), ours, rtol=1e-4, atol=1e-5)

    two = tmp_path / "two.npy"
    on_ranks(2, "engine.embed", CHECKPOINT, two, "--data", images, "--workers", 1)
    assert (two.read_bytes(), two.with_suffix(".csv").read_bytes()) == (
        out.read_bytes(),
        out.with_suffix(".csv").read_bytes(),
    )
    embed.main([CHECKPOINT, str(tmp_path / "b.npy"), "--data", str(images), "--features", "last2", "--workers", "0"])
    assert np.load(tmp_path / "b.npy").shape == (rows, 96)


def test_a_parquet_file_holds_all_of_it(images, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    embed.main([CHECKPOINT, str(tmp_path / "a.parquet"), "--data", str(images), "--workers", "0"])
    embed.main([CHECKPOINT, str(tmp_path / "a.npy"), "--data", str(images), "--workers", "0"])
    content = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert np.array_equal(np.array(content["feature"], np.float32), np.load(tmp_path / "a.npy"))
    listed = table(tmp_path / "a.csv")
    assert [content["name"], content["label"]] == [[line[key] for line in listed] for key in ("name", "label")]


def test_names_find_their_files_whatever_stands_in_them(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    odd = ["a\nb.png", "a\rb.png", 'q"u,o te.png', "é\u2028 ✓.png", " lead.png", "x:y.png", "back\\slash.png"]
    for root in ("one", "two"):
        (tmp_path / root / "train").mkdir(parents=True)
        for i, name in enumerate(odd):
            shutil.copy(images / f"train/dog, large/{2 * i:03}.png", tmp_path / root / "train" / name)
    shutil.copytree("one/train", "one/val")
    few = ["--workers", "0", "--data"]
    embed.main([CHECKPOINT, "one.npy", *few, "one"])
    duplicates.main([CHECKPOINT, "one.csv", *few, "one", "--force"])
    assert "UTF-8" not in capsys.readouterr().err
    embed.main([CHECKPOINT, "both.npy", *few, "[one/train, two]"])
    of_one = [line["name"] for line in table(Path("one.csv"))]
    of_both = [line["name"] for line in table(Path("both.csv"))]
    assert (len(set(of_one)), len(set(of_both))) == (2 * len(odd), 2 * len(odd))
    assert all((tmp_path / "one" / name).is_file() for name in of_one)
    assert all((tmp_path / name).is_file() for name in of_both)

    (tmp_path / "two/train/x:y.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/two/train/\xff.png"))
    embed.main([CHECKPOINT, "two.npy", *few, "two"])
    (said,) = re.findall("names that are no UTF-8 have .* in OUT, as (.*)", capsys.readouterr().err)
    assert said == r"train/\xff.png"
    assert said in [line["name"] for line in table(Path("two.csv"))]


def test_duplicates_are_grouped_by_the_name_of_their_first(images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "d.csv"
    duplicates.main([CHECKPOINT, str(out), "--data", str(images), "--least", "0.995", "--workers", "0"])
    found, listed = last_json(capsys.readouterr().out), table(out)
    pairs = [{"006.png", "600.png"}, {"007.png", "007-again.jpg"}, {"009.png", "009-again.jpg"}]
    groups: dict[str, set[str]] = {}
    for line in listed:
        groups.setdefault(line["group"], set()).add(Path(line["name"]).name)
        assert 0.995 <= float(line["cosine"]) <= 1
    assert (found["groups"], found["images"]) == (len(groups), len(listed))
    assert all(any(pair <= group for group in groups.values()) for pair in pairs)
    assert all(Path(group).name in members for group, members in groups.items())

    monkeypatch.setattr("engine.evaluation.duplicates.MOST", 50)
    many = [CHECKPOINT, str(tmp_path / "many.csv"), "--data", str(images), "--least", "0.1", "--workers", "0"]
    with pytest.raises(UserError, match=r"--least \(0\.1\) must be higher: over 50 pairs"):
        duplicates.main(many)
    on_ranks(2, "engine.duplicates", CHECKPOINT, tmp_path / "two.csv", "--data", images, "--least", 0.995)
    assert (tmp_path / "two.csv").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_predict_gives_the_classes_that_the_run_s_own_evaluation_gives(kind, tmp_path, capsys):
    directory, out = tmp_path / "run", tmp_path / "p.csv"
    run = {"linear": lambda: run_linear(linear_recipe(directory)), "finetune": lambda: run_finetune(recipe)}
    recipe = finetune_recipe(directory, "parallel.precision=float32", "augment.interpolation=bicubic")
    run[kind]()
    last = [json.loads(line) for line in (directory / "metrics.jsonl").open() if f"{kind}_top1" in line][-1]
    capsys.readouterr()
    predict.main([str(directory), str(out), "--data", str(FEW), "--workers", "0"])
    assert last_json(capsys.readouterr().out) == {"images": 100, "file": str(out)}
    listed, source = table(out), open_source(Root("shards", FEW), "all")
    truth = [source.classes[label] for label in source.labels]
    assert [line["name"] for line in listed] == [source.name(i) for i in range(len(source))]
    right = sum(line["class"] == name for line, name in zip(listed, truth, strict=True))
    assert right / 100 == pytest.approx(last[f"{kind}_top1"], abs=0.002)
    assert all(0.1 <= float(line["probability"]) <= 1 for line in listed)

    checkpoints = directory / "checkpoints"
    manifest = checkpoints / read_pointer(checkpoints, "latest") / "MANIFEST.json"
    assert json.loads(manifest.read_text())["state"]["classes"] == list(source.classes)
    if kind == "linear":
        other = tmp_path / "other.pth.tar"
        content = torch.load(CHECKPOINT, weights_only=True)
        content["state_dict"]["module.base_encoder.norm.bias"] += 1
        torch.save(content, other)
        arguments = [str(directory), str(out), "--data", str(FEW), "--workers", "0", "--force"]
        with pytest.raises(UserError, match="what the run was made on"):
            predict.main([*arguments, "--checkpoint", str(other)])
        with pytest.raises(UserError, match=r"--checkpoint \(moved\.pth\) must be where the network of .*run.* lies"):
            predict.main([*arguments, "--checkpoint", "moved.pth"])


@pytest.mark.parametrize(
    ("door", "arguments", "message"),
    [
        (embed, [CHECKPOINT, "a.txt"], r"must end in \.npy or \.parquet"),
        (embed, [CHECKPOINT, "none/a.npy"], "folder that exists"),
        (embed, [CHECKPOINT, "there.npy"], "--force"),
        (duplicates, [CHECKPOINT, "a.csv", "--least", "1.5"], "--least"),
        (duplicates, [CHECKPOINT, "a.csv", "--least", "much"], "--least: invalid cosine value: 'much'"),
        (duplicates, [CHECKPOINT, "there.csv"], "--force"),
        (predict, ["nothing", "a.csv"], "must be a run of"),
        (predict, [CHECKPOINT, "a.csv"], "must be a run of"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(door, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("there.npy", "there.csv"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=message) as caught:
        door.main([*arguments, "--data", str(VAL), "--workers", "0"])
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"there.npy", "there.csv"}
    assert (tmp_path / "there.npy").read_text() == "precious"


def test_weights_that_have_diverged_leave_no_file(tmp_path):
    content = torch.load(CHECKPOINT, weights_only=True)
    content["state_dict"]["module.base_encoder.norm.bias"] += float("nan")
    torch.save(content, tmp_path / "a.pth.tar")
    with pytest.raises(RunFailed, match="not finite"):
        embed.main([str(tmp_path / "a.pth.tar"), str(tmp_path / "out.npy"), "--data", str(FEW), "--workers", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth.tar"]


@pytest.mark.parametrize(
    ("door", "name", "full"),
    [
        (embed, "a.npy", ".npy"),
        (embed, "a.npy", ".csv"),
        (embed, "a.parquet", ".parquet"),
        (duplicates, "a.csv", ".csv"),
    ],
)
def test_a_full_disk_is_a_line_and_leaves_nothing(images, door, name, full, tmp_path, monkeypatch):
    """Rows of few images lie in a buffer until the file is closed."""
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "few").mkdir()
    for i in range(3):
        shutil.copy(images / f"train/dog, large/{2 * i:03}.png", tmp_path / "few")
    numbers, out = itertools.count(), tmp_path / name
    monkeypatch.setattr("engine.files.secrets.token_hex", lambda _: str(next(numbers)))
    for number in range(8):  # whatever of this name is asked for lies on a full disk
        tmp_path.joinpath(f"{out.stem}{full}.tmp-{number}").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"OUT could not be written: .*(?i:no space left on device)"):
        door.main([CHECKPOINT, str(out), "--data", str(tmp_path / "few"), "--workers", "0"])
    assert not out.exists()


@pytest.mark.parametrize("door", [embed, duplicates, predict])
def test_out_where_nothing_can_be_written_is_told_first(door, images):
    name = "/proc/a.npy" if door is embed else "/proc/a.csv"
    with pytest.raises(UserError, match=rf"OUT \({name}\) must lie in a folder that can be written"):
        door.main(["no such checkpoint", name, "--data", str(images), "--workers", "0"])
