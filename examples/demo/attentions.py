"""The same attention written three ways: flexattn, SDPA with a mask tensor, torch's flex_attention.

Each takes a batch's document numbers and gives the function the model calls in every layer.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from examples.demo.model import Attention, alibi, documents_causal


def with_flexattn(documents: Tensor) -> Attention:
    batch, length = documents.shape
    block_mask = flexattn.create_block_mask(
        documents_causal(documents), batch, None, length, length, device=documents.device)

    def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        return flexattn.flex_attention(query, key, value, score_mod=alibi(slopes),
                                       block_mask=block_mask, enable_gqa=True)
    return attention


def with_sdpa(documents: Tensor) -> Attention:
    """ALiBi and the mask as one [batch, heads, length, length] tensor a layer.

    The slopes are not trained: a mask that needs a gradient costs SDPA its fused kernel.
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    distance = (index[None, :] - index[:, None]).float()
    hidden = (documents[:, :, None] != documents[:, None, :]) | (distance > 0)

    def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        bias = slopes.detach()[:, None, None] * distance
        mask = bias[None].masked_fill(hidden[:, None], float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return attention


def with_torch_flex(documents: Tensor) -> Attention:
    """Without torch.compile, whose CPU code takes some 20 s to build and has no backward."""
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    batch, length = documents.shape
    block_mask = torch_flex.create_block_mask(
        documents_causal(documents), batch, None, length, length, device=str(documents.device))

    def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        out = torch_flex.flex_attention(query, key, value, score_mod=alibi(slopes),
                                        block_mask=block_mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out
    return attention
