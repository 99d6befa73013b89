"""The dense oracle: attention by the formula, with the user's mods called directly.

In: the arguments of flex_attention. Out: out, lse, max_scores, differentiable by autograd. Needs
Q x KV memory. Imports nothing of flexattn, so that an error of the tracer or of a kernel cannot
hide here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, score_mod: Callable | None = None,
              mask_mod: Callable | None = None, scale: float | None = None,
              dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(mask(score_mod(scale * query key^T))) value, computed densely.

    Args:
        query [B, Hq, Q, D], key [B or 1, Hkv, KV, D], value [B or 1, Hkv, KV, Dv]; Hq a multiple
            of Hkv.
        score_mod, mask_mod: as flex_attention and create_block_mask take them.
        scale: default 1 / sqrt(D).
        dtype: of the computation; default float32, float64 for float64 inputs.

    Returns: out [B, Hq, Q, Dv] in the query's dtype (in `dtype` where one is given), lse and
        max_scores [B, Hq, Q]. A fully masked row has out 0 and lse -inf.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> out, lse, max_scores = attention(q, k, v)
        >>> out.shape, lse.shape
        (torch.Size([1, 2, 5, 8]), torch.Size([1, 2, 5]))
    """
    work = dtype or (torch.float64 if query.dtype is torch.float64 else torch.float32)
    batch, heads, q_len, head_dim = query.shape
    repeat = heads // max(key.shape[1], 1)
    q, k, v = (t.to(work).expand(batch, -1, -1, -1) for t in (query, key, value))
    k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    score = q @ k.transpose(-1, -2) * (1 / math.sqrt(head_dim) if scale is None else scale)
    grid = (batch, heads, q_len, k.shape[2])
    indices = [torch.arange(n, device=query.device) for n in grid]
    if score_mod is not None and score.numel():
        score = _each_position(score_mod, (0,))(score, *indices).to(work)
    if mask_mod is not None and score.numel():
        keep = _each_position(mask_mod, ())(*indices)
        score = torch.where(keep, score, -math.inf)
    top = score.amax(-1) if grid[-1] else score.new_full(grid[:3], -math.inf)
    shift = torch.where(top.isinf(), 0.0, top).detach()[..., None]
    weights = torch.exp(score - shift)
    total = weights.sum(-1)
    lse = torch.where(total == 0, -math.inf, total.clamp(min=1e-300).log() + shift[..., 0])
    out = (weights / torch.where(total == 0, 1.0, total)[..., None]) @ v
    return out if dtype else out.to(query.dtype), lse, top


def _each_position(mod: Callable, score: tuple[int, ...]) -> Callable[..., Any]:
    """The mod on scalars, mapped over batch, head, query and key."""
    for axis in range(4):
        mod = torch.vmap(mod, in_dims=(*score, *(0 if i == 3 - axis else None for i in range(4))))
    return mod
