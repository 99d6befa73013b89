"""Neighbourhoods on images and videos, whose cells lie in a sequence in some order.

Shapes, kernels and tiles are (height, width) or (depth, height, width). Positions beyond the
canvas (prod(shape) tokens) are never meaningful for the natten masks; the sliding tile masks may be
followed by text. Rejects: kernels that exceed the canvas, tiles that do not divide it.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import Index, MaskMod, integer, integers
from flexattn.masks.layouts import (
    Layout,
    Shape,
    morton_order,
    row_major,
    tabulated,
    tiled,
    tiles_of,
    unravel,
)


def natten(shape: Shape, kernel: Shape) -> MaskMod:
    """Neighbourhood attention: a cell attends the `kernel` cells around it, row-major order.

    In each dimension: `start <= kv < start + kernel`, `start = clamp(q - kernel // 2, 0, size -
    kernel)`: at the border the neighbourhood is moved inwards, so each query has prod(kernel) keys.

    Source: NATTEN, Hassani et al. 2023, https://arxiv.org/abs/2204.07143.
    Errors: ArgumentError if the kernel exceeds the shape or has another number of dimensions.
    Example: `natten((64, 64), (13, 13))`, `natten((16, 32, 32), (5, 9, 9))`.
    """
    shape, kernel = _shape_and_kernel(shape, kernel)
    return _neighborhood(row_major(shape), shape, kernel)


def tiled_natten(shape: Shape, kernel: Shape, tile: Shape) -> MaskMod:
    """`natten` for tokens in tiled order (`tiled_order(shape, tile)`): far fewer partial blocks.

    Source: Generalized Neighborhood Attention, Hassani et al. 2025,
    https://arxiv.org/abs/2504.16922 (token permutation).
    Errors: as `natten`; ArgumentError if the tile does not divide the shape.
    Example: `tiled_natten((64, 64), (13, 13), (8, 16))`: a block of 128 tokens is one tile.
    """
    shape, kernel = _shape_and_kernel(shape, kernel)
    return _neighborhood(tiled(shape, integers("tile", tile)), shape, kernel)


def morton_natten(shape: Shape, kernel: Shape, device: torch.device | str | None = None) -> MaskMod:
    """`natten` for tokens in Z-order (`morton_order(shape)`), good for blocks of any power of 4.

    device: where the coordinates of the cells (integer tables) lie: that of the query.

    Errors: as `natten`.
    """
    shape, kernel = _shape_and_kernel(shape, kernel)
    coordinates = torch.stack(unravel(morton_order(shape, device), shape)).to(torch.int32)
    return _neighborhood(tabulated(coordinates), shape, kernel)


def sliding_tile(shape: Shape, kernel: Shape, tile: Shape, text_tokens: int = 0) -> MaskMod:
    """Sliding tile attention: `natten` on whole tiles, so that every block is empty or full.

    Tokens are in tiled order (`tiled_order(shape, tile)`). With t the tile of a token, in each
    dimension: `start <= t[kv] < start + kernel / tile`, start as in `natten`, moved inwards at the
    border. The canvas may be followed by text: it is attended by all, if it is one of the first
    `text_tokens`, and attends the canvas and that text.

    kernel is in cells, like shape and tile.

    Source: Zhang et al. 2025, https://arxiv.org/abs/2502.04507.
    Errors: ArgumentError if the tile divides the shape or the kernel not.
    Example: `sliding_tile((30, 48, 80), (18, 24, 24), (6, 8, 8))`.
    """
    shape, kernel = _shape_and_kernel(shape, kernel)
    grid = tiles_of(shape, tile)
    window = tiles_of(kernel, tile)
    cells, tile_cells = prod(shape), prod(tile)
    end = cells + integer("text_tokens", text_tokens)
    near = _neighborhood(lambda idx: unravel(idx // tile_cells, grid), grid, window)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        on_canvas = (kv_idx < cells) & near(b, h, q_idx, kv_idx)
        return ((q_idx >= cells) | (kv_idx >= cells) | on_canvas) & (kv_idx < end)

    return mask


def _neighborhood(layout: Layout, shape: Shape, kernel: Shape) -> MaskMod:
    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        inside = None
        for q, kv, size, width in zip(layout(q_idx), layout(kv_idx), shape, kernel, strict=True):
            start = torch.clamp(q - width // 2, 0, size - width)
            near = (kv >= start) & (kv < start + width)
            inside = near if inside is None else inside & near
        assert inside is not None
        return inside

    return mask


def _shape_and_kernel(shape: Shape, kernel: Shape) -> tuple[Shape, Shape]:
    shape = integers("shape", shape)
    kernel = integers("kernel", kernel, len(shape))
    if not shape or any(k > s for k, s in zip(kernel, shape, strict=True)):
        raise ArgumentError(message("the kernel does not fit the canvas",
                                    expected=f"at most {shape}", got=str(kernel)))
    return shape, kernel
