"""Block diffusion: autoregressive over blocks of tokens, bidirectional inside of them."""

from __future__ import annotations

from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import Index, MaskMod, integer


def block_causal(block: int) -> MaskMod:
    """Causal over blocks of `block` tokens: `kv_idx // block <= q_idx // block`.

    Source: sampling of BD3-LM, Arriola et al. 2025, https://arxiv.org/abs/2503.09573.
    """
    block = integer("block", block, at_least=1)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return kv_idx // block <= q_idx // block

    return mask


def block_diffusion(length: int, block: int) -> MaskMod:
    """Training of block diffusion: the noised text, then the clean text, `length` tokens each.

    With `block_of(idx) = idx % length // block`, a query attends
    - the block at its own place in its own half, and
    - clean blocks before it: `kv_idx >= length and block_of(kv_idx) < block_of(q_idx)`.
    A noised block so sees itself and the clean past, and the clean half is block causal.

    Errors: ArgumentError if the block is longer than the text.
    Source: BD3-LM, Arriola et al. 2025, https://arxiv.org/abs/2503.09573, section 3.2.
    Example: `create_block_mask(block_diffusion(1024, 16), None, None, 2048, 2048)`.
    """
    length = integer("length", length, at_least=1)
    block = integer("block", block, at_least=1)
    if block > length:
        raise ArgumentError(message("the block is longer than the text",
                                    expected=f"at most length = {length}", got=str(block)))

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        q_block, kv_block = q_idx % length // block, kv_idx % length // block
        same_half = q_idx // length == kv_idx // length
        clean_past = (kv_idx >= length) & (kv_block < q_block)
        return (same_half & (q_block == kv_block)) | clean_past

    return mask
