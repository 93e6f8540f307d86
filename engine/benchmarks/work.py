"""How much of what a device can do a step uses: the operations that the method needs, over those of the data sheet."""

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.benchmarks.reference import plain_trunk
from models.architecture import Architecture

FORWARDS = 2 * (3 + 1)  # of two views: the base encoder's, whose backward is two more, and the momentum encoder's
PEAKS = {  # dense bf16 operations per second (data sheets) by what CUDA calls the device
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA H200": 989e12,
    r"NVIDIA A100(?!.*MIG)\b.*": 312e12,
}


def useful_flop(architecture: Architecture, image_size: int) -> int:
    """Operations per image of a step, a multiply-add as two: 2 views x (3 base + 1 momentum) forwards of the trunk.

    All tokens pass all blocks and attention counts, whatever the engine saves; recomputation, heads (0.4 % of a ViT-S)
    and loss do not count.
    """
    with torch.device("meta"):
        trunk, images = plain_trunk(architecture), torch.empty(2, 3, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk(images)
    return FORWARDS * counter.get_total_flops() // len(images)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second; None for a device that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if re.fullmatch(name, device_name)), None)
