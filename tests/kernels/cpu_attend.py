"""One call of the CPU kernels from plain functions, and its comparison with the dense oracle."""

from __future__ import annotations

import math

import torch

from flexattn.block_mask import create_block_mask
from flexattn.reference import attention
from flexattn.runtime.call import Call
from flexattn.runtime.launch_cpu import forward
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod

# Largest error allowed, relative to the largest output: rounding of the result, or of the sums; in
# bfloat16 of the probabilities, too, whose errors are relative to values that may cancel.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5 * 2**-8, torch.float16: 2**-11,
             torch.float64: 1e-14}


def call_of(q, k, v, score_mod=None, mask_mod=None, scale=None, block=128, block_mask=None):
    """A call with everything asked for."""
    real = torch.float64 if q.dtype is torch.float64 else torch.float32
    score = None if score_mod is None else specialize(trace_score_mod(score_mod, real))
    mask = None if mask_mod is None else specialize(trace_mask_mod(mask_mod))
    if mask_mod is not None and block_mask is None:
        block_mask = create_block_mask(mask_mod, q.shape[0], q.shape[1], q.shape[2], k.shape[2],
                                       device="cpu", BLOCK_SIZE=block)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Call(q, k, v, scale, score, mask, block_mask, True, True)


def attend(*args, **kwargs):
    """The kernels' Result."""
    return forward(call_of(*args, **kwargs))


def check(q, k, v, score_mod=None, mask_mod=None, scale=None, block=128, slack=1.0):
    """Compare out, lse and max_scores with the oracle in float64; gives the Result."""
    result = attend(q, k, v, score_mod, mask_mod, scale, block)
    out, lse, top = attention(q.double(), k.double(), v.double(), score_mod, mask_mod, scale)
    case = f"q {tuple(q.shape)} k {tuple(k.shape)} v {tuple(v.shape)} {q.dtype}"
    assert result.out.shape == out.shape and result.out.dtype == q.dtype
    close(result.out, out, slack * TOLERANCE[q.dtype], case)
    exact = 1e-13 if q.dtype is torch.float64 else 3e-6
    close(result.lse, lse, slack * exact, f"lse, {case}")
    close(result.max_scores, top, slack * exact, f"max_scores, {case}")
    return result


def close(got, expected, tolerance, case):
    """Equal where infinite or NaN; elsewhere within the tolerance of the largest value."""
    got = got.double()
    special = ~expected.isfinite()
    assert torch.equal(got.isfinite(), ~special), case
    assert torch.equal(got[special].nan_to_num(7.0), expected[special].nan_to_num(7.0)), case
    if expected[~special].numel():
        scale = max(expected[~special].abs().max().item(), 1.0)
        error = (got - expected)[~special].abs().max().item()
        assert error <= tolerance * scale, f"{case}: error {error:.2e}, scale {scale:.2e}"


def tensors(sizes, dtype=torch.float32):
    """Random query, key, value for (batch, kv heads, group, q_len, kv_len, D, Dv)."""
    batch, heads, group, q_len, kv_len, head_dim, value_dim = sizes
    return (torch.randn(batch, heads * group, q_len, head_dim).to(dtype),
            torch.randn(batch, heads, kv_len, head_dim).to(dtype),
            torch.randn(batch, heads, kv_len, value_dim).to(dtype))


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def softcap(score, b, h, q_idx, kv_idx):
    return 20.0 * torch.tanh(score / 20.0)


def alibi(score, b, h, q_idx, kv_idx):
    return score + torch.exp2(-(h + 1.0)) * (kv_idx - q_idx)


INFINITY = math.inf
