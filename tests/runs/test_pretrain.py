"""What pre-training does with what it finds: damaged checkpoints, unreadable images, another precision."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import leaving_out
from engine.data.augment import Augment
from engine.data.order import Order
from engine.errors import RunFailed, UserError
from engine.recipe.load import load
from engine.runs.failures import failures_in_words
from engine.runs.pretrain import Pretraining, make_augment, pretrain
from engine.training.parallelize import dtype_of
from tests.data.images import png
from tests.distributed.trajectories import KINDS, RECIPE, SMALL
from tests.training.trunks import Unpooled

SIZE = "train.micro_batch_size"


def train(world, directory, *overrides):
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={directory}", *overrides]
    pretrain(load(RECIPE, values), RECIPE, world)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(rows) -> list[tuple]:
    return [(row["step"], row["loss"], row["bad_images"]) for row in rows if "loss" in row]


def damage(checkpoint):
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_never_bury_a_run(world, tmp_path, capfd):
    """The one before is used; where none is left, the run refuses to start from nothing, however often it is asked."""
    train(world, tmp_path, "train.max_steps=4", "checkpoint.every_steps=2")
    log = (tmp_path / "metrics.jsonl").read_bytes()
    damage(tmp_path / "checkpoints/step_0000004")
    train(world, tmp_path, "train.max_steps=3")
    assert "step_0000004" in capfd.readouterr().err
    assert (tmp_path / "checkpoints/step_0000004.damaged-1").is_dir()
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(b"".join(log.splitlines(True)[:2]))
    damage(tmp_path / "checkpoints/step_0000002")
    damage(tmp_path / "checkpoints/step_0000003")
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for kind in ("damaged", "damaged", "left"):
        for folder in (tmp_path / "checkpoints").glob("step_*.damaged-1"):
            folder.rename(folder.with_name(folder.name.replace("damaged", kind)))
        with pytest.raises(UserError, match=r"must hold a valid checkpoint, and all were set aside \(step_0000002"):
            train(world, tmp_path, "train.max_steps=3")
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_a_run_keeps_its_precision(world, tmp_path):
    train(world, tmp_path, "train.max_steps=1")
    with pytest.raises(UserError, match=r"parallel.precision \(float32\) must be float64"):
        train(world, tmp_path, "train.max_steps=2", "parallel.precision=float32")


def test_micro_batches_are_refused_where_batch_norm_is_in_the_trunk(world, tmp_path):
    """Before there is a run directory."""
    for kind in ("vit_conv", "resnet"):
        values = [*KINDS[kind], "train.micro_batch_size=4"]
        name = load(RECIPE, [*SMALL, *values]).model.name
        words = rf"train.micro_batch_size \(4\) must be null for {name}, whose BatchNorm spans the whole batch; pass "
        with pytest.raises(UserError, match=words):
            train(world, tmp_path / "run", *values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32), ("float64", torch.float64)]
)
def test_images_come_in_the_type_in_which_trunks_compute(precision, dtype):
    """Rounded once, at the end."""
    values = [f"parallel.precision={precision}", "parallel.compile=false"]
    recipe = load(RECIPE, values)
    crops = torch.arange(2 * 3 * 3 * 28 * 28).view(2, 3, 3, 28, 28).remainder(251).byte()
    arguments = crops, torch.arange(3), torch.tensor(2)
    images = make_augment(recipe)(*arguments)
    assert images.dtype == dtype
    assert torch.equal(
        images, Augment(recipe.augment, recipe.run.seed, dtype_of(recipe.parallel))(*arguments).to(dtype)
    )


def test_a_picture_shows_one_micro_batch(world, tmp_path, monkeypatch):
    """Never more images than that are made at once."""
    augmented, made = Pretraining.augmented, []
    monkeypatch.setattr(
        Pretraining, "augmented", lambda task, crops, *rest: made.append(len(crops[0])) or augmented(task, crops, *rest)
    )
    train(world, tmp_path, "train.max_steps=2", "train.micro_batch_size=4")
    assert made == [4] * (2 * 2 + 1 + 2 * 2)


def test_full_memory_ends_a_run_in_one_line(world, tmp_path, monkeypatch):
    def full(task, batch):
        if task.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")
        return steps(task, batch)

    steps = Pretraining.train_step
    monkeypatch.setattr(Pretraining, "train_step", full)
    left = "^CPU had no memory left for 2.50 GiB more; {}: go on with {}, which makes the same run in less memory$"
    again = "parallel.activation_checkpoint"
    first = f"{SIZE}=4, {again}=selective or more processes"
    with pytest.raises(RunFailed, match=left.format("there is no checkpoint yet", first)):
        train(world, tmp_path / "new")
    kept, every = "checkpoint step_0000002 is kept", "checkpoint.every_steps=2"
    with pytest.raises(RunFailed, match=left.format(kept, f"{SIZE}=1, {again}=full or more processes")):
        train(world, tmp_path / "run", every, f"{SIZE}=2", f"{again}=selective")
    with pytest.raises(RunFailed, match=left.format(kept, "more processes")):
        train(world, tmp_path / "conv", every, f"{again}=full", *KINDS["vit_conv"])
    with pytest.raises(RunFailed, match=left.format(kept, "more processes")):
        train(world, tmp_path / "resnet", every, f"{again}=selective", *KINDS["resnet"])


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "NCCL error in: c10d/NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_memory_that_libraries_lack_is_the_devices(world, tmp_path, monkeypatch, text, size):
    task = SimpleNamespace(world=replace(world, size=size), timeout=1, less_memory="less")
    with pytest.raises(RunFailed) as failed, failures_in_words(task, tmp_path):
        raise RuntimeError(text)
    words = " ".join(text.split())
    assert str(failed.value) == (
        f"CPU had no memory left ({words}); there is no checkpoint yet: go on with less, which makes the same run in "
        "less memory"
    )


@pytest.mark.parametrize(("where", "on"), [("rank 3: ", " on rank 3"), ("backend='inductor' raised:\n", "")])
def test_full_memory_that_another_error_tells_of_is_in_words_too(world, tmp_path, where, on):
    """Of another rank, by agreement, and where the compiler tries out kernels."""
    task = SimpleNamespace(world=world, timeout=1, less_memory="less")
    said = f"^CPU had no memory left for 2.50 GiB more{on}; there is no checkpoint yet: go on with less"
    with pytest.raises(RunFailed, match=said), failures_in_words(task, tmp_path):
        raise RuntimeError(f"{where}OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has ...")


def test_full_memory_of_the_host_names_what_fills_it(world, tmp_path, monkeypatch):
    def full(task, batch):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr(Pretraining, "train_step", full)
    with pytest.raises(RunFailed, match=r"^the host had no memory left .* with checkpoint.asynchronous=false"):
        train(world, tmp_path)


def test_archives_that_a_resume_gives_up_are_announced(world, tmp_path, capfd):
    every = "checkpoint.keep_every_epochs"
    for step, value, said in ((4, "3", False), (5, "1.5", False), (6, "null", True)):
        capfd.readouterr()
        train(world, tmp_path, f"{every}={value}", f"train.max_steps={step}")
        assert (f"  archive   {every} was 1.5 and is null: of check" in capfd.readouterr().out) == said


@pytest.fixture
def looks_at_one(monkeypatch):
    """Of the images of a set that begins, as of a large one at some."""
    monkeypatch.setattr(leaving_out, "_HEADERS", 0)
    monkeypatch.setattr(leaving_out, "_WHOLE", 1)


def test_unreadable_images_are_borne_up_to_their_share(world, tmp_path, looks_at_one):
    images = tmp_path / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(images / f"{number:02}.png")
    (images / "07.png").write_bytes(b"no picture")
    folder = ["data.source=folder", f"data.root={images}", "data.dataset=null", "data.dataset_options={}"]
    few = [*folder, "train.max_steps=10", "train.epochs=4"]
    # One of 40 is a fortieth, also in the first steps, where it is one of 8.
    rows = train(world, tmp_path / "borne", *few, "data.max_bad_fraction=0.03")
    assert rows[-1]["step"] == 10
    assert rows[-1]["bad_images"] == 2
    exceeded = r"data.max_bad_fraction \(0.02\) was exceeded: 1 of 40 .*, and pass data.max_bad_fraction=0.025 or more"
    with pytest.raises(RunFailed, match=f"{exceeded} to go on; the run is saved after step [1-5]$"):
        train(world, tmp_path / "not_borne", *few, "data.max_bad_fraction=0.02")
    with pytest.raises(UserError, match=f"^{exceeded} to go on$"):
        train(world, tmp_path / "not_borne", *few, "data.max_bad_fraction=0.02")
    assert losses(train(world, tmp_path / "not_borne", *few, "data.max_bad_fraction=0.03")) == losses(rows)


def test_a_run_whose_images_all_break_is_saved_before_it_ends(world, tmp_path, looks_at_one):
    images = tmp_path / "images"
    images.mkdir()
    first = Order(0, 1000, 8).share(0, 0, 1)[1].tolist()
    for number in range(1000):
        (images / f"{number:03}.png").write_bytes(png(number % 256) if number in (0, *first) else b"")
    folder = ["data.source=folder", f"data.root={images}", "data.dataset=null", "data.dataset_options={}"]
    words = "data.root must hold readable images; .* and the 100 after it are not; repair them; checkpoint step_0000001"
    with pytest.raises(UserError, match=f"^{words} is kept, and the same command goes on$"):
        train(world, tmp_path / "run", *folder, "data.max_bad_fraction=1", "checkpoint.every_steps=100")
    for number in set(range(1000)) - set(first):
        (images / f"{number:03}.png").write_bytes(png(number % 256))
    again = ["data.accept_changes=true", "train.max_steps=2", "data.max_bad_fraction=1"]
    assert [row["step"] for row in train(world, tmp_path / "run", *folder, *again) if "loss" in row][-1] == 2


def test_best_names_the_checkpoint_with_the_highest_knn_and_is_spared(world, tmp_path):
    """Saved before every evaluation, whatever checkpoint.every_steps says."""
    rows = train(world, tmp_path, "evaluate.knn_every_epochs=1", "checkpoint.every_steps=100", "checkpoint.keep=1")
    knn = {row["step"]: row["knn_top1"] for row in rows if "knn_top1" in row}
    assert list(knn) == [0, 7, 14, 20]
    named = (tmp_path / "checkpoints/best").read_text().strip()
    del knn[0]  # the network before its first update has no checkpoint
    assert named == f"step_{max(knn, key=knn.get):07d}"
    assert {path.name for path in (tmp_path / "checkpoints").glob("step_*")} == {named, "step_0000020"}


def test_the_monitor_may_see_some_images_of_each_class(world, tmp_path):
    """60 images of 4 classes: a bank of all is no bank, bit for bit; another takes as many of every class."""

    def knn(name, *overrides):
        rows = train(world, tmp_path / name, "train.max_steps=7", "evaluate.knn_every_epochs=1", *overrides)
        return [row for row in rows if "knn_top1" in row]

    whole = knn("whole")
    assert knn("all", "evaluate.knn_bank=60") == whole
    some = knn("some", "evaluate.knn_bank=6")
    assert [row["step"] for row in some] == [0, 7]
    assert some != whole
    assert [row["probe_top1"] for row in some] == [row["probe_top1"] for row in whole]
    words = r"evaluate.knn_bank \(2\) must be null, or so many that there are 20 neighbours in all 4 classes \(8\); "
    with pytest.raises(UserError, match=words):
        knn("few", "evaluate.knn_bank=2")
    assert not (tmp_path / "few").exists()


def test_the_online_probe_is_told_of_and_may_come_and_go(world, tmp_path, capfd):
    """Its accuracy stands beside kNN's, its loss in the loss rows; a resume may leave it out and begin it anew."""

    def train_to(step, on):
        values = [f"train.max_steps={step}", "evaluate.knn_every_epochs=1", f"evaluate.online_probe={on}"]
        rows = train(world, tmp_path, *values, "checkpoint.every_steps=100")
        said = capfd.readouterr().out
        return [row for row in rows if row["step"] == step], said

    (loss, monitor), said = train_to(3, "true")
    assert 0 <= loss["probe_loss"] < 9
    assert 0 <= monitor["probe_top1"] <= monitor["probe_top5"] == 1
    assert f"probe top-1 {monitor['probe_top1']:.2%}, loss " in said
    assert "fresh" not in said
    for step, on, fresh in ((5, "true", False), (6, "false", False), (8, "true", True)):
        (loss, monitor), said = train_to(step, on)
        assert ("probe_loss" in loss) == ("probe_top1" in monitor) == (on == "true")
        assert ("probe     the online probe starts fresh at step 6: the run had none until then" in said) is fresh


def test_the_online_probe_is_off_without_labels(world, tmp_path, capfd):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(16):
        Image.fromarray(np.full((20, 24, 3), number, dtype=np.uint8)).save(images / f"{number:02}.png")
    folder = ["data.source=folder", f"data.root={images}", "data.dataset=null", "data.dataset_options={}"]
    rows = train(world, tmp_path / "run", *folder, "train.max_steps=1", "evaluate.online_probe=true")
    assert len(rows) == 1
    assert "probe_loss" not in rows[0]
    assert capfd.readouterr().out.count("probe     the online probe is off: it needs labelled validation images") == 1


def test_a_log_that_is_taken_away_costs_nothing_but_itself(world, tmp_path, capfd, monkeypatch):
    """In the middle of a run, which knows what it wrote, and before a finished one is asked for again."""
    described = Pretraining.describe

    def remove_log(task, output, within):
        if task.step == 2:
            (tmp_path / "metrics.jsonl").unlink()
        return described(task, output, within)

    monkeypatch.setattr(Pretraining, "describe", remove_log)
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={tmp_path}", "train.max_steps=4"]
    recipe = load(RECIPE, [*values, "checkpoint.every_steps=3"])
    for result in ("loss ", "unknown: metrics.jsonl has no rows"):
        pretrain(recipe, RECIPE, world)
        assert (tmp_path / "checkpoints/step_0000004").is_dir()
        assert f"result    {result}" in capfd.readouterr().out


LOST = "bits      two runs of this command may differ in rounding, and a resumed run from an unbroken one: "


@pytest.mark.parametrize(
    ("asked", "trunk", "said", "recorded", "mode"),
    [
        ("true", None, None, "true", (True, False)),
        ("false", None, "parallel.deterministic is false", "false", (False, False)),
        (
            "true",
            Unpooled,
            "max_unpooling2d_forward_out has no deterministic form on CPU; attention keeps its own, slowly",
            "in part: not max_unpooling2d_forward_out",
            (True, True),
        ),
    ],
)
def test_how_deterministic_a_run_is_is_said_and_recorded(
    world, tmp_path, capfd, monkeypatch, asked, trunk, said, recorded, mode
):
    """Of the trial the network is replaced; the run trains its own."""
    modes, step = [], Pretraining.train_step

    def spied(task, batch):
        lenient = torch.is_deterministic_algorithms_warn_only_enabled()
        modes.append((torch.are_deterministic_algorithms_enabled(), lenient))
        return step(task, batch)

    monkeypatch.setattr(Pretraining, "train_step", spied)
    if trunk:
        monkeypatch.setattr(Pretraining, "fresh_trunk", lambda _: trunk())
    train(world, tmp_path, f"parallel.deterministic={asked}", "train.max_steps=2")
    assert modes == [mode] * 2
    lines = [line for line in capfd.readouterr().out.splitlines() if "bits" in line]
    assert len(lines) == (said is not None)
    assert said is None or lines[0].endswith(LOST + said)
    manifest = json.loads((tmp_path / "checkpoints/step_0000002/MANIFEST.json").read_text())
    assert manifest["state"]["made_by"]["deterministic"] == recorded
    assert f"deterministic {recorded}\n" in (tmp_path / "recipe.yaml").read_text()
