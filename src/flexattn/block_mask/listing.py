"""PyTorch's lists of blocks: counts [B, H, rows] and indices [B, H, rows, columns], int32.

In: lists, or a `RunTable`. Out: kinds of blocks, or lists. Dense by nature: rows x columns numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.runs import EMPTY, FULL, PARTIAL, RunTable, kinds_of_runs
from flexattn.errors import ArgumentError, ShapeError, message

Listing = tuple[Tensor, Tensor]


def checked_lists(partial: Listing, full: tuple[Tensor | None, Tensor | None]) -> Listing | None:
    """The full list, if there is one."""
    counts, indices = partial
    if (full[0] is None) != (full[1] is None):
        raise ArgumentError(message(
            "full_kv_num_blocks and full_kv_indices must be given together."))
    if indices.dim() != 4 or counts.shape != indices.shape[:3]:
        raise ShapeError(message(
            "The lists of blocks have the wrong shapes.",
            expected="counts [B, H, rows] and indices [B, H, rows, columns]",
            got=f"{list(counts.shape)} and {list(indices.shape)}"))
    return None if full[0] is None or full[1] is None else (full[0], full[1])


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
    kv_* and q_*, and the full lists are None. dq_*: no hints for PyTorch's own kernels.
    """

    dq_write_order = dq_write_order_full = dq_kv_order = dq_kv_order_spt = None
    shape: Any
    BLOCK_SIZE: Any
    mask_mod: Any
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

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """PyTorch's tuple: lengths, the eight lists, hints for PyTorch's own kernels (None, where
        its tuple has them), block sizes, mask_mod; flatten: lengths and block sizes as numbers of
        their own."""
        lists: tuple[Any, ...] = (
            self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices,
            self.q_num_blocks, self.q_indices, self.full_q_num_blocks, self.full_q_indices)
        lists += (None,) * _hints()
        if flatten:
            return (*self.seq_lengths, *lists, *self.BLOCK_SIZE, self.mask_mod)
        return (self.seq_lengths, *lists, self.BLOCK_SIZE, self.mask_mod)


@cache
def _hints() -> int:
    """Entries of PyTorch's tuple between the lists and the block sizes: some, from 2.13 on."""
    from torch.nn.attention.flex_attention import BlockMask

    return sum(name.startswith("dq_") for name in (*BlockMask._TENSOR_ATTRS,
                                                   *BlockMask._CONTEXT_ATTRS))


def _part(listing: Listing | None, number: int) -> Tensor | None:
    return None if listing is None else listing[number]
