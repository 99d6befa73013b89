"""Which blocks of a mask are empty, partial or full, as rows of runs.

In: a traced mask mod and the sizes. Out: a `Sparsity`: a `RunTable`, and how it was found. Tiles of
many blocks are split until their interval (analysis.interval) proves them empty or full; what is
undecided at the size of a block goes to `analysis.undecided`. Always equal to evaluating every
element. Memory is bounded: strips of rows of tiles are worked on one after the other, as many at
once as are likely to fit. A dimension (batch, head) that the mod does not read stays broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from flexattn.analysis.bounds import both
from flexattn.analysis.interval import TileIntervals, Tiles
from flexattn.analysis.interval_reads import aligned_span
from flexattn.analysis.runs import (
    EMPTY,
    FULL,
    PARTIAL,
    Pieces,
    RunTable,
    kinds_of_runs,
    pieces_of_kinds,
    run_table,
    runs_of_kinds,
    stacked,
    transposed,
)
from flexattn.analysis.undecided import Found, Grid, Undecided
from flexattn.ir.evaluate import evaluate
from flexattn.ir.mod import Mod

__all__ = ["EMPTY", "FULL", "PARTIAL", "RunTable", "Sparsity", "element_mask", "grid_of",
           "kinds_of_runs", "mask_runs", "mask_sparsity", "runs_of_kinds", "turned_runs"]


class Solver(Protocol):
    """What finds the runs of a mask in a device's own way."""

    def runs(self, mod: Mod, grid: Grid, device: torch.device, max_runs: int | None = None,
             separate: bool = True) -> RunTable | str:
        """The table, or why it has to be found step by step. max_runs: room for so many runs, and
        no wait for the device. separate: False calls full blocks partial."""

    def turned(self, table: RunTable, columns: int, max_runs: int | None = None
               ) -> RunTable | str:
        """The same blocks as rows of `columns` columns, or why not in this way."""

    def check(self, device: torch.device) -> None:
        """Raises ArgumentError where a table had more than max_runs; waits for nothing."""


SOLVERS: dict[str, Callable[[], Solver]] = {}  # by type of device; filled by flexattn.runtime


@dataclass(frozen=True)
class Sparsity:
    """The blocks of a mask, and how many of them were decided how: `tiles` is the number of blocks,
    `witnessed` were seen to hold both true and false at a few points, `split` were decided by
    proofs over parts of them, `evaluated` by evaluating all of their elements; the rest are proved
    as they are. `examples`: (image, row, column) of up to 64 evaluated blocks."""

    table: RunTable
    found: Found
    tiles: int


@dataclass(frozen=True)
class _Plan:
    """Most tiles along an axis at the coarsest level; children along each axis of a tile; tiles
    worked on at once; blocks in the undecided tiles of strips refined together. An accelerator
    likes few, large steps."""

    widest: int
    factor: int
    at_once: int
    strip_tiles: int


_PLANS = {"cpu": _Plan(128, 8, 1 << 18, 1 << 21), "cuda": _Plan(256, 32, 1 << 23, 1 << 23)}
_Tiles = tuple[Tensor, Tensor, Tensor]  # image, row and column of each, int64


def grid_of(mod: Mod, batch: int, heads: int, q_len: int, kv_len: int, q_block: int,
            kv_block: int) -> Grid:
    """The grid of a mask: batch and heads are 1 where the mod does not read them."""
    read = mod.graph.inputs()
    return Grid(batch if "b" in read else 1, heads if "h" in read else 1, q_len, kv_len, q_block,
                kv_block)


def mask_runs(mod: Mod, grid: Grid, device: torch.device) -> RunTable:
    """The exact blocks of a mask, in the device's own way where it has one."""
    found = SOLVERS[device.type]().runs(mod, grid, device) if device.type in SOLVERS else ""
    return _Refinement(mod, grid, device).sparsity().table if isinstance(found, str) else found


def turned_runs(table: RunTable, columns: int) -> RunTable:
    """The same blocks as rows of `columns` columns."""
    device = table.offsets.device.type
    found = SOLVERS[device]().turned(table, columns) if device in SOLVERS else ""
    return transposed(table, columns) if isinstance(found, str) else found


def mask_sparsity(mod: Mod, grid: Grid, device: torch.device) -> Sparsity:
    """The same, step by step, and how it was found."""
    return _Refinement(mod, grid, device).sparsity()


class _Refinement:
    """One mask refined from coarse tiles to blocks. A strip is a row of the coarsest tiles, of one
    image (batch entry and head); strips are numbered in the order of the table's rows."""

    def __init__(self, mod: Mod, grid: Grid, device: torch.device) -> None:
        self.grid, self.device = grid, device
        lengths = {"b": grid.batch, "h": grid.heads, "q_idx": grid.q_len, "kv_idx": grid.kv_len}
        self.intervals = TileIntervals(mod.graph, mod.captures, mod.numbers, lengths,
                                       base=(grid.q_block, grid.kv_block))
        self.plan = _PLANS["cpu" if device.type == "cpu" else "cuda"]
        self.undecided = Undecided(mod, self.intervals, grid, device)
        self.scales = _scales(max(grid.rows, grid.columns), self.plan)
        self.strips_per_image = -(-grid.rows // self.scales[0])

    def sparsity(self) -> Sparsity:
        grid = self.grid
        strips = grid.images * self.strips_per_image
        step = max(self.plan.at_once // max(-(-grid.columns // self.scales[0]), 1), 1)
        tables = [table for first in range(0, strips, step) if grid.columns
                  for table in self._strips(first, min(first + step, strips))]
        if not tables:
            tables = [self._nothing()]
        table = stacked(tables, grid.batch, grid.heads, grid.rows)
        return Sparsity(table, self.undecided.found, grid.images * grid.rows * grid.columns)

    def _strips(self, first: int, end: int) -> Iterator[RunTable]:
        """The rows of strips [first, end), in tables of as many strips as may be split at once."""
        number = torch.arange(first, end, device=self.device)[:, None, None]
        image = number // self.strips_per_image
        row = number - image * self.strips_per_image
        columns = -(-self.grid.columns // self.scales[0])
        column = torch.arange(columns, device=self.device)[None, None]
        kinds = self._kinds(image, row, column, self.scales[0], (end - first, 1, columns))
        for a, b in self._split(kinds):
            below = self._level(image[a:b], row[a:b], column, self.scales[0], kinds[a:b])
            yield self._table(self._descend(*below), self._first_row(first + a),
                              self._first_row(first + b))

    def _split(self, kinds: Tensor) -> list[tuple[int, int]]:
        """Where to cut strips, so that the blocks in undecided tiles of each part fit."""
        strips, most = len(kinds), self.plan.strip_tiles // self.scales[0] ** 2
        if kinds.numel() <= most or self.scales[0] == 1:
            return [(0, strips)]
        cuts, held = [0], 0
        for strip, count in enumerate((kinds == PARTIAL).sum((1, 2)).tolist()):
            if held and held + count > most:
                cuts.append(strip)
                held = 0
            held += count
        return list(zip(cuts, [*cuts[1:], strips], strict=True))

    def _descend(self, pieces: Pieces, parents: _Tiles | None) -> list[Pieces]:
        """All pieces of strips, from those of their coarsest tiles and the undecided ones."""
        found = [pieces]
        for above, scale in pairwise(self.scales):
            if parents is None or not len(parents[0]):
                break
            factor = above // scale
            step = max(self.plan.at_once // factor**2, 1)
            offsets = torch.arange(factor, device=self.device)
            undecided = []
            for first in range(0, len(parents[0]), step):
                image, row, column = (t[first : first + step, None, None] for t in parents)
                row = row * factor + offsets[:, None]
                column = column * factor + offsets
                kinds = self._kinds(image, row, column, scale, (len(image), factor, factor))
                pieces, below = self._level(image, row, column, scale, kinds)
                found.append(pieces)
                undecided += [] if below is None else [below]
            parents = _joined(undecided) if undecided else None
        return found

    def _kinds(self, image: Tensor, row: Tensor, column: Tensor, scale: int,
               shape: tuple[int, int, int]) -> Tensor:
        """uint8 [parents, rows, columns]: what intervals say of tiles of `scale` x `scale` blocks;
        PARTIAL where they leave it open."""
        grid = self.grid
        rows, columns = -(-grid.rows // scale), -(-grid.columns // scale)
        inside: Tensor | bool = True
        if rows % shape[1]:
            inside, row = row < rows, row.clamp(max=rows - 1)
        if columns % shape[2]:
            inside, column = both(inside, column < columns), column.clamp(max=columns - 1)
        tiles = Tiles(*self.grid.entry(image),
                      aligned_span(row, scale * grid.q_block, grid.q_len),
                      aligned_span(column, scale * grid.kv_block, grid.kv_len))
        always, perhaps = self.intervals(tiles)[:2]
        always, perhaps = both(always, inside), both(perhaps, inside)
        kinds = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        return kinds.add_(always).add_(perhaps)  # always implies perhaps: 0, 1, 2

    def _level(self, image: Tensor, row: Tensor, column: Tensor, scale: int,
               kinds: Tensor) -> tuple[Pieces, _Tiles | None]:
        """Pieces of the tiles that are decided, and the others; at the size of a block all are."""
        _, height, width = kinds.shape
        open_ = (kinds == PARTIAL).view(-1).nonzero().squeeze(1)
        parent = open_ // (height * width)
        line = open_ // width
        tiles = (image.view(-1)[parent], row.expand(-1, height, 1).reshape(-1)[line],
                 column.reshape(-1)[open_ - line * width if len(column) == 1 else
                                    open_ - (line - parent) * width])
        if scale == 1:
            kinds.view(-1)[open_] = self.undecided.kinds(*tiles)
        else:
            kinds = kinds & FULL
        pieces = pieces_of_kinds(kinds.view(-1, width))
        parent = pieces.row // height
        left = column[:, 0, 0][parent if len(column) > 1 else torch.zeros_like(parent)]
        row = (image * self.grid.rows + row * scale).expand(-1, height, 1).reshape(-1)[pieces.row]
        start, end = (left + pieces.start) * scale, (left + pieces.end) * scale
        placed = Pieces(row, start, end.clamp(max=self.grid.columns), pieces.full)
        return (placed, None) if scale == 1 else (self._in_rows(placed, scale), tiles)

    def _in_rows(self, pieces: Pieces, scale: int) -> Pieces:
        """Pieces of rows of tiles as pieces of rows of blocks."""
        rows = self.grid.rows
        row = pieces.row[:, None] + torch.arange(scale, device=self.device)
        start, end, full = (t[:, None].expand_as(row).reshape(-1)
                            for t in (pieces.start, pieces.end, pieces.full))
        spread = Pieces(row.view(-1), start, end, full)
        if rows % scale == 0:
            return spread
        image = (pieces.row // rows)[:, None]
        return spread.select((row // rows == image).view(-1))

    def _first_row(self, strip: int) -> int:
        image, row = divmod(strip, self.strips_per_image)
        return image * self.grid.rows + row * self.scales[0]

    def _nothing(self) -> RunTable:
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        return self._table([Pieces(none, none, none, none.bool())], 0,
                           self.grid.images * self.grid.rows)

    def _table(self, pieces: list[Pieces], first_row: int, end_row: int) -> RunTable:
        joined = Pieces.join(pieces)
        moved = replace(joined, row=joined.row - first_row) if first_row else joined
        return run_table(moved, self.grid.columns, 1, 1, end_row - first_row, self.grid.q_block,
                         self.grid.kv_block)


def _joined(tiles: list[_Tiles]) -> _Tiles:
    image, row, column = map(torch.cat, zip(*tiles, strict=True))
    return image, row, column


def _scales(blocks: int, plan: _Plan) -> list[int]:
    """Sides of tiles in blocks, coarse to fine."""
    scales = [1]
    while -(-blocks // scales[-1]) > plan.widest:
        scales.append(scales[-1] * plan.factor)
    return scales[::-1]


def element_mask(mod: Mod, b: int, h: int, rows: tuple[int, int], kv_len: int,
                 device: torch.device) -> Tensor:
    """The mask's elements, bool [rows, kv_len], for one batch entry and head."""
    inputs = {
        "b": torch.tensor(b, device=device),
        "h": torch.tensor(h, device=device),
        "q_idx": torch.arange(*rows, device=device)[:, None],
        "kv_idx": torch.arange(kv_len, device=device),
    }
    attended = evaluate(mod.graph, inputs, mod.captures, mod.numbers)["mask"]
    return attended.expand(rows[1] - rows[0], kv_len)
