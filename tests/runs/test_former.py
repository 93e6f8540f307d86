"""Runs that earlier versions began go on: their checkpoints, and the losses that followed, lie in `former/`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import evaluate
from engine.checkpoint.manifest import read_manifest
from engine.run import main as run_main
from engine.runs.finetune import trunk_values
from engine.weights.opening import open_trunk
from engine.weights.weights import digest

FORMER = Path(__file__).parent / "former"
IMAGES = Path(__file__).parents[2] / "recipes/data/fashion_mnist"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def go_on(name: str, directory: Path) -> None:
    shutil.copytree(FORMER / name, directory)
    recipe, values = str(FORMER / name / "recipe.yaml"), [f"run.dir={directory}", f"data.root={IMAGES}"]
    if name == "finetune":
        checkpoint = str(FORMER / "pretrain_adamw/checkpoints/step_0000004")
        evaluate.main(["finetune", checkpoint, "--recipe", recipe, *values])
    else:
        run_main([recipe, *values])


@pytest.mark.parametrize(
    ("checkpoint", "start"),
    [
        (str(FORMER / "pretrain_adamw/checkpoints/step_0000004"), "9f851301ed087095"),
        ("timm/test_resnet", "dc3be144e20d2b80"),
    ],
)
def test_a_run_from_initial_weights_is_known_by_what_it_began_with(checkpoint, start):
    """Else its resume would be refused as of another network; the values are those of the version before."""
    assert digest(trunk_values(open_trunk(checkpoint, untrained=True))).startswith(start)


def test_a_vit_of_timm_begins_as_in_earlier_versions():
    """To rounding: timm draws by the inverse error function, whose last bit MKL leaves to the CPU's instruction set."""
    values = torch.cat([value.flatten() for _, value in trunk_values(open_trunk("timm/test_vit", untrained=True))])
    waves = torch.sin(torch.arange(len(values), dtype=torch.float64))
    assert float(values.double() @ waves) == pytest.approx(-8.9208173, abs=1e-6)


@pytest.mark.parametrize("name", ["pretrain_adamw", "pretrain_lars", "finetune"])
def test_a_run_goes_on_where_an_earlier_version_stopped(name, tmp_path):
    """10 steps in float64: AdamW with BatchNorm in the trunk and an online probe, LARS, all of fine-tuning."""
    go_on(name, tmp_path / "run")
    ours, theirs = rows(tmp_path / "run"), rows(FORMER / name)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, former in zip(ours, theirs, strict=True):
        for key in former.keys() - {"images_per_second"}:
            # The square roots of eigenvalues near zero magnify rounding.
            tolerance = 1e-6 if key == "rankme" else 1e-9
            assert mine[key] == pytest.approx(former[key], rel=tolerance, abs=1e-9), (former["step"], key)
    newest = max((tmp_path / "run/checkpoints").glob("step_*"))
    assert read_manifest(newest).state["order"] == "sorted"
    assert read_manifest(newest).state["decoder"].startswith("pillow")
