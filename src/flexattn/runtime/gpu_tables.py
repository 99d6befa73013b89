"""The block mask as GPU kernels read it: full and partial blocks in a table each.

In: a BlockMask and a kernel's tile. Out: tables of (offsets, start, end, blocks before), kept with
the mask, and with the runs where masks share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexattn.analysis.block_sparsity import RunTable
from flexattn.block_mask import BlockMask

Table = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Tables:
    """offsets int32 [rows + 1] of the runs of each row; start, end int32 [runs]; before int64
    [runs + 1]: how many blocks the runs before have. batch, heads: of the mask."""

    full: Table
    partial: Table
    batch: int
    heads: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.full, *self.partial)


_made: WeakKeyDictionary[BlockMask, dict[tuple, Tables]] = WeakKeyDictionary()


def tables(mask: BlockMask, tile_q: int, tile_kv: int, by_columns: bool = False) -> Tables:
    """By rows of queries, or by columns of keys, of tiles of this size."""
    known = _made.setdefault(mask, {})
    key = (tile_q, tile_kv, by_columns, mask.mask_mod)
    found = known.get(key)
    if found is None:
        fine = mask.regrid(tile_q, tile_kv)
        runs = fine.columns() if by_columns else fine.rows()
        found = known[key] = _of_runs(runs)
    return found


_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # masks may share their runs


def _of_runs(runs: RunTable) -> Tables:
    known = _shared.setdefault(runs.full, {})
    key = (id(runs.offsets), runs.batch, runs.heads)
    found = known.get(key)
    if found is None:
        found = known[key] = Tables(_selected(runs, runs.full), _selected(runs, ~runs.full),
                                    runs.batch, runs.heads)
    return found


def _selected(runs: RunTable, chosen: Tensor) -> Table:
    """The runs that are chosen, and one more that no row has, so that a read ahead is inside."""
    pad = torch.nn.functional.pad
    before = pad(chosen.cumsum(0), (1, 0))
    start, end = runs.start[chosen], runs.end[chosen]
    blocks = pad((end - start).long().cumsum(0), (1, 0))
    return before[runs.offsets.long()].int(), pad(start, (0, 1)), pad(end, (0, 1)), blocks
