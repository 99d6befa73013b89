"""A small byte-level decoder whose attention is given from outside, so that the same weights can
run through flexattn, SDPA or torch's flex_attention.

No positions are embedded: ALiBi with trained slopes tells near from far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.corpus import VOCABULARY

# (query, key, value, slopes) -> out; query has more heads than key and value.
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def alibi(slopes: Tensor) -> Callable[..., Any]:
    """Distance costs: each head has a slope of its own (arXiv 2108.12409)."""
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)
    return score_mod


def documents_causal(documents: Tensor) -> Callable[..., Any]:
    """A byte sees the earlier bytes of its own document, and itself."""
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (documents[b, q_idx] == documents[b, kv_idx]) & (q_idx >= kv_idx)
    return mask_mod


@dataclass(frozen=True)
class Size:
    layers: int = 4
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        q_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.norm_attention = nn.RMSNorm(size.width)
        self.norm_mlp = nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, q_width + 2 * kv_width, bias=False)
        self.out = nn.Linear(q_width, size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)
        self.slopes = nn.Parameter(torch.exp2(-torch.arange(1.0, size.heads + 1)))

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        s = self.size
        q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
        query, key, value = (
            part.unflatten(-1, (-1, s.head_dim)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).split([q_width, kv_width, kv_width], -1))
        attended = attention(query, key, value, self.slopes)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    """Bytes [batch, length] -> logits of the next byte [batch, length, 256]."""

    def __init__(self, size: Size = Size()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, attention: Attention) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, attention)
        return F.linear(self.norm(x), self.embedding.weight) * 4

    def loss(self, inputs: Tensor, targets: Tensor, attention: Attention) -> Tensor:
        """Mean cross entropy in nats a byte."""
        logits = self(inputs, attention)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
