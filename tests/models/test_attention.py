"""Attention by a kernel of our own, without a GPU: its results by Triton's interpreter, and what torch knows of it."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch.utils.flop_counter import FlopCounterMode

import models
from engine.training.activation_checkpoint import is_dear
from models import attention
from models.attention import attend
from tests.distributed.launch import ROOT, environment
from tests.models.short_attention import CASES


def test_kernels_give_what_torch_gives():
    pytest.importorskip("triton", reason="there is no Triton, and so no kernel of ours")
    command = [sys.executable, "-m", "tests.models.short_attention"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])["errors"]
    assert len(found) == len(CASES)
    assert all(error < 2e-6 for errors in found for error in errors), found


def test_a_launch_has_one_dimension_and_the_gpu_of_its_tensors(monkeypatch):
    """A grid's other dimensions end at 65,535 programs."""
    grids, devices = [], []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    def device_of(tensor):
        devices.append(tensor.device)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "models.attention_kernels", SimpleNamespace(forward=Kernel(), backward=Kernel()))
    monkeypatch.setattr(models, "attention_kernels", sys.modules["models.attention_kernels"], raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    qkv_NT3HE = torch.empty(4096, 2, 3, 16, 32, requires_grad=True)
    out_NTHE, _ = attention.short_scaled_dot_product_attention(qkv_NT3HE)
    out_NTHE.sum().backward()
    assert grids == [(65536,), (65536,)]
    assert devices == [qkv_NT3HE.device] * 2


def test_on_a_cpu_attention_is_torchs():
    torch.manual_seed(0)
    module, token_NTD = Attention(64, num_heads=2), torch.randn(2, 5, 64)
    assert torch.equal(attend(module, token_NTD), module(token_NTD))


def takes(tokens, width, dtype, compile=torch.compile):
    """Whether code for a GPU takes the kernel."""
    ask = compile(lambda token_NTD: attention.is_short(token_NTD, width), fullgraph=True, backend="eager")
    with torch._subclasses.FakeTensorMode():
        return ask(torch.empty(1, tokens, 8, dtype=dtype, device="cuda"))


def test_a_gpu_takes_the_kernel_for_short_sequences_of_narrow_heads_in_16_bits(monkeypatch):
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    bf16 = torch.bfloat16
    assert [takes(197, 32, bf16), takes(256, 64, bf16)] == [True, True]
    assert [takes(257, 64, bf16), takes(197, 80, bf16), takes(197, 64, torch.float32)] == [False] * 3
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    assert not takes(197, 64, bf16)


def test_code_that_is_not_compiled_needs_no_triton(monkeypatch):
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    assert not takes(197, 64, torch.bfloat16, compile=lambda function, **_: function)


@pytest.mark.parametrize(("kib", "fits"), [(227, True), (163, True), (99, False), (64, False)])
def test_a_gpu_of_little_shared_memory_takes_torchs(monkeypatch, kib, fits):
    gpu = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert attention.has_room(torch.device("cuda", 0)) == fits


@pytest.fixture
def on_meta(monkeypatch):
    """A block of two heads whose attention is by the kernel, without data."""
    monkeypatch.setattr(attention, "is_short", lambda *_: True)
    with torch.device("meta"):
        return Attention(64, num_heads=2), torch.empty(3, 197, 64, requires_grad=True)


def test_it_counts_as_much_work_as_torchs_attention(on_meta):
    module, token_NTD = on_meta

    def flop(forward):
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        return counter.get_total_flops()

    module.fused_attn = True
    own = flop(lambda: attend(module, token_NTD))
    products = 197 * 64 * (3 * 64 + 64) * 2 * 3 * 3  # of both projections, forward, and backward twice
    assert own == products + 3 * 2 * 14 * 197 * 197 * 32


def test_it_compiles_into_one_graph_with_the_gradient_of_the_packed_projection(on_meta):
    module, token_NTD = on_meta
    compiled = torch.compile(lambda x: attend(module, x), fullgraph=True, backend="aot_eager")
    compiled(token_NTD).sum().backward()
    assert token_NTD.grad.shape == token_NTD.shape
    assert module.qkv.weight.grad.shape == (192, 64)


def test_selective_checkpoints_keep_its_result():
    assert is_dear(torch.ops.mocov3.short_scaled_dot_product_attention.default)
