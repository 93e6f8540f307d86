"""The loss: golden numbers, and chunked = dense."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.training.loss import contrastive_loss

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("chunk", [5, 8, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_on_any_number_of_ranks(ranks, chunk):
    """Golden: 4 ranks of 8 queries. The mean over ranks, and its gradient, do not depend on how rows are dealt out."""
    golden = load_file(GOLDEN / "G_loss.safetensors")
    q1, q2 = golden["q1"].requires_grad_(), golden["q2"].requires_grad_()
    rows = len(q1) // ranks
    losses = []
    for rank in range(ranks):
        mine = slice(rank * rows, (rank + 1) * rows)
        one = contrastive_loss(q1[mine], golden["k2"], rank * rows, 0.2, chunk)
        two = contrastive_loss(q2[mine], golden["k1"], rank * rows, 0.2, chunk)
        losses.append(one.loss + two.loss)
    if ranks == 4:
        torch.testing.assert_close(torch.stack(losses).detach(), golden["loss_per_rank"], rtol=1e-12, atol=0)
    mean = torch.stack(losses).mean()
    mean.backward()
    torch.testing.assert_close(mean.detach().reshape(1), golden["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(q1.grad, golden["grad_q1"], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(q2.grad, golden["grad_q2"], rtol=1e-9, atol=1e-14)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 7), st.floats(0.05, 2), st.integers(0, 2**31))
def test_chunked_loss_is_dense_loss(rows, others, chunk, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    first = others // 2
    q = torch.randn(rows, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(rows + others, 4, generator=generator, dtype=torch.float64)
    found = contrastive_loss(q, k, first, temperature, chunk)
    found.loss.backward()
    twin = q.detach().requires_grad_()
    similarity = F.normalize(twin, dim=1) @ F.normalize(k, dim=1).T
    labels = torch.arange(first, first + rows)
    dense = 2 * temperature * F.cross_entropy(similarity / temperature, labels)
    dense.backward()
    torch.testing.assert_close(found.loss, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.grad, twin.grad, rtol=1e-8, atol=1e-12)
    assert found.top1.item() == pytest.approx((similarity.argmax(1) == labels).double().mean().item())
    own = similarity[torch.arange(rows), labels]
    assert found.positive.item() == pytest.approx(own.mean().item(), abs=1e-12)
    if rows + others > 1:
        negative = (similarity.sum(1) - own) / (rows + others - 1)
        assert found.negative.item() == pytest.approx(negative.mean().item(), abs=1e-12)


def test_the_graph_keeps_no_matrix_of_logits():
    """What backward holds on to grows with B * P and G * P, not with B * G."""
    held: list[int] = []
    q, k = torch.randn(64, 8, requires_grad=True), torch.randn(4096, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        contrastive_loss(q, k, 0, 0.2, chunk=256)
    assert held
    assert max(held) <= k.numel() < 64 * 4096


def test_half_precision_queries_are_compared_in_float32():
    q, k = torch.randn(8, 16).bfloat16().requires_grad_(), torch.randn(8, 16).bfloat16()
    assert contrastive_loss(q, k, 0, 0.2).loss.dtype == torch.float32
