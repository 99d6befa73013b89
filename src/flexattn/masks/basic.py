"""Causal masks, prefixes and padding: masks that compare a position with one bound.

Every mask takes (b, h, q_idx, kv_idx) and gives a bool, True where the query attends the key.
Lengths and offsets may be an int, an integer tensor of shape [] or, one per sequence, [B].
"""

from __future__ import annotations

from torch import Tensor

from flexattn.masks.arguments import Index, MaskMod, by_batch, integer


def causal(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
    """A token attends itself and what came before: `kv_idx <= q_idx`.

    Itself a mask: pass `causal`, not `causal()`. Position 0 of the queries is position 0 of the
    keys; for queries that are the end of a longer cache see `offset_causal`.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.3.
    """
    return q_idx >= kv_idx


def offset_causal(offset: int | Tensor) -> MaskMod:
    """Causal for queries that start at position `offset` of the keys: `kv_idx <= q_idx + offset`.

    offset: int (it may be negative), or an integer tensor of shape [] or [B], such as the length
    of each sequence's KV cache before the new tokens. New values in the tensor need a new block
    mask, but no new code.

    Errors: DtypeError, ShapeError for other tensors.

    Example: `create_block_mask(offset_causal(cache_lengths), B, None, 1, max_length)`.
    """
    offset_of = by_batch("offset", offset, at_least=None)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return kv_idx <= q_idx + offset_of(b)

    return mask


def bottom_right_causal(q_len: int, kv_len: int) -> MaskMod:
    """Causal with the last query aligned to the last key: `kv_idx <= q_idx + kv_len - q_len`.

    This is what FlashAttention (since 2.1) calls causal when the lengths differ. With more queries
    than keys the first q_len - kv_len queries attend nothing.

    Errors: ArgumentError for negative lengths.
    """
    return offset_causal(integer("kv_len", kv_len) - integer("q_len", q_len))


def prefix_lm(prefix_length: int | Tensor) -> MaskMod:
    """Bidirectional over the prefix, causal after: `kv_idx < prefix_length or kv_idx <= q_idx`.

    prefix_length: int, or an integer tensor of shape [] or [B].

    Source: T5, Raffel et al. 2020, https://arxiv.org/abs/1910.10683, figure 4.
    Example: `create_block_mask(prefix_lm(torch.tensor([3, 700])), 2, None, 1024, 1024)`.
    """
    length_of = by_batch("prefix_length", prefix_length)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return (kv_idx < length_of(b)) | (q_idx >= kv_idx)

    return mask


def padding(length: int | Tensor) -> MaskMod:
    """Keys padded on the right are hidden: `kv_idx < length`.

    length: number of real tokens, int or an integer tensor of shape [] or [B]. Queries in the
    padding attend the real keys: ignore their rows. Compose: `and_masks(causal, padding(lengths))`.
    """
    length_of = by_batch("length", length)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return kv_idx < length_of(b)

    return mask


def left_padding(pad_length: int | Tensor) -> MaskMod:
    """Keys padded on the left are hidden: `kv_idx >= pad_length`.

    pad_length: number of padding tokens, int or an integer tensor of shape [] or [B]. Under
    `and_masks(causal, left_padding(pads))` padding queries attend nothing: their output is 0.
    """
    length_of = by_batch("pad_length", pad_length)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return kv_idx >= length_of(b)

    return mask
