"""Orders of the cells of a grid (pixels, voxels) in a sequence, and their coordinates.

A shape is (height, width), (depth, height, width), ... A `Layout` maps a traced position in the
sequence to its coordinates. `tiled_order` and `morton_order` give the permutation that brings
row-major tokens into that order: `x[:, :, order]`; `inverse(order)` brings results back.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import Index, index_tensor, integers

Shape = tuple[int, ...]
Layout = Callable[[Index], tuple[Index, ...]]


def unravel(idx: Index, shape: Shape) -> tuple[Index, ...]:
    """Row-major coordinates: idx = (c0 * shape[1] + c1) * shape[2] + c2."""
    coordinates = []
    for size in reversed(shape[1:]):
        coordinates.append(idx % size)
        idx = idx // size
    return (idx, *reversed(coordinates))


def row_major(shape: Shape) -> Layout:
    """Rows one after the other, the order of `x.flatten()`."""
    return lambda idx: unravel(idx, shape)


def tiled(shape: Shape, tile: Shape) -> Layout:
    """Tiles one after the other in row-major order, and so the cells in each tile."""
    grid = tiles_of(shape, tile)
    cells = prod(tile)

    def coordinates(idx: Index) -> tuple[Index, ...]:
        corner, inner = unravel(idx // cells, grid), unravel(idx % cells, tile)
        return tuple(c * t + i for c, t, i in zip(corner, tile, inner, strict=True))

    return coordinates


def tabulated(coordinates: Tensor) -> Layout:
    """Coordinates read from an integer tensor of shape [dimensions, S]."""
    tables = index_tensor("coordinates", coordinates, "[dimensions, S]").unbind()
    return lambda idx: tuple(table[idx] for table in tables)


def tiles_of(shape: Shape, tile: Shape) -> Shape:
    """The number of tiles along each dimension. Errors: ArgumentError if they do not fit."""
    shape = integers("shape", shape)
    tile = integers("tile", tile, len(shape))
    if any(s % t for s, t in zip(shape, tile, strict=True)):
        raise ArgumentError(message("the tile does not divide the shape",
                                    expected=f"divisors of {shape}", got=str(tile),
                                    remedy="pad the canvas to a multiple of the tile"))
    return tuple(s // t for s, t in zip(shape, tile, strict=True))


def tiled_order(shape: Shape, tile: Shape, device: torch.device | str | None = None) -> Tensor:
    """int64 [S]: the row-major position of each token of the tiled sequence.

    Errors: ArgumentError if the tile does not divide the shape.
    """
    grid = tiles_of(shape, tile)
    split = [n for pair in zip(grid, tile, strict=True) for n in pair]
    positions = torch.arange(prod(shape), device=device).view(split)
    dimensions = len(shape)
    return positions.permute(*range(0, 2 * dimensions, 2), *range(1, 2 * dimensions, 2)).flatten()


def morton_order(shape: Shape, device: torch.device | str | None = None) -> Tensor:
    """int64 [S]: the row-major position of each token of the Z-ordered sequence.

    Cells are sorted by their Morton code, the bits of the coordinates interleaved, so blocks of
    4, 16, 64, ... tokens are squares. Any shape: cells outside of it are left out.
    """
    shape = integers("shape", shape)
    positions = torch.arange(prod(shape), device=device)
    coordinates = unravel(positions, shape)
    code = torch.zeros_like(positions)
    for bit in range(max(shape).bit_length()):
        for i, c in enumerate(reversed(coordinates)):
            code = code | ((c >> bit) & 1) << (bit * len(shape) + i)
    return code.argsort()


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: `x[:, :, order][:, :, inverse(order)]` is x."""
    order = index_tensor("order", order, "[S]").long()
    undone = torch.empty_like(order)
    undone[order] = torch.arange(len(order), device=order.device)
    return undone
