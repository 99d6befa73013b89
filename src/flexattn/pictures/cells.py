"""What a picture shows: a mask as a small grid of cells, each with its share of full and partial.

In: the runs of a block mask, or the attended elements of a tiny one. Out: `Cells`, at most `limit`
per side: blocks where they fit, otherwise groups of blocks, never a dense block matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Runs(Protocol):
    """The part of a RunTable (see docs/architecture.md) that a picture needs."""

    @property
    def offsets(self) -> Tensor: ...
    @property
    def start(self) -> Tensor: ...
    @property
    def end(self) -> Tensor: ...
    @property
    def full(self) -> Tensor: ...
    @property
    def batch(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def row_block(self) -> int: ...
    @property
    def col_block(self) -> int: ...


@dataclass(frozen=True)
class Cells:
    """Cell (i, j) covers queries row_edges[i : i + 2] and keys col_edges[j : j + 2], in tokens.

    full, partial: float64 [rows, columns] on the CPU, shares of the cell's area between 0 and 1.
    blocks: block sizes (q, kv); None if cells are elements. grouped: a cell holds several blocks.
    attended: share of the whole mask in blocks (elements) that are not empty.
    """

    row_edges: list[int]
    col_edges: list[int]
    full: Tensor
    partial: Tensor
    blocks: tuple[int, int] | None
    grouped: bool
    attended: float

    @property
    def q_len(self) -> int:
        return self.row_edges[-1]

    @property
    def kv_len(self) -> int:
        return self.col_edges[-1]

    @property
    def sparsity(self) -> float:
        """Percent of the area that no kernel touches."""
        return 100.0 * (1.0 - self.attended)


def element_cells(attended: Tensor) -> Cells:
    """One cell per element of a bool [q_len, kv_len] tensor."""
    full = attended.detach().to("cpu", torch.float64)
    rows, columns = (list(range(n + 1)) for n in full.shape)
    share = float(full.mean()) if full.numel() else 0.0
    return Cells(rows, columns, full, torch.zeros_like(full), None, False, share)


def block_cells(runs: Runs, q_len: int, kv_len: int, batch: int = 0, head: int = 0,
                limit: tuple[int, int] = (96, 96)) -> Cells:
    """The blocks of one batch entry and head, grouped where they exceed `limit` rows and columns.

    batch, head: a mask that is the same for all of them is shown for any.
    """
    num_cols = -(-kv_len // runs.col_block)
    group_q, group_kv = (max(-(-n // most), 1)
                         for n, most in zip((runs.num_rows, num_cols), limit, strict=True))
    row_edges = _edges(q_len, runs.row_block * group_q)
    col_edges = _edges(kv_len, runs.col_block * group_kv)
    row, start, end, full = _runs_of(runs, batch, head)
    start, end = (torch.clamp(t * runs.col_block, max=kv_len) for t in (start, end))
    height = torch.clamp(q_len - row * runs.row_block, max=runs.row_block)
    shape = (len(row_edges) - 1, len(col_edges) - 1)
    area = torch.tensor(row_edges).diff()[:, None] * torch.tensor(col_edges).diff()
    covered, mixed = (_area(row[which] // group_q, start[which], end[which], height[which], shape,
                            runs.col_block * group_kv) for which in (full, ~full))
    touched = float((covered + mixed).sum()) / max(q_len * kv_len, 1)
    grouped = group_q > 1 or group_kv > 1
    return Cells(row_edges, col_edges, covered / area, mixed / area,
                 (runs.row_block, runs.col_block), grouped, touched)


def _edges(length: int, step: int) -> list[int]:
    return [*range(0, length, step), length]


def _runs_of(runs: Runs, batch: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, start, end, full) of each run of one batch entry and head, on the CPU."""
    b, h = (0 if runs.batch == 1 else batch), (0 if runs.heads == 1 else head)
    first = (b * runs.heads + h) * runs.num_rows
    offsets = runs.offsets[first : first + runs.num_rows + 1].cpu().long()
    row = torch.repeat_interleave(torch.arange(runs.num_rows), offsets.diff())
    here = slice(int(offsets[0]), int(offsets[-1]))
    start, end = (t[here].cpu().long() for t in (runs.start, runs.end))
    return row, start, end, runs.full[here].cpu().bool()


def _area(row: Tensor, start: Tensor, end: Tensor, height: Tensor, shape: tuple[int, int],
          width: int) -> Tensor:
    """The area of runs [start, end) x height in cells `width` wide: a two-sided running sum.

    What lies right of a position x is width - x % width in its own cell and width in all later
    ones; a run is what is right of its start without what is right of its end.
    """
    steps = torch.zeros(shape[0] * (shape[1] + 2), dtype=torch.float64)
    for edge, sign in ((start, 1), (end, -1)):
        at = row * (shape[1] + 2) + edge // width
        beyond = edge % width
        steps.index_add_(0, at, (sign * height * (width - beyond)).double())
        steps.index_add_(0, at + 1, (sign * height * beyond).double())
    return steps.view(shape[0], shape[1] + 2).cumsum(1)[:, : shape[1]]
