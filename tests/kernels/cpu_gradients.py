"""Gradients of the CPU kernels from plain functions, and their comparison with the dense oracle."""

from __future__ import annotations

import torch

from flexattn.reference import attention
from flexattn.runtime.launch_cpu import forward
from flexattn.runtime.launch_cpu_backward import backward
from tests.kernels.cpu_attend import call_of, close

# Largest error allowed, relative to the largest gradient: rounding of out, of the result, of sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-10,
             torch.float64: 1e-13}


def differentiate(q, k, v, make=None, mask_mod=None, captured=(), scale=None, block=128,
                  d_out=None, d_lse=None):
    """The kernels' Gradients; `make(*captured)` is the score mod. Without d_out, of all ones."""
    captured = [t.detach().requires_grad_() for t in captured]
    call = call_of(q, k, v, make and make(*captured), mask_mod, scale, block)
    result = forward(call)
    d_out = torch.ones_like(result.out) if d_out is None else d_out
    return backward(call, result, d_out, d_lse)


def expected_gradients(q, k, v, make, mask_mod, captured, scale, d_out, d_lse):
    """The dense oracle's, by autograd in float64."""
    wide = [t.detach().double().requires_grad_() for t in (q, k, v, *captured)]
    out, lse, _ = attention(*wide[:3], make and make(*wide[3:]), mask_mod, scale)
    total = (out * d_out.double()).sum()
    if d_lse is not None:
        total = total + (lse * d_lse.double())[lse.isfinite()].sum()
    return torch.autograd.grad(total, wide, allow_unused=True)


def check_gradients(q, k, v, make=None, mask_mod=None, captured=(), scale=None, block=128,
                    with_lse=True, slack=1.0):
    """Compare all gradients with the oracle's; gives the kernels'."""
    d_out = torch.randn(*q.shape[:3], v.shape[-1]).to(q.dtype)
    real = torch.float64 if q.dtype is torch.float64 else torch.float32
    d_lse = torch.randn(q.shape[:3], dtype=real) if with_lse else None
    got = differentiate(q, k, v, make, mask_mod, captured, scale, block, d_out, d_lse)
    wanted = expected_gradients(q, k, v, make, mask_mod, captured, scale, d_out, d_lse)
    case = f"q {tuple(q.shape)} k {tuple(k.shape)} v {tuple(v.shape)} {q.dtype}"
    names = ["d_query", "d_key", "d_value", *(f"captured {i}" for i in range(len(captured)))]
    grads = (got.query, got.key, got.value, *(g for g in got.captures if g is not None))
    for name, x, given, want in zip(names, (q, k, v, *captured), grads, wanted, strict=True):
        assert given.shape == x.shape and given.dtype == x.dtype, name
        want = torch.zeros_like(given).double() if want is None else want
        close(given, want, slack * TOLERANCE[q.dtype], f"{name}, {case}")
    return got
