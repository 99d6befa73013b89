"""Windows: masks that depend on the distance of query and key, or on which chunk they are in.

A window of w reaches w tokens back, the token itself not counted: a query sees w + 1 keys. Windows
do not include causality; compose them: `and_masks(causal, sliding_window(1024))`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, DtypeError, message
from flexattn.masks.arguments import Index, MaskMod, by_head, integer, ranked


def sliding_window(window: int | Tensor) -> MaskMod:
    """A query attends at most `window` tokens back: `q_idx - kv_idx <= window`.

    Alone it also attends all later keys; the usual local attention is
    `and_masks(causal, sliding_window(1024))`, which sees 1,025 keys: itself and 1,024 before it.
    For a window to both sides see `band`.

    window: int, or an integer tensor of shape [] or, one per query head, [H].

    Source: Child et al. 2019, https://arxiv.org/abs/1904.10509; Mistral 7B, Jiang et al. 2023,
    https://arxiv.org/abs/2310.06825.
    """
    window_of = by_head("window", window)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return q_idx - kv_idx <= window_of(h)

    return mask


def band(left: int | Tensor, right: int | Tensor) -> MaskMod:
    """A query attends `left` tokens back and `right` ahead: `-right <= q_idx - kv_idx <= left`.

    left, right: int, or an integer tensor of shape [] or, one per query head, [H]. `band(w, 0)` is
    causal with a window of w; `band(w, w)` is the bidirectional window of an encoder.

    Source: Longformer, Beltagy et al. 2020, https://arxiv.org/abs/2004.05150.
    """
    left_of, right_of = by_head("left", left), by_head("right", right)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return (q_idx - kv_idx <= left_of(h)) & (kv_idx - q_idx <= right_of(h))

    return mask


def dilated_window(window: int, dilation: int) -> MaskMod:
    """Every `dilation`-th token of a window: `d <= window and d % dilation == 0`.

    d = q_idx - kv_idx; the window is in tokens, not in steps of `dilation`. Compose with `causal`
    like `sliding_window`.

    Source: Longformer, Beltagy et al. 2020, https://arxiv.org/abs/2004.05150, figure 2c.
    Example: `and_masks(causal, dilated_window(12, 4))` sees the tokens 0, 4, 8 and 12 back.
    """
    window, dilation = integer("window", window), integer("dilation", dilation, at_least=1)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        distance = q_idx - kv_idx
        return (distance <= window) & (distance % dilation == 0)

    return mask


def strided(stride: int) -> MaskMod:
    """The last `stride` tokens, and every `stride`-th: `d < stride or d % stride == 0`.

    d = q_idx - kv_idx. Compose with `causal`. Both patterns of the paper in one head; for images
    or music whose rows have `stride` tokens.

    Source: Sparse Transformer, Child et al. 2019, https://arxiv.org/abs/1904.10509, section 4.3.
    """
    stride = integer("stride", stride, at_least=1)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        distance = q_idx - kv_idx
        return (distance < stride) | (distance % stride == 0)

    return mask


def fixed_strided(stride: int, summary: int = 1) -> MaskMod:
    """The own block of `stride` tokens, and the last `summary` tokens of every block.

    `q_idx // stride == kv_idx // stride or kv_idx % stride >= stride - summary`. Compose with
    `causal`.

    Errors: ArgumentError if summary > stride.
    Source: Sparse Transformer, Child et al. 2019, https://arxiv.org/abs/1904.10509, section 4.3.
    """
    stride = integer("stride", stride, at_least=1)
    summary = integer("summary", summary)
    if summary > stride:
        raise ArgumentError(message("summary is larger than the block it summarises",
                                    expected=f"at most stride = {stride}", got=str(summary)))

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        same_block = q_idx // stride == kv_idx // stride
        return same_block | (kv_idx % stride >= stride - summary)

    return mask


def chunked(chunk: int) -> MaskMod:
    """Attention within chunks of `chunk` tokens: `q_idx // chunk == kv_idx // chunk`.

    The local layers of Llama 4 are `and_masks(causal, chunked(8192))`.

    Source: Llama 4 (Meta 2025), `attention_chunk_size`.
    """
    chunk = integer("chunk", chunk, at_least=1)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return q_idx // chunk == kv_idx // chunk

    return mask


def sink_window(window: int | Tensor, num_sinks: int) -> MaskMod:
    """A window, and the first tokens always: `q_idx - kv_idx <= window or kv_idx < num_sinks`.

    window: as in `sliding_window`. Compose with `causal`.

    Source: StreamingLLM, Xiao et al. 2024, https://arxiv.org/abs/2309.17453.
    Example: `and_masks(causal, sink_window(1020, 4))`.
    """
    window_of = by_head("window", window)
    num_sinks = integer("num_sinks", num_sinks)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return (q_idx - kv_idx <= window_of(h)) | (kv_idx < num_sinks)

    return mask


def global_sliding_window(window: int, global_tokens: int | Tensor) -> MaskMod:
    """A window to both sides, and tokens that attend everything and are attended by everything.

    `|q_idx - kv_idx| <= window or is_global[q_idx] or is_global[kv_idx]`.

    global_tokens: an int g (the first g tokens are global), or a bool tensor of shape [S] or
    [B, S] that is True at the global tokens.

    Errors: DtypeError for a tensor that is not bool, ShapeError for other shapes.
    Source: Longformer, Beltagy et al. 2020, https://arxiv.org/abs/2004.05150, section 3.1.
    """
    window = integer("window", window)
    near = band(window, window)
    is_global = _membership(global_tokens)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return near(b, h, q_idx, kv_idx) | is_global(b, q_idx) | is_global(b, kv_idx)

    return mask


def _membership(tokens: int | Tensor) -> Callable[[Index, Index], Tensor]:
    """(b, position) -> whether the token is one of the global ones."""
    if not isinstance(tokens, Tensor):
        count = integer("global_tokens", tokens)
        return lambda b, position: position < count
    if tokens.dtype is not torch.bool:
        raise DtypeError(message("global_tokens has the wrong dtype", expected="torch.bool",
                                 got=str(tokens.dtype), remedy="pass global_tokens.bool()"))
    table = ranked("global_tokens", tokens, "[S]", "[B, S]")
    if table.dim() == 1:
        return lambda b, position: table[position]
    return lambda b, position: table[b, position]
