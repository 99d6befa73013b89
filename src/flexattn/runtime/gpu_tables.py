"""The block mask as GPU kernels read it: full and partial blocks in a table each.

In: a BlockMask and a kernel's tile. Out: tables of (offsets, start, end, blocks before), kept with
the mask, and with the runs where masks share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexattn.analysis.block_sparsity import RunTable
from flexattn.block_mask import BlockMask
from flexattn.runtime.gpu_launch import pointer

Table = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Tables:
    """offsets int32 [rows + 1] of the runs of each row; start, end int32 [runs]; before int64
    [runs + 1]: how many blocks the runs before have. batch, heads: of the mask."""

    full: Table
    partial: Table
    batch: int
    heads: int

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.full, *self.partial)

    @cached_property
    def pointers(self) -> list[Any]:
        return [pointer(t) for t in self.tensors]


_made: WeakKeyDictionary[BlockMask, dict[tuple, Tables]] = WeakKeyDictionary()


def tables(mask: BlockMask, tile_q: int, tile_kv: int, by_columns: bool = False) -> Tables:
    """By rows of queries, or by columns of keys, of tiles of this size."""
    known = _made.get(mask)
    if known is None:
        known = _made[mask] = {}
    key = (tile_q, tile_kv, by_columns, mask.mask_mod)
    found = known.get(key)
    if found is None:
        found = known[key] = _of_runs(mask.kernel_runs(tile_q, tile_kv, by_columns))
    return found


_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # masks may share their runs


def _of_runs(runs: RunTable) -> Tables:
    known = _shared.setdefault(runs.full, {})
    key = (id(runs.offsets), runs.batch, runs.heads)
    found = known.get(key)
    if found is None:
        exists = True if runs.runs is None else torch.arange(
            len(runs.start), device=runs.start.device) < runs.runs
        found = known[key] = Tables(_selected(runs, runs.full & exists),
                                    _selected(runs, ~runs.full & exists), runs.batch, runs.heads)
    return found


def _selected(runs: RunTable, chosen: Tensor) -> Table:
    """The runs that are chosen, then empty ones that no row has: at least one, so that a read ahead
    is inside. The host need not know how many there are."""
    pad, room = torch.nn.functional.pad, len(runs.start)
    before = pad(chosen.cumsum(0), (1, 0))
    place = torch.where(chosen, before[:-1], room + 1)
    start, end = (t.new_zeros(room + 2).scatter_(0, place, t)[:-1] for t in (runs.start, runs.end))
    blocks = pad((end - start)[:-1].cumsum(0), (1, 0))
    return before[runs.offsets.long()].int(), start, end, blocks
