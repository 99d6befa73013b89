"""Block masks that cost a call little: for masks made by code that knows what it captured.

In: a BlockMask whose mask_mod never changes what it captures, or such a mask_mod and few queries.
Out: a BlockMask that is traced once (SettledMask), where of others it is looked at every call
whether they have to be, and one that no block is looked at for (UndividedMask), where finding the
empty ones costs more than it saves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from flexattn.analysis.runs import RunTable
from flexattn.block_mask.arguments import MaskMod, device_of
from flexattn.block_mask.mask import BlockMask
from flexattn.trace import Mod

_BLOCK = 128


class SettledMask(BlockMask):
    """A block mask whose mask_mod captures the same tensors and numbers for good."""

    _known: tuple[MaskMod, torch.device, Mod] | None = None

    def traced(self, device: torch.device) -> Mod:
        mod, known = self.element_mod(), self._known
        if known is None or known[0] is not mod or known[1] != device:
            known = self._known = (mod, device, super().traced(device))
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_known": None}


class UndividedMask(SettledMask):
    """Every row of blocks is one run of partial ones, whatever the blocks' size."""

    def regrid(self, tile_q: int, tile_kv: int) -> BlockMask:
        key = (tile_q, tile_kv)
        if key not in self._regrids:
            rows = _undivided(*self.seq_lengths, tile_q, tile_kv, self.device)
            self._regrids[key] = self._with(rows)
        return self._regrids[key]

    def kernel_runs(self, tile_q: int, tile_kv: int, by_columns: bool = False) -> RunTable:
        if by_columns:
            return super().kernel_runs(tile_q, tile_kv, by_columns)
        return _undivided(*self.seq_lengths, tile_q, tile_kv, self.device)


def settled(mask: BlockMask) -> SettledMask:
    """The same mask, traced once from now on."""
    made = object.__new__(SettledMask)
    made.__dict__.update(mask.__dict__)
    return made


def undivided(mask_mod: MaskMod, batch: int, q_len: int, kv_len: int,
              device: torch.device | str, traced: Mod | None = None) -> UndividedMask:
    """The mask of `mask_mod`, the same for all heads (and batch entries where batch is 1).
    traced: what its trace on this device gave, where it is known."""
    rows = _undivided(q_len, kv_len, _BLOCK, _BLOCK, device_of(device))
    made = UndividedMask(rows, (q_len, kv_len), (batch, 1), mask_mod, proved=True)
    if traced is not None:
        made._known = mask_mod, rows.offsets.device, traced
    return made


def _undivided(q_len: int, kv_len: int, row_block: int, col_block: int,
               device: torch.device) -> RunTable:
    return _table(-(-q_len // row_block), -(-kv_len // col_block), row_block, col_block, device)


@lru_cache(maxsize=256)
def _table(num_rows: int, columns: int, row_block: int, col_block: int,
           device: torch.device) -> RunTable:
    """The same tensors for the same numbers of blocks: what is derived from them is kept with
    them."""
    with torch.inference_mode(False):
        offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        start = torch.zeros(num_rows, dtype=torch.int32, device=device)
        end, full = torch.full_like(start, columns), start.bool()
    return RunTable(offsets, start, end, full, 1, 1, num_rows, row_block, col_block)
