"""Inputs and comparisons that the interpreter's tests share; the oracle is reference.attention in
float64."""

from __future__ import annotations

import torch

from flexattn import create_block_mask
from flexattn.attention import AuxRequest, _call
from flexattn.reference import attention
from flexattn.runtime import launch_gpu


def tensors(batch, kv_heads, group, q_len, kv_len, dims, dtype=torch.float32, kv_batch=None):
    """Fresh q, k and v."""
    kv_batch = kv_batch or batch
    return (torch.randn(batch, kv_heads * group, q_len, dims[0], dtype=dtype),
            torch.randn(kv_batch, kv_heads, kv_len, dims[0], dtype=dtype),
            torch.randn(kv_batch, kv_heads, kv_len, dims[1], dtype=dtype))


def make_call(q, k, v, score_mod, mask, scale, aux, options):
    """A validated call; the default scale where it is None."""
    return _call(q, k, v, score_mod, mask, q.shape[-1] ** -0.5 if scale is None else scale, aux,
                 options)


def call_of(q, k, v, score_mod=None, mask_mod=None, block=16, scale=None, options=None):
    """A validated call that wants lse and max_scores."""
    mask = mask_mod and create_block_mask(mask_mod, q.shape[0], q.shape[1], q.shape[2],
                                          k.shape[2], BLOCK_SIZE=block)
    return make_call(q, k, v, score_mod, mask, scale, AuxRequest(True, True), options or {})


def check(q, k, v, score_mod=None, mask_mod=None, tolerance=2e-5, scale=None, block=16):
    """out, lse and max_scores of the kernel equal those of the oracle."""
    found = launch_gpu.forward(call_of(q, k, v, score_mod, mask_mod, block, scale))
    wanted = attention(q, k, v, score_mod, mask_mod, scale, torch.float64)
    for x, y in zip((found.out, found.lse, found.max_scores), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def gradients(q, k, v, score_mod, mask_mod, captures, d_out, d_lse, options=None, block=16):
    """Those of the kernel, in the order query, key, value, captures."""
    call = call_of(q, k, v, score_mod, mask_mod, block, None, options)
    result = launch_gpu.forward(call)
    found = launch_gpu.backward(call, result, d_out, d_lse)
    order = {id(t): g for t, g in zip(call.score.captures if call.score else (), found.captures,
                                      strict=True)}
    return [found.query, found.key, found.value, *(order[id(t)] for t in captures)]


def check_gradients(q, k, v, score_mod=None, mask_mod=None, captures=(), with_lse=True,
                    tolerance=5e-5, options=None, block=16):
    """Gradients of the kernel equal those of the oracle; gives the kernel's."""
    d_out = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    d_lse = torch.randn(q.shape[:3]) if with_lse else None
    found = gradients(q, k, v, score_mod, mask_mod, captures, d_out, d_lse, options, block)
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse, _ = attention(*inputs, score_mod, mask_mod, None, torch.float64)
    loss = (out * d_out.double()).sum()
    if d_lse is not None:
        loss = loss + torch.where(lse.isinf(), 0.0, lse * d_lse.double()).sum()
    wanted = torch.autograd.grad(loss, [*inputs, *captures])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance,
                                   atol=tolerance * max(1.0, float(y.abs().max())))
    return found
