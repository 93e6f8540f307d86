"""Activation checkpoints: what a trunk's blocks keep for their backward pass, and what they compute again for it.

none: all is kept. selective: matrix products, attention, convolutions and what came from other ranks are kept, and what
is cheap is computed again (norms, activations, sums). full: a block's input alone is kept.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.recipe.keys import wrong
from engine.recipe.sections import ActivationCheckpoint
from models.norm import has_batch_norm, without_tracking
from models.trunk import blocks

# Of what compiled code would keep beside its inputs. 0.7 spares all matrix products: a ViT's block keeps 20 bytes for
# each of a token's channels in bf16 in place of 32.
KEPT_SHARE: dict[ActivationCheckpoint, float] = {"none": 1.0, "selective": 0.7, "full": 0.0}

DEAR = {"mm", "addmm", "bmm", "baddbmm", "convolution"}  # and all forms of scaled_dot_product_attention


def check_activation_checkpoint(trunk: nn.Module, mode: ActivationCheckpoint, name: str) -> None:
    """Raises UserError where the blocks of the trunk of this name cannot be checkpointed so."""
    if mode != "none" and not blocks(trunk):
        raise wrong("parallel.activation_checkpoint", mode, f"none for {name}, which has no repeated blocks")
    if mode == "full" and _has_norm_in_blocks(trunk):
        # Their statistics would be sent a second time, and moved.
        must = f"none or selective for {name}, whose blocks have BatchNorm over all ranks"
        raise wrong("parallel.activation_checkpoint", mode, must)


def stronger(mode: ActivationCheckpoint, trunk: nn.Module) -> ActivationCheckpoint | None:
    """The next mode that keeps less of this trunk; None where none does."""
    if mode == "full" or not blocks(trunk) or (mode == "selective" and _has_norm_in_blocks(trunk)):
        return None
    return "selective" if mode == "none" else "full"


def _has_norm_in_blocks(trunk: nn.Module) -> bool:
    return any(map(has_batch_norm, blocks(trunk)))


def checkpoint_forward(block: nn.Module, mode: ActivationCheckpoint) -> None:
    """Let a block's backward pass compute its forward again, in place; for a block that is not compiled."""
    forward, contexts = block.forward, partial(_contexts, block)
    options: dict[str, Any] = {"context_fn": contexts} if mode == "selective" else {}

    @wraps(forward)
    def spare(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # No random numbers are drawn in a block: which branches a drop path leaves out is set before the forward.
        again = partial(forward, **named)
        return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    block.forward = spare


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around the forward, and around what is computed again of it."""
    keep, reuse = create_selective_checkpoint_contexts(_policy)

    @contextmanager
    def again() -> Iterator[None]:
        with without_tracking(block), reuse:
            yield

    return keep, again()


def is_dear(operation: Any) -> bool:
    """Whether a result of this operation is kept under `selective`."""
    name = operation.overloadpacket.__name__
    return name in DEAR or "scaled_dot_product" in name or operation.namespace == "_c10d_functional"


def _policy(_: Any, operation: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_dear(operation) else CheckpointPolicy.PREFER_RECOMPUTE
