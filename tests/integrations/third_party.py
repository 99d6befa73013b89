"""Code as third parties write it for torch's flex_attention: it knows nothing of flexattn.

In the manner of a gallery of masks and mods (closures that name themselves, signatures imported
from torch, everything wrapped in torch.compile), and of a trainer's attention module (which asks
for torch's class).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    _mask_mod_signature,
    _score_mod_signature,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

flex_attention_compiled = torch.compile(flex_attention, dynamic=False)


# A gallery


def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def generate_sliding_window(window_size: int) -> _mask_mod_signature:
    def sliding_window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx - kv_idx <= window_size

    sliding_window_mask = and_masks(sliding_window, causal_mask)
    sliding_window_mask.__name__ = f"sliding_window_{window_size}"
    return sliding_window_mask


def generate_prefix_lm_mask(prefix_length: int) -> _mask_mod_signature:
    def prefix_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < prefix_length

    return or_masks(prefix_mask, causal_mask)


def _offsets_to_doc_ids_tensor(offsets: Tensor) -> Tensor:
    counts = offsets[1:] - offsets[:-1]
    return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts)


def generate_doc_mask_mod(mask_mod: _mask_mod_signature, offsets: Tensor) -> _mask_mod_signature:
    """A mask inside of each document."""
    document_id = _offsets_to_doc_ids_tensor(offsets)

    def doc_mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same_doc = document_id[q_idx] == document_id[kv_idx]
        q_logical = q_idx - offsets[document_id[q_idx]]
        kv_logical = kv_idx - offsets[document_id[kv_idx]]
        return same_doc & mask_mod(b, h, q_logical, kv_logical)

    return doc_mask_mod


def generate_alibi_bias(heads: int) -> _score_mod_signature:
    def alibi_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        scale = torch.exp2(-((h + 1) * 8.0 / heads))
        return score + (kv_idx - q_idx) * scale

    return alibi_mod


def generate_tanh_softcap(soft_cap: int) -> _score_mod_signature:
    def tanh_softcap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return soft_cap * torch.tanh(score / soft_cap)

    tanh_softcap.__name__ = f"tanh_softcap_{soft_cap}"
    return tanh_softcap


@lru_cache
def create_block_mask_cached(score_mod: Any, B: Any, H: Any, M: int, N: int) -> BlockMask:
    return create_block_mask(score_mod, B, H, M, N, device="cpu", _compile=False)


OFFSETS = torch.tensor([0, 13, 40, 41, 70])
GALLERY: dict[str, tuple[Any, Any]] = {
    "noop": (None, noop_mask),
    "causal": (None, causal_mask),
    "alibi": (generate_alibi_bias(4), causal_mask),
    "sliding window": (None, generate_sliding_window(9)),
    "prefix": (None, generate_prefix_lm_mask(17)),
    "documents": (None, generate_doc_mask_mod(generate_sliding_window(5), OFFSETS)),
    "softcap": (generate_tanh_softcap(30), causal_mask),
    "softcap, alibi, prefix": (lambda s, b, h, i, j: generate_tanh_softcap(20)(
        generate_alibi_bias(4)(s, b, h, i, j), b, h, i, j), generate_prefix_lm_mask(8)),
}


def dense_mask(mask_mod: Any, length: int) -> Tensor:
    return create_mask(mask_mod, None, None, length, length, device="cpu")


# A trainer


class SelfAttention(nn.Module):
    """Takes torch's block mask, or a tensor; grouped heads; a learned temperature."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * kv_heads * self.dim)
        self.output_proj = nn.Linear(width, width)
        self.log_temperature = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, mask: BlockMask | Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv_proj(x).view(batch, length, 2, self.kv_heads, self.dim).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        temperature = self.log_temperature.exp()
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, partial(scaled, temperature), mask, enable_gqa=True,
                                 kernel_options={"BLOCK_M": 64})
        else:
            out = nn.functional.scaled_dot_product_attention(
                q * temperature[:, None, None], k, v, mask, enable_gqa=True)
        return self.output_proj(out.transpose(1, 2).reshape(batch, length, -1))


def scaled(temperature: Tensor, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score * temperature[h]
