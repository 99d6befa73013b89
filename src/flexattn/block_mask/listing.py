"""PyTorch's lists of blocks: counts [B, H, rows] and indices [B, H, rows, columns], int32.

In: lists, or a `RunTable`. Out: kinds of blocks, or lists. Dense by nature: rows x columns numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.runs import EMPTY, FULL, PARTIAL, RunTable, kinds_of_runs

Listing = tuple[Tensor, Tensor]


def kinds_of_lists(partial: Listing, full: Listing | None, columns: int) -> Tensor:
    """uint8 [B, H, rows, columns] of the two lists."""
    kinds = _member(*partial, columns).to(torch.uint8) * PARTIAL
    if full is not None:
        kinds[_member(*full, columns)] = FULL
    return kinds


def _member(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    rank = torch.arange(indices.shape[-1], device=indices.device)
    member = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    target = torch.where(rank < counts[..., None], indices.long(), columns)
    return member.scatter_(-1, target, True)[..., :columns]


class Listings:
    """The attributes of PyTorch's BlockMask, computed when asked for. Mixed into BlockMask.

    kv_*: the partial blocks of each row of query blocks; full_kv_*: the full ones. q_*, full_q_*:
    the same by columns, counts [B, H, columns] and indices [B, H, columns, rows]. An index list
    starts with the counted blocks, ascending. Where full blocks are not kept apart, they are in
    kv_* and q_*, and the full lists are None.
    """

    shape: Any
    separate_full_blocks: bool
    seq_lengths: tuple[int, int]
    rows: Any
    columns: Any

    def _listing(self, by_rows: bool, full: bool) -> Listing | None:
        if full and not self.separate_full_blocks:
            return None
        table: RunTable = self.rows() if by_rows else self.columns()
        length = self.seq_lengths[1 if by_rows else 0]
        kinds = kinds_of_runs(table, -(-length // table.col_block))
        member = kinds != EMPTY
        if self.separate_full_blocks:
            member = kinds == (FULL if full else PARTIAL)
        member = member.expand(*self.shape[:2], -1, -1)
        order = torch.argsort(member.to(torch.uint8), dim=-1, descending=True, stable=True)
        return member.sum(-1, dtype=torch.int32), order.int()

    @property
    def kv_num_blocks(self) -> Tensor:
        return self._some(True)[0]

    @property
    def kv_indices(self) -> Tensor:
        return self._some(True)[1]

    @property
    def q_num_blocks(self) -> Tensor:
        return self._some(False)[0]

    @property
    def q_indices(self) -> Tensor:
        return self._some(False)[1]

    @property
    def full_kv_num_blocks(self) -> Tensor | None:
        return _part(self._listing(True, True), 0)

    @property
    def full_kv_indices(self) -> Tensor | None:
        return _part(self._listing(True, True), 1)

    @property
    def full_q_num_blocks(self) -> Tensor | None:
        return _part(self._listing(False, True), 0)

    @property
    def full_q_indices(self) -> Tensor | None:
        return _part(self._listing(False, True), 1)

    def _some(self, by_rows: bool) -> Listing:
        found = self._listing(by_rows, False)
        assert found is not None
        return found


def _part(listing: Listing | None, number: int) -> Tensor | None:
    return None if listing is None else listing[number]
