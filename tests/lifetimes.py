"""What calls leave behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from flexattn import create_block_mask, flex_attention


def left_alive(q_len: int, head_dim: int, **kind: Any) -> list[str]:
    """Names of the objects of a forward and backward that live on after it. kind: device and dtype
    of its tensors."""
    made = _call(q_len, head_dim, kind)
    gc.collect()
    return [name for name, reference in made.items() if reference() is not None]


def _call(q_len: int, head_dim: int, kind: dict[str, Any]) -> dict[str, weakref.ref]:
    q, k, v = (torch.randn(1, 2, n, head_dim, requires_grad=True, **kind)
               for n in (q_len, 300, 300))
    bias = torch.randn(2, 700, device=q.device, requires_grad=True)
    kept = torch.rand(300, device=q.device) > 0.5
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: kept[kv_idx], None, None, q_len, 300,
                             device=q.device)
    out = flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx:
                         score + bias[h, q_idx - kv_idx + 300], mask)
    out.sum().backward()
    objects = {"query": q, "key": k, "value": v, "bias": bias, "kept": kept, "out": out,
               "mask": mask}
    return {name: weakref.ref(one) for name, one in objects.items()}
