"""The cases: for each variant the mod, the mask, and how SDPA's users write the same thing.

In: a `Shape` and a seed. Out: a `Case` holding tensors and functions that every provider can run.
What SDPA needs in advance (mask or bias tensors that stay the same over a training run) is built
here, outside of what is timed; what depends on trained values is built inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 256
DOCUMENTS = 8
SOFTCAP = 20.0

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """query [batch, heads, q_len, head_dim]; key, value [batch, kv_heads, kv_len, head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.grouped else str(self.heads)
        lengths = str(self.kv_len) if self.q_len == self.kv_len else f"{self.q_len}x{self.kv_len}"
        return f"B{self.batch} H{heads} S{lengths} D{self.head_dim}"

    @property
    def grouped(self) -> bool:
        return self.heads != self.kv_heads

    def inputs(self, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key, value."""
        def make(heads: int, length: int) -> Tensor:
            return torch.randn(self.batch, heads, length, self.head_dim, dtype=self.dtype,
                               device=self.device, requires_grad=requires_grad)
        return (make(self.heads, self.q_len), make(self.kv_heads, self.kv_len),
                make(self.kv_heads, self.kv_len))


@dataclass(frozen=True)
class Case:
    """One variant at one shape. `attended` counts (q_idx, kv_idx) pairs of one head; `trained`
    are captured tensors whose gradient is part of the backward."""

    name: str
    shape: Shape
    sdpa: Attention
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    attended: int = 0
    trained: tuple[Tensor, ...] = field(default=())

    def flops(self, backward: bool) -> float:
        """Floating-point operations of the attended work: 2 matrix products, 5 backward."""
        s = self.shape
        return (10 if backward else 4) * s.batch * s.heads * s.head_dim * self.attended


def _positions(shape: Shape) -> tuple[Tensor, Tensor]:
    return (torch.arange(shape.q_len, device=shape.device)[:, None],
            torch.arange(shape.kv_len, device=shape.device)[None, :])


def _with_mask(shape: Shape, mask: Tensor) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=shape.grouped)


def full(shape: Shape) -> Case:
    return Case("full", shape, lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, enable_gqa=shape.grouped), attended=shape.q_len * shape.kv_len)


def causal(shape: Shape) -> Case:
    q_idx, kv_idx = _positions(shape)
    return Case(
        "causal", shape,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=shape.grouped),
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
        attended=int((q_idx >= kv_idx).sum()))


def softcap(shape: Shape) -> Case:
    """20 * tanh(score / 20): SDPA has no place for it, so its users write the attention out."""
    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shape.grouped:
            k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
        score = q @ k.transpose(-1, -2) / math.sqrt(shape.head_dim)
        return torch.softmax(SOFTCAP * torch.tanh(score / SOFTCAP), dim=-1) @ v

    return Case("softcap", shape, written_out, attended=shape.q_len * shape.kv_len,
                score_mod=lambda score, b, h, q_idx, kv_idx: SOFTCAP * torch.tanh(score / SOFTCAP))


def alibi(shape: Shape) -> Case:
    slopes = torch.exp2(-8 * torch.arange(1, shape.heads + 1, device=shape.device) / shape.heads)
    q_idx, kv_idx = _positions(shape)
    bias = (slopes[:, None, None] * (kv_idx - q_idx)).to(shape.dtype)[None]
    return Case("alibi", shape, _with_mask(shape, bias), attended=shape.q_len * shape.kv_len,
                score_mod=lambda score, b, h, q_idx, kv_idx:
                score + slopes[h] * (kv_idx - q_idx))


def window(shape: Shape) -> Case:
    q_idx, kv_idx = _positions(shape)
    mask = (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)
    return Case("window", shape, _with_mask(shape, mask), attended=int(mask.sum()),
                mask_mod=lambda b, h, q_idx, kv_idx:
                (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW))


def document_ids(length: int, device: str) -> Tensor:
    """Eight documents of uneven lengths (the same for every run)."""
    generator = torch.Generator().manual_seed(8)
    share = 0.5 + torch.rand(DOCUMENTS, generator=generator)
    ends = (share.cumsum(0) / share.sum() * length).round().long()
    return torch.bucketize(torch.arange(length), ends, right=True).clamp(
        max=DOCUMENTS - 1).to(device)


def documents(shape: Shape) -> Case:
    doc = document_ids(shape.kv_len, shape.device)
    mask = doc[:shape.q_len, None] == doc[None, :]
    return Case("documents", shape, _with_mask(shape, mask), attended=int(mask.sum()),
                mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx])


def trained_bias(shape: Shape) -> Case:
    """bias[h, q_idx - kv_idx + S], trained: SDPA's users gather a [H, S, S] tensor each step."""
    length = shape.kv_len
    bias = torch.randn(shape.heads, shape.q_len + length, device=shape.device, requires_grad=True)
    q_idx, kv_idx = _positions(shape)
    distance = q_idx - kv_idx + length

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = bias[:, distance].to(q.dtype)[None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=shape.grouped)

    return Case("trained_bias", shape, gathered, attended=shape.q_len * length, trained=(bias,),
                score_mod=lambda score, b, h, q_idx, kv_idx:
                score + bias[h, q_idx - kv_idx + length])


CASES: dict[str, Callable[[Shape], Case]] = {
    make.__name__: make
    for make in (full, causal, softcap, alibi, window, documents, trained_bias)
}
