"""The GPU suite's cases: mods, masks and shapes of one table, made on the device they run on.

In: a `HeadShape`. Out: a `Case` of benchmarks.cases whose `sdpa` is attention without a mod, where
SDPA has a kernel for it (full and causal), or what its users would write. The work that counts is
that of attended pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Attention, Case, Shape
from flexattn import masks, mods

WINDOW = 1024
DOCUMENTS = 12
SOFTCAP = 20.0
WIDTH = 1 << 31  # queries x keys that a mask is counted over at a time


@dataclass(frozen=True)
class HeadShape(Shape):
    """value_dim: where it differs from head_dim."""

    value_dim: int = 0
    device: str = "cuda"

    def __str__(self) -> str:
        return super().__str__() + (f"/{self.value_dim}" if self.value_dim else "")

    def inputs(self, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().inputs(requires_grad)
        if self.value_dim:
            v = torch.randn(*v.shape[:3], self.value_dim, dtype=self.dtype, device=self.device,
                            requires_grad=requires_grad)
        return q, k, v


@dataclass(frozen=True)
class GpuCase(Case):
    """kernels: SDPA runs this case in its own fused kernels, and `sdpa` is plain attention. peer:
    `sdpa` is this case written out."""

    kernels: bool = False
    peer: bool = False

    def flops(self, backward: bool) -> float:
        """2 matrix products forward, 5 backward: 3 over head_dim, 2 over value_dim."""
        s = self.shape
        value_dim = getattr(s, "value_dim", 0) or s.head_dim
        columns = 3 * s.head_dim + 2 * value_dim if backward else s.head_dim + value_dim
        return 2 * s.batch * s.heads * columns * self.attended


def plain(shape: HeadShape, causal: bool) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=shape.grouped)


def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def softcapped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return SOFTCAP * torch.tanh(score / SOFTCAP)


def attended(shape: HeadShape, mask_mod: Callable[..., Any] | None) -> int:
    """Attended pairs of one head, counted over a few rows at a time."""
    if mask_mod is None:
        return shape.q_len * shape.kv_len
    total, step = 0, max(1, WIDTH // (64 * shape.kv_len))
    kv_idx = torch.arange(shape.kv_len, device=shape.device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=shape.device)
    for first in range(0, shape.q_len, step):
        q_idx = torch.arange(first, min(first + step, shape.q_len), device=shape.device)[:, None]
        total += int(mask_mod(zero, zero, q_idx, kv_idx).expand(len(q_idx), shape.kv_len).sum())
    return total


def _case(name: str, shape: HeadShape, score_mod: Callable[..., Any] | None = None,
          mask_mod: Callable[..., Any] | None = None, sdpa: Attention | None = None,
          trained: tuple[Tensor, ...] = ()) -> GpuCase:
    fused = score_mod is None and mask_mod in (None, causal_mask)
    attention = sdpa or plain(shape, mask_mod is causal_mask)
    return GpuCase(name, shape, attention, score_mod, mask_mod, attended(shape, mask_mod), trained,
                   fused, sdpa is not None)


def noop(shape: HeadShape) -> GpuCase:
    return _case("noop", shape)


def causal(shape: HeadShape) -> GpuCase:
    return _case("causal", shape, mask_mod=causal_mask)


def alibi_causal(shape: HeadShape) -> GpuCase:
    slopes = mods.alibi_slopes(shape.heads, shape.device)
    return _case("alibi+causal", shape, mods.alibi(slopes), causal_mask)


def softcap(shape: HeadShape) -> GpuCase:
    """SDPA's users write the attention out."""
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shape.grouped:
            k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
        score = q @ k.transpose(-1, -2) / math.sqrt(shape.head_dim)
        return torch.softmax(SOFTCAP * torch.tanh(score / SOFTCAP), dim=-1) @ v
    return _case("softcap", shape, softcapped, sdpa=eager)


def table(shape: HeadShape) -> GpuCase:
    """A bias for each distance, the same for all heads."""
    length = shape.kv_len
    values = torch.randn(shape.q_len + length, device=shape.device)
    return _case("table", shape, lambda score, b, h, q_idx, kv_idx:
                 score + values[q_idx - kv_idx + length])


def _with_mask_tensor(name: str, shape: HeadShape, mask_mod: Callable[..., Any]) -> GpuCase:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept,
                                              enable_gqa=shape.grouped)
    q_idx = torch.arange(shape.q_len, device=shape.device)[:, None]
    kept = mask_mod(0, 0, q_idx, torch.arange(shape.kv_len, device=shape.device)[None, :])
    return _case(name, shape, mask_mod=mask_mod, sdpa=masked)


def sliding(shape: HeadShape) -> GpuCase:
    return _with_mask_tensor("sliding 1024", shape, lambda b, h, q_idx, kv_idx:
                             (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW))


def documents(shape: HeadShape) -> GpuCase:
    """Twelve documents of uneven lengths, the same in every run."""
    generator = torch.Generator().manual_seed(DOCUMENTS)
    share = 0.5 + torch.rand(DOCUMENTS, generator=generator)
    ends = (share.cumsum(0) / share.sum() * shape.kv_len).round().long()
    document = torch.bucketize(torch.arange(shape.kv_len), ends, right=True).clamp(
        max=DOCUMENTS - 1).to(shape.device)
    return _with_mask_tensor("documents", shape, lambda b, h, q_idx, kv_idx:
                             (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx))


def t5(shape: HeadShape) -> GpuCase:
    return _case("t5 buckets", shape, mods.t5_bias(
        torch.randn(32, shape.heads, device=shape.device)))


def graphormer(shape: HeadShape) -> GpuCase:
    """Paths of up to five edges of eight types between all tokens."""
    path = torch.randint(-1, 8, (shape.q_len, shape.kv_len, 5), dtype=torch.int32,
                         device=shape.device)
    return _case("graphormer edge", shape, mods.graphormer_edge(
        torch.randn(5, 8, shape.heads, device=shape.device), path))


def natten(shape: HeadShape) -> GpuCase:
    """A square image in row-major order: nearly all blocks are partial."""
    side = math.isqrt(shape.q_len)
    return _case("natten", shape, mask_mod=masks.natten((side, side), (side // 4, side // 4)))


def learned_bias(shape: HeadShape) -> GpuCase:
    """bias[h, q_idx - kv_idx + S], trained."""
    length = shape.kv_len
    bias = torch.randn(shape.heads, shape.q_len + length, device=shape.device, requires_grad=True)
    return _case("learned bias", shape, lambda score, b, h, q_idx, kv_idx:
                 score + bias[h, q_idx - kv_idx + length], trained=(bias,))


CASES: dict[str, Callable[[HeadShape], GpuCase]] = {
    make.__name__: make
    for make in (noop, causal, alibi_causal, softcap, table, sliding, documents, t5, graphormer,
                 natten, learned_bias)
}
