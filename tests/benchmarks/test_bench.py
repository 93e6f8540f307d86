"""Every command of `engine.bench` runs on a CPU and says what it promises."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import bench
from engine.benchmarks import data, loss, step
from engine.benchmarks.step import Subject, measure_step
from engine.data.decode import decode, to_rgb
from engine.distributed.world import process_group
from engine.errors import RunFailed, UserError
from engine.recipe.load import load
from engine.runs.auto import settled
from engine.training.loss import contrastive_loss
from tests.distributed.launch import results
from tests.distributed.trajectories import KINDS
from tests.training.trunks import Unpooled

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/quickstart.yaml"
PARTS = {"augmentation", "momentum_update", "keys", "queries_and_loss", "backward", "optimizer", "other"}
UNKNOWN = ["model.name=timm/no_such", "model.freeze_patch_projection=false"]
UNKNOWN += [f"model.{key}=null" for key in ("patch_size", "dim", "depth", "heads")]
NO_DATA = "data.root=no/such/folder"


@pytest.fixture
def found(capsys):
    """The result of a command."""

    def run(*arguments: object) -> dict:
        bench.main([str(argument) for argument in arguments])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_step(found, tmp_path):
    trace = tmp_path / "trace.json"
    result = found("step", "--recipe", RECIPE, "--batch", 4, "--vs", "reference", "--profile", trace, NO_DATA)
    assert result["images_per_second"] > 0
    assert result["ratio"] > 0
    assert result["peak_memory_gb"] > 0.05
    assert result["parts"].keys() == PARTS
    assert all(result["parts"][part] > 0 for part in PARTS - {"other", "momentum_update"})
    exact = {"mfu": None, "graph_breaks": 0, "recompiles": 0, "device": "CPU", "steps": 6}
    assert {key: result[key] for key in exact} == exact
    assert len(result) == 9
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert all(names.count(part) >= 3 for part in PARTS - {"other"})


def test_step_alone_has_no_ratio(found):
    assert found("step", "--recipe", RECIPE, "--batch", 2)["ratio"] is None


@pytest.mark.slow
def test_step_of_two_ranks_in_micro_batches():
    [result] = results(2, "engine.bench", "step", "--recipe", RECIPE, "--batch", 8, "train.micro_batch_size=2", NO_DATA)
    assert result["images_per_second"] > 0
    assert result["parts"].keys() == PARTS


def test_the_counted_steps_cross_the_end_of_an_epoch_and_end_with_the_schedule():
    for epochs, per_epoch in ((1, 15), (2, 8), (30, 8)):
        recipe = load(RECIPE, [f"train.epochs={epochs}", "train.warmup_epochs=0", "train.global_batch_size=2"])
        with process_group() as world:
            schedule = Subject(settled(recipe, world), world, 15).schedule
        assert schedule.steps_per_epoch == per_epoch
        assert schedule.total_steps >= 15
    assert schedule.learning_rate_at(7) != schedule.learning_rate_at(8)


@pytest.mark.slow
@pytest.mark.parametrize("versus", ["none", "reference+"])
def test_compiled_steps_compile_nothing_more(found, versus):
    more = ["parallel.compile=true", "parallel.precision=bf16"]
    result = found("step", "--recipe", RECIPE, "--batch", 4, "--vs", versus, *more)
    assert (result["graph_breaks"], result["recompiles"]) == (0, 0)


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_steps_are_as_deterministic_as_a_runs(monkeypatch, wanted):
    """Of a network with an operation that strict mode refuses, which a run trains as well, with the same parts."""
    trunk, built = SimpleNamespace(module=Unpooled()), []
    network = SimpleNamespace(build=lambda **frozen: built.append(frozen) or trunk)
    monkeypatch.setattr(step, "declared", lambda model: network)
    recipe = load(RECIPE, [f"parallel.deterministic={wanted}", "parallel.compile=false", "parallel.precision=float32"])
    with process_group() as world, step.as_a_run(recipe, world):
        assert torch.are_deterministic_algorithms_enabled() == (wanted == "true")
        assert torch.is_deterministic_algorithms_warn_only_enabled() == (wanted == "true")
    assert built == [{"freeze_patch_projection": True}] * (wanted == "true")


def test_full_memory_is_one_line(found, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(step, "train_step", full)
    left = "^CPU had no memory left for 2.50 GiB more; pass a smaller --batch{}$"
    less = " or train.micro_batch_size=N or parallel.activation_checkpoint="
    for command, mode, stronger in (("step", "none", "selective"), ("checkpoint", "selective", "full")):
        with pytest.raises(RunFailed, match=left.format(less + stronger)):
            found(command, "--recipe", RECIPE, "--batch", 2, f"parallel.activation_checkpoint={mode}")
    resnet = [*KINDS["resnet"], "parallel.activation_checkpoint=selective"]
    with pytest.raises(RunFailed, match=left.format("")):  # no micro-batches of BatchNorm, nor blocks in full
        found("step", "--recipe", RECIPE, "--batch", 2, *resnet)


def test_checkpoint(found, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = found("checkpoint", "--recipe", RECIPE, "--batch", 4, NO_DATA)
    assert result.keys() == {"stall_seconds", "step_seconds", "gigabytes"}
    assert result["stall_seconds"] > 0
    assert result["step_seconds"] > 0
    # Weights of both encoders, the predictor, and two moments of what is trained: of some 700,000 parameters.
    assert 0.005 < result["gigabytes"] < 0.05
    assert not list(tmp_path.iterdir())


def test_data(found, monkeypatch):
    monkeypatch.setattr(data, "FILES", {kind: files._replace(count=1) for kind, files in data.FILES.items()})
    monkeypatch.setattr(data, "ROUNDS", 1)
    result, sides = found("data"), ("images_per_second_per_core", "reference_images_per_second_per_core", "ratio")
    assert result.keys() == {kind + key for kind in ("", "large_") for key in sides}
    for kind in ("", "large_"):
        ours, theirs, ratio = (result[kind + key] for key in sides)
        assert ratio == pytest.approx(ours / theirs)
    assert result["images_per_second_per_core"] > result["large_images_per_second_per_core"]


def test_its_files_are_photographs_of_the_size_that_it_says():
    files = data.make_files(data.Files(4, 500, 375))
    assert 50_000 < np.mean([len(file) for file in files]) < 60_000
    assert len({file[-2000:] for file in files}) == 4
    (large,) = data.make_files(data.Files(1, 2000, 1500))
    images = [to_rgb(decode(file)) for file in (*files, large)]
    assert [image.size for image in images] == [(500, 375)] * 4 + [(2000, 1500)]


def test_without_photographs_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"^bench data needs the photographs of scikit-learn.* do `pip install"):
        data.measure_data()


def test_both_pipelines_give_two_views():
    files = data.make_files(data.Files(2, 500, 375))
    views = data.transform(files, [data.published_pipeline(view) for view in (0, 1)])
    assert [view.shape for view in views] == [(3, 224, 224)] * 4
    crops = np.zeros((2, 3, data.SIZE, data.SIZE), np.uint8)
    data.cut(files, data.Crops(data.SIZE, data.CROP_MIN), crops)
    assert all(crop.std() > 10 for crop in crops)


def test_loss(found):
    result = found("loss", "--global-batch", 64, "--local-batch", 8, "--dim", 16)
    assert result.keys() == {"peak_memory_gb", "seconds", "dense_seconds"}
    assert result["seconds"] > 0
    assert result["dense_seconds"] > 0


def test_both_losses_are_one():
    q, k = torch.randn(4, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64)
    dense = loss.dense_loss(q, k)
    torch.testing.assert_close(dense, contrastive_loss(q, k, 0, loss.TEMPERATURE, chunk=5).loss)
    similarity = F.cosine_similarity(q[:, None], k[None], dim=2)
    assert dense.item() == pytest.approx(0.4 * F.cross_entropy(similarity / 0.2, torch.arange(4)).item())


def test_no_dense_loss_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(loss, "free_memory", lambda device: 2 * 3 * 4 * 8 * 64 - 1)
    assert loss.measure_loss(64, 8, 4, torch.device("cpu"))["dense_seconds"] is None
    monkeypatch.setattr(loss, "free_memory", lambda device: 2 * 3 * 4 * 8 * 64)
    assert loss.measure_loss(64, 8, 4, torch.device("cpu"))["dense_seconds"] is not None


@pytest.mark.parametrize(("keys", "gigabytes"), [(65536, 0.5), pytest.param(131072, 0.7, marks=pytest.mark.slow)])
def test_memory_of_large_batches(keys, gigabytes):
    """In a process of its own, which has done nothing larger; what the dense loss holds would be above it."""
    assert loss.DENSE_MATRICES * 4 * keys * 1024 / 1e9 > gigabytes
    program = (
        "import torch; from engine.benchmarks import loss; loss.REPEATS = 1; loss.free_memory = lambda device: 0; "
        f"print(loss.measure_loss({keys}, 1024, 256, torch.device('cpu'))['peak_memory_gb'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert keys * 256 * 4 / 1e9 < float(done.stdout) < gigabytes  # the keys alone are the least


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["stp"], "argument COMMAND: invalid choice: 'stp'"),
        (["step"], "the following arguments are required: --recipe; see `python -m engine.bench step --help`"),
        (["step", "--recipe", ROOT / "recipes/linear_vit.yaml"], r"task \(linear\) must be pretrain"),
        (["step", "--recipe", RECIPE, "--batch", 1], r"--batch \(1\) must be >= 2"),
        (["checkpoint", "--recipe", RECIPE, *UNKNOWN], r"^model.name \(timm/no_such\) must be a timm model"),
        (["step", "--recipe", RECIPE, "parallel.compil=true"], "did you mean parallel.compile"),
        (["step", "--recipe", RECIPE, "--profile", ROOT], r"--profile \(.*\) must be a file in a folder that ex"),
        (["step", "--recipe", RECIPE, "--profile", "no/such/out.json"], "must be a file in a folder that exists"),
        (
            ["loss", "--global-batch", 8, "--local-batch", 16],
            r"--local-batch \(16\) must be at most --global",
        ),
        (["loss", "--global-batch", 0, "--local-batch", 1], r"--global-batch \(0\) must be >= 1"),
        (["data", "more"], "unrecognized arguments: more"),
    ],
)
def test_refusals(arguments, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        bench.main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)


def test_the_launch_must_suit(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"^train.global_batch_size \(128\) must be divisible by the number of proc"):
        bench.main(["step", "--recipe", str(RECIPE)])
    monkeypatch.delenv("WORLD_SIZE")
    with process_group() as world, pytest.raises(UserError, match=r"^--vs \(reference\) must be none with several"):
        measure_step(load(RECIPE), replace(world, size=3), "reference", None)
