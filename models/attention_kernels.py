"""Attention of short sequences on a GPU: all keys of a head are in one program. Imported where there is Triton.

So softmax is taken in one go, and the backward pass of a head is one program, which adds in a fixed order: nothing has
to be added up between programs, no gradient waits in float32, and the three that it gives lie side by side as their
projection wants them. Products are of the input's type, sums and softmax of float32.

Shapes: T tokens, H heads, E channels of a head; K >= T keys and Q queries of a tile. `qkv` is [N, T, 3, H, E].
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward(
    qkv,
    out,
    log_sum,
    scale: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
):
    """out [N, T, H, E] and log_sum [N, H, T], the base-2 logarithm of each softmax's sum; a program for each tile."""
    tiles: tl.constexpr = (T + Q - 1) // Q
    nth, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * Q  # of all heads; the tile's first query
    image, head = (nth // H).to(tl.int64), nth % H
    row: tl.constexpr = 3 * H * E
    query_Q, key_K, channel_E = start + tl.arange(0, Q), tl.arange(0, K), tl.arange(0, E)
    is_query_Q1, is_key_K1 = query_Q[:, None] < T, key_K[:, None] < T
    first = qkv + image * T * row + head * E
    q_QE = tl.load(first + query_Q[:, None] * row + channel_E[None, :], mask=is_query_Q1, other=0.0)
    at_KE = key_K[:, None] * row + channel_E[None, :]
    k_KE = tl.load(first + H * E + at_KE, mask=is_key_K1, other=0.0)
    v_KE = tl.load(first + 2 * H * E + at_KE, mask=is_key_K1, other=0.0)

    logit_QK = tl.where(key_K[None, :] < T, tl.dot(q_QE, tl.trans(k_KE)) * (scale * LOG2_E), float("-inf"))
    top_Q = tl.max(logit_QK, 1)
    share_QK = tl.exp2(logit_QK - top_Q[:, None])
    sum_Q = tl.sum(share_QK, 1)
    out_QE = tl.dot(share_QK.to(v_KE.dtype), v_KE) / sum_Q[:, None]

    own = out + image * T * H * E + head * E
    tl.store(own + query_Q[:, None] * (H * E) + channel_E[None, :], out_QE.to(out.dtype.element_ty), mask=is_query_Q1)
    at_Q = nth.to(tl.int64) * T + query_Q
    tl.store(log_sum + at_Q, top_Q + tl.log2(sum_Q), mask=query_Q < T)


@triton.jit
def backward(
    qkv,
    out,
    log_sum,
    d_out,
    d_qkv,
    scale: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d_qkv, like qkv; a program for each head of each image."""
    image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    row: tl.constexpr = 3 * H * E
    key_K, channel_E = tl.arange(0, K), tl.arange(0, E)
    is_key_K1, at_KE = key_K[:, None] < T, key_K[:, None] * row + channel_E[None, :]
    first, of_out = image * T * row + head * E, image * T * H * E + head * E
    k_KE = tl.load(qkv + first + H * E + at_KE, mask=is_key_K1, other=0.0)
    v_KE = tl.load(qkv + first + 2 * H * E + at_KE, mask=is_key_K1, other=0.0)
    dk_KE, dv_KE = tl.zeros([K, E], tl.float32), tl.zeros([K, E], tl.float32)

    for start in tl.range(0, T, Q, num_stages=STAGES):
        query_Q = start + tl.arange(0, Q)
        is_query_Q1 = query_Q[:, None] < T
        at_QE = first + query_Q[:, None] * row + channel_E[None, :]
        of_out_QE = of_out + query_Q[:, None] * (H * E) + channel_E[None, :]
        q_QE = tl.load(qkv + at_QE, mask=is_query_Q1, other=0.0)
        out_QE = tl.load(out + of_out_QE, mask=is_query_Q1, other=0.0)
        d_out_QE = tl.load(d_out + of_out_QE, mask=is_query_Q1, other=0.0)
        log_sum_Q = tl.load(log_sum + tl.program_id(0).to(tl.int64) * T + query_Q, mask=query_Q < T, other=0.0)

        # Keys come first: the products that sum over queries then need no transposed tile.
        logit_KQ = tl.dot(k_KE, tl.trans(q_QE)) * (scale * LOG2_E)
        share_KQ = tl.where(is_key_K1, tl.exp2(logit_KQ - log_sum_Q[None, :]), 0.0)
        dv_KE = tl.dot(share_KQ.to(d_out_QE.dtype), d_out_QE, dv_KE)
        mean_Q = tl.sum(out_QE.to(tl.float32) * d_out_QE.to(tl.float32), 1)  # of d_share, as the softmax weighs it
        d_logit_KQ = share_KQ * (tl.dot(v_KE, tl.trans(d_out_QE)) - mean_Q[None, :])
        d_logit_KQ = d_logit_KQ.to(q_QE.dtype)
        dk_KE = tl.dot(d_logit_KQ, q_QE, dk_KE)
        dq_QE = tl.dot(tl.trans(d_logit_KQ), k_KE) * scale
        tl.store(d_qkv + at_QE, dq_QE.to(d_qkv.dtype.element_ty), mask=is_query_Q1)

    tl.store(d_qkv + first + H * E + at_KE, (dk_KE * scale).to(d_qkv.dtype.element_ty), mask=is_key_K1)
    tl.store(d_qkv + first + 2 * H * E + at_KE, dv_KE.to(d_qkv.dtype.element_ty), mask=is_key_K1)
