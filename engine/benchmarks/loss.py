"""The contrastive loss at large batches, against the same with the whole matrix of logits.

Shapes: B queries of one rank, G keys of all ranks, P width of a query.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.benchmarks.clock import forget_peak, median, peak_memory_gb, timed
from engine.errors import UserError
from engine.training.loss import contrastive_loss

MEMORY = Path("/proc/meminfo")
TEMPERATURE = 0.2
REPEATS = 3
DENSE_MATRICES = 3  # [B, G] at once: logits, their log-softmax, its gradient


def measure_loss(global_batch: int, local_batch: int, dim: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward of one of the two losses of a step, as one rank of the batch computes it.

    peak_memory_gb is what memory grows by, queries and keys included: on a GPU tensors, on a CPU the process's peak
    resident set, which only a process that has done nothing larger before shows. dense_seconds is None where the dense
    loss would not fit into half of the free memory.

    Raises UserError.
    """
    if local_batch > global_batch:
        raise UserError(f"--local-batch ({local_batch}) must be at most --global-batch ({global_batch})")
    forget_peak(device)
    before = peak_memory_gb(device)
    generator = torch.Generator(device).manual_seed(0)
    q_BP = torch.randn(local_batch, dim, generator=generator, device=device, requires_grad=True)
    k_GP = torch.randn(global_batch, dim, generator=generator, device=device)
    own = partial(_run, lambda: contrastive_loss(q_BP, k_GP, 0, TEMPERATURE).loss, q_BP)
    seconds = _seconds(own, device)
    memory = peak_memory_gb(device) - before
    dense = partial(_run, lambda: dense_loss(q_BP, k_GP), q_BP)
    fits = DENSE_MATRICES * 4 * local_batch * global_batch <= free_memory(device) / 2
    dense_seconds = _seconds(dense, device) if fits else None
    return {"peak_memory_gb": memory, "seconds": seconds, "dense_seconds": dense_seconds}


def dense_loss(q_BP: Tensor, k_GP: Tensor) -> Tensor:
    """What `contrastive_loss` computes for the first rank, by one matrix of logits."""
    logits_BG = F.normalize(q_BP, dim=1) @ F.normalize(k_GP, dim=1).T / TEMPERATURE
    return 2 * TEMPERATURE * F.cross_entropy(logits_BG, torch.arange(len(q_BP), device=q_BP.device))


def _run(loss: Callable[[], Tensor], q_BP: Tensor) -> None:
    q_BP.grad = None
    loss().backward()


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    work()
    return median([timed(work, device) for _ in range(REPEATS)]).wall


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMORY.exists():  # Linux; what files fill there is free for whoever needs it
        return 1024 * int(re.search(r"^MemAvailable: +(\d+) kB$", MEMORY.read_text(), re.MULTILINE)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
