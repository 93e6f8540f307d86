"""A small checkpoint's content, and the hand of one who forges it."""

import json
from pathlib import Path

import torch

from engine.checkpoint.manifest import NAME, checksum, own_checksum
from engine.checkpoint.state import RunState

SHA = "0" * 64
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


def example_state(step: int) -> RunState:
    return RunState(step, "task: pretrain # \u00fc\n", {"train": "7"}, bad_images=7, made_by={"device": "CPU"})


def example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.weight": torch.randn(33, 7, generator=generator),
        "model.bias": torch.randn(9, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(2**53 + 1),
        "empty": torch.empty(0, 4, dtype=torch.float64),
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: NaN payloads and signed zeros count."""

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(raw(one), raw(other))


def reseal(folder: Path, **changes) -> None:
    """What an attacker does who knows the format: a manifest that is right for the changed files."""
    content = json.loads((folder / NAME).read_text()) | changes
    content["files"] = {name: checksum(folder / name) for name in content["files"] if (folder / name).is_file()}
    content["manifest_sha256"] = own_checksum(content)
    (folder / NAME).write_text(json.dumps(content))
