"""The half of a step that all steps share, and that a step's output says what it means."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.distributed.world import process_group
from engine.training.optim import AdamW
from engine.training.step import train_step
from engine.training.update import Update
from tests.replay import Trace, build

GOLDEN = Path(__file__).parents[1] / "golden"


def small_update(**options) -> tuple[nn.Linear, Update]:
    layer = nn.Linear(3, 2).double()
    layer.register_buffer("seen", torch.zeros(4, dtype=torch.float64))
    layer.register_buffer("count", torch.zeros((), dtype=torch.long))
    groups = [
        {"params": [layer.weight], "weight_decay": 0.0, "lr_scale": 0.5},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    return layer, Update(AdamW(groups), dict(layer.named_parameters()), list(layer.buffers()), **options)


def step(layer: nn.Linear, update: Update, factor: float = 1.0):
    update.begin()
    layer.seen += 1
    layer.count += 1
    (layer(torch.ones(1, 3, dtype=torch.float64)).sum() * factor).backward()
    return update.apply(0.01)


def test_each_group_moves_by_its_share_of_the_rate():
    layer, update = small_update()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    applied = step(layer, update)
    # AdamW's first step is the learning rate in every entry.
    assert torch.allclose(weight - layer.weight, torch.full_like(weight, 0.005), rtol=1e-6)
    assert torch.allclose(bias - layer.bias, torch.full_like(bias, 0.01), rtol=1e-6)
    assert applied.grad_norm.item() == pytest.approx(8**0.5)  # eight entries of one
    assert (update.step, update.skipped.item(), applied.skipped.item()) == (1, 0, 0)
    assert layer.seen.tolist() == [1] * 4
    assert layer.weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing_and_is_counted(bad):
    layer, update = small_update()
    step(layer, update)
    before = {name: tensor.clone() for name, tensor in (*layer.state_dict().items(), *update.tensors().items())}
    assert step(layer, update, bad).skipped.item() == 1
    after = layer.state_dict() | update.tensors()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"skipped", "skipped_in_a_row"}
    step(layer, update)
    assert (update.step, update.skipped.item(), update.skipped_in_a_row.item()) == (3, 1, 0)
    assert after["optimizer.step.weight"].item() == 2  # a skipped step is none to AdamW


def test_a_parameter_without_a_gradient_is_named():
    layer, update = small_update()
    update.begin()
    layer.bias.sum().backward()
    with pytest.raises(RuntimeError, match="1 trained parameters took no part in the loss: weight"):
        update.apply(0.01)


def test_a_step_says_what_it_saw():
    """Every field against its meaning, computed from queries and keys: no two can change places."""
    trace = Trace(GOLDEN / "A_vit_adamw.safetensors")
    with process_group() as world:
        state = build(trace, world, "float64", False, "full")
        for number in range(2):
            images = torch.cat([trace[f"images.{view}"][number].double() for view in (1, 2)])
            output = train_step(state, images)
    q, k = (nn.functional.normalize(x, dim=1).unflatten(0, (2, -1)) for x in (output.queries, output.keys))
    similarity = torch.stack([q[0] @ k[1].T, q[1] @ k[0].T])  # [2, B, B]
    own = torch.eye(similarity.shape[1], dtype=torch.bool)
    found = similarity.argmax(2) == torch.arange(similarity.shape[1])
    assert output.positive.item() == pytest.approx(similarity[:, own].mean().item(), rel=1e-12)
    assert output.negative.item() == pytest.approx(similarity[:, ~own].mean().item(), rel=1e-12)
    assert output.top1.item() == pytest.approx(found.double().mean().item(), rel=1e-12)
    logits = (similarity / state.temperature).log_softmax(2)
    assert output.loss.item() == pytest.approx(-4 * state.temperature * logits[:, own].mean().item(), rel=1e-12)
    assert output.features.shape == (len(images), state.moco.width)
    assert output.momentum == state.schedule.momentum_at(1)
    assert output.applied.lr == state.schedule.learning_rate_at(1)
    assert len({output.positive.item(), output.negative.item(), output.top1.item(), output.loss.item()}) == 4
