"""Errors of the attention kernels against torch in float64: JSON, a row for each case.

    TRITON_INTERPRET=1 python -m tests.models.short_attention   # in float32, by Triton's interpreter
    python -m tests.models.short_attention                      # in bf16, on a GPU

Relative, of the output and of the gradients of queries, keys and values.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import short_scaled_dot_product_attention

CASES = [(2, 197, 3, 32), (1, 129, 2, 64), (1, 256, 2, 64), (1, 50, 2, 64), (2, 5, 1, 32)]  # N, T, H, E
MANY_HEADS = [(4100, 17, 16, 32)]  # more than a grid's second dimension has room for


def errors(N: int, T: int, H: int, E: int) -> list[float]:
    torch.manual_seed(T)
    place = {"device": "cuda", "dtype": torch.bfloat16} if torch.cuda.is_available() else {}
    qkv_NT3HE, d_out_NTHE = 2 * torch.randn(N, T, 3, H, E, **place), torch.randn(N, T, H, E, **place)
    qkv_NT3HE.requires_grad_()
    out_NTHE, _ = short_scaled_dot_product_attention(qkv_NT3HE)
    out_NTHE.backward(d_out_NTHE)

    exact = qkv_NT3HE.detach().double().requires_grad_()
    q_NHTE, k_NHTE, v_NHTE = exact.permute(2, 0, 3, 1, 4).unbind()
    expected_NTHE = F.scaled_dot_product_attention(q_NHTE, k_NHTE, v_NHTE).transpose(1, 2)
    expected_NTHE.backward(d_out_NTHE.double())
    pairs = zip(qkv_NT3HE.grad.unbind(2), exact.grad.unbind(2), strict=True)
    return [_error(out_NTHE, expected_NTHE), *(_error(found, expected) for found, expected in pairs)]


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    cases = CASES + (MANY_HEADS if torch.cuda.is_available() else [])
    print(json.dumps({"errors": [errors(*case) for case in cases]}))
