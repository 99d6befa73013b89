"""What passes between attention, autograd and the launchers: a call, its result, its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn.block_mask import BlockMask
from flexattn.trace import Mod


class Call(NamedTuple):
    """A validated attention call.

    query [B, Hq, q_len, D], key [Bkv, Hkv, kv_len, D], value [Bkv, Hkv, kv_len, Dv] with Bkv in
    {1, B} and Hq a multiple of Hkv; any strides, one dtype. `mask` is the traced mask_mod of
    `block_mask` (None: every position of a non-empty block counts).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    score: Mod | None = None
    mask: Mod | None = None
    block_mask: BlockMask | None = None
    want_lse: bool = False
    want_max_scores: bool = False
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """query, key, value, what the score mod captures, what the mask mod captures."""
        return (self.query, self.key, self.value, *(self.score.captures if self.score else ()),
                *(self.mask.captures if self.mask else ()))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """The same call of other tensors, in the order of `tensors`."""
        query, key, value, *captures = tensors
        own = len(self.score.captures) if self.score else 0
        score = _with_captures(self.score, captures[:own])
        mask = _with_captures(self.mask, captures[own:])
        return Call(query, key, value, self.scale, score, mask, *self[6:])


def _with_captures(mod: Mod | None, captures: Sequence[Tensor]) -> Mod | None:
    return Mod(mod.graph, tuple(captures), mod.numbers) if mod and captures else mod


class Result(NamedTuple):
    """out [B, Hq, q_len, Dv] in the query's dtype; lse (natural log), max_scores [B, Hq, q_len]
    in float32 (float64 for float64), None where not asked for."""

    out: Tensor
    lse: Tensor | None = None
    max_scores: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients in the shapes of the call's tensors; `captures` has one entry (or None) for each
    tensor of call.score.captures."""

    query: Tensor
    key: Tensor
    value: Tensor
    captures: tuple[Tensor | None, ...] = ()


def like_query(q: Tensor, value_dim: int) -> Tensor:
    """An output with the query's order of heads and positions in memory."""
    batch, heads, q_len, _ = q.shape
    row, head = value_dim, q_len * value_dim
    if q.stride(1) < q.stride(2):
        row, head = heads * value_dim, value_dim
    return torch.empty_strided((batch, heads, q_len, value_dim),
                               (heads * q_len * value_dim, head, row, 1), dtype=q.dtype,
                               device=q.device)
