"""The block mask as Hopper's kernels read it: rows, longest first, and their runs.

In: a RunTable by query rows in the kernel's tiles. Out: `HopperTable`, the arrays of
kernels.hopper_pipeline.Table. The first block of a row is the only one whose keys the kernel
bounds: the last block of the keys where that is ragged and attended, else a partial one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import RunTable
from flexattn.block_mask import BlockMask


@dataclass(frozen=True)
class HopperTable:
    """order int32 [rows], rows int32 [rows, 5], runs int32 [runs + 1, 2] as in Table; whether the
    mask has batches and heads."""

    order: Tensor
    rows: Tensor
    runs: Tensor
    batches: int
    heads: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.order, self.rows, self.runs

    @cached_property
    def values(self) -> tuple[int, ...]:
        """What a launch is given of it."""
        return *(t.data_ptr() for t in self.tensors), self.batches, self.heads


_made: WeakKeyDictionary[BlockMask, dict[tuple, HopperTable]] = WeakKeyDictionary()


def hopper_table(mask: BlockMask, tile_q: int, tile_kv: int, has_mask: bool) -> HopperTable:
    """Kept with the mask. has_mask: partial blocks have a mask_mod."""
    known = _made.get(mask)
    if known is None:
        known = _made[mask] = {}
    key = (tile_q, tile_kv, has_mask, mask.mask_mod)
    found = known.get(key)
    if found is None:
        runs = mask.regrid(tile_q, tile_kv).rows()
        found = known[key] = table_of(runs, mask.seq_lengths[1], has_mask)
    return found


def table_of(runs: RunTable, kv_len: int, has_mask: bool) -> HopperTable:
    """The arrays of a table of runs."""
    lines = runs.offsets.numel() - 1
    device = runs.offsets.device
    counts = (runs.offsets[1:] - runs.offsets[:-1]).long()
    line = torch.repeat_interleave(torch.arange(lines, device=device), counts)
    start, end = runs.start.long(), runs.end.long()
    full = runs.full if has_mask else torch.ones_like(runs.full)

    chosen = _first_runs(line, end, full, lines, -(-kv_len // runs.col_block),
                         kv_len % runs.col_block != 0)
    none = chosen < 0
    end = end.clone()
    end[chosen[~none]] -= 1
    first, whole = (torch.where(none, value, _picked(x, chosen))
                    for x, value in ((end, -1), (full.long(), 1)))

    size = end - start
    keep = (size > 0).nonzero().squeeze(1)
    keep = keep[torch.argsort(2 * line[keep] + full[keep].long(), stable=True)]
    zeros = torch.zeros(lines, dtype=torch.long, device=device)
    begin = zeros.scatter_add(0, line[keep], torch.ones_like(keep))
    begin = begin.cumsum(0) - begin
    partial = zeros.scatter_add(0, line, torch.where(full, 0, size))
    whole_blocks = zeros.scatter_add(0, line, torch.where(full, size, 0))
    cost = partial + whole_blocks + (~none).long()
    order = torch.argsort(cost.view(-1, runs.num_rows), dim=1, descending=True, stable=True)
    listed = torch.stack([start[keep], end[keep]], 1)
    return HopperTable(
        order.int().flatten(),
        torch.stack([first, whole, begin, partial, whole_blocks], 1).int().contiguous(),
        torch.cat([listed, listed.new_zeros(1, 2)]).int().contiguous(),
        int(runs.batch > 1), int(runs.heads > 1))


def _first_runs(line: Tensor, end: Tensor, full: Tensor, lines: int, blocks: int,
                ragged: bool) -> Tensor:
    """For each row the run whose last block comes first; -1 in empty rows."""
    rank = (~full).long()
    if ragged:
        rank = torch.where(end == blocks, 2, rank)
    count = max(line.numel(), 1)
    best = rank * count + torch.arange(line.numel(), device=line.device)
    found = torch.full((lines,), -1, dtype=torch.long, device=line.device)
    found = found.scatter_reduce(0, line, best, "amax")
    return torch.where(found < 0, -1, found % count)


def _picked(x: Tensor, at: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1)])[at]
