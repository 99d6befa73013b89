"""BlockMask: which blocks of Q x KV attention has to touch, and create_block_mask.

In: a mask mod `(b, h, q_idx, kv_idx) -> bool` and sizes. Out: an immutable BlockMask that holds
rows of runs (see analysis.block_sparsity), by query rows and by key columns. Rejects sizes and
block sizes that make no sense (ArgumentError, ShapeError).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import (
    EMPTY,
    FULL,
    PARTIAL,
    RunTable,
    element_mask,
    kinds_of_runs,
    mask_sparsity,
    runs_of_kinds,
)
from flexattn.analysis.runs import all_partial, transposed
from flexattn.errors import ArgumentError, message
from flexattn.trace import Mod, specialize, trace_mask_mod

MaskMod = Callable[[Any, Any, Any, Any], Any]
BlockSize = int | tuple[int, int]


class BlockMask:
    """Block-sparse mask of attention. Made by `create_block_mask`; immutable but for `mask_mod`,
    which may be assigned.

    shape: (B, H, q_len, kv_len); B and H may be 1, for any batch or head.
    """

    def __init__(self, rows: RunTable, seq_lengths: tuple[int, int],
                 shape: tuple[int, int], mask_mod: MaskMod | None) -> None:
        self._rows, self.seq_lengths = rows, seq_lengths
        self._batch, self._heads = shape
        self.mask_mod = mask_mod
        self._columns: RunTable | None = None
        self._regrids: dict[tuple[int, int, int], BlockMask] = {}

    def rows(self) -> RunTable:
        """Runs of key blocks, for each row of query blocks."""
        return self._rows

    def columns(self) -> RunTable:
        """Runs of query blocks, for each column of key blocks."""
        if self._columns is None:
            self._columns = transposed(self._rows, -(-self.seq_lengths[1] // self.BLOCK_SIZE[1]))
        return self._columns

    def traced(self, device: torch.device) -> Mod | None:
        """The traced mask_mod; None when every position of a non-empty block counts."""
        return None if self.mask_mod is None else specialize(trace_mask_mod(self.mask_mod, device))

    def regrid(self, tile_q: int, tile_kv: int) -> BlockMask:
        """This mask in blocks of tile_q x tile_kv: evaluated anew, inside the blocks it has."""
        key = (tile_q, tile_kv, id(self.mask_mod))
        if key not in self._regrids:
            self._regrids[key] = self._regrid(tile_q, tile_kv)
        return self._regrids[key]

    def _regrid(self, tile_q: int, tile_kv: int) -> BlockMask:
        q_len, kv_len = self.seq_lengths
        member = self._kinds()
        fine = _resample(member, self.BLOCK_SIZE, (tile_q, tile_kv), self.seq_lengths)
        if fine is None:
            raise ArgumentError(message(
                "This block mask does not fit the kernel's tile.",
                expected=f"block sizes that are multiples of {(tile_q, tile_kv)}",
                got=str(self.BLOCK_SIZE), remedy="make the mask with BLOCK_SIZE=128"))
        mod = self.traced(self.device)
        if mod is not None:
            table = mask_sparsity(mod, *self.shape[:2], q_len, kv_len, tile_q, tile_kv,
                                  self.device).table
            exact = kinds_of_runs(table, -(-kv_len // tile_kv))
            undecided = torch.where(exact == FULL, PARTIAL, exact)
            full = (fine == FULL) | ((fine == PARTIAL) & (exact == FULL))
            fine = torch.where(full, FULL, torch.where(fine == EMPTY, EMPTY, undecided))
        return BlockMask(runs_of_kinds(fine.to(torch.uint8), tile_q, tile_kv), self.seq_lengths,
                         self.shape[:2], self.mask_mod)

    def _kinds(self) -> Tensor:
        return kinds_of_runs(self._rows, -(-self.seq_lengths[1] // self._rows.col_block))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self._batch, self._heads, *self.seq_lengths)

    @property
    def BLOCK_SIZE(self) -> tuple[int, int]:
        return self._rows.row_block, self._rows.col_block

    @property
    def device(self) -> torch.device:
        return self._rows.offsets.device

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask's tables on `device`; tensors captured by its mask_mod stay where they are."""
        return BlockMask(self._rows.to(device), self.seq_lengths, self.shape[:2], self.mask_mod)

    def to_dense(self) -> Tensor:
        """int32 [B, H, rows, columns], 1 where a block is not empty."""
        dense = (self._kinds() != EMPTY).int()
        return dense.expand(*self.shape[:2], -1, -1)

    def numel(self) -> int:
        """Number of elements of the dense mask."""
        batch, heads, q_len, kv_len = self.shape
        return batch * heads * q_len * kv_len

    def sparsity(self) -> float:
        """Percent of the mask's elements in empty blocks; ragged blocks count as they are."""
        table, (q_len, kv_len) = self._rows, self.seq_lengths
        counts = (table.offsets[1:] - table.offsets[:-1]).long()
        row = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)
        top = (row % max(table.num_rows, 1)) * table.row_block
        height = torch.clamp(q_len - top, max=table.row_block)
        ends = [torch.clamp(t.long() * table.col_block, max=kv_len)
                for t in (table.start, table.end)]
        total = table.batch * table.heads * q_len * kv_len
        return 100.0 * (1.0 - float((height * (ends[1] - ends[0])).sum()) / max(total, 1))

    def __getitem__(self, index: Any) -> BlockMask:
        """Batch entries, heads and rows of query blocks; the mask_mod follows.

        An integer keeps a dimension of size 1, as in torch.
        """
        keys = (index if isinstance(index, tuple) else (index,)) + (slice(None),) * 3
        sizes = (self._batch, self._heads, self._rows.num_rows)
        picked = [_positions(k, n) for k, n in zip(keys[:3], sizes, strict=True)]
        kinds = self._kinds()
        for dim, positions in enumerate(picked):
            if kinds.shape[dim] > 1 or dim == 2:
                kinds = kinds.index_select(dim, positions.to(kinds.device))
        block = self._rows.row_block
        rows = picked[2]
        whole = len(rows) == self._rows.num_rows
        q_len = self.seq_lengths[0] if whole else int(
            torch.clamp(self.seq_lengths[0] - rows * block, max=block).sum())
        mod = self.mask_mod and _moved(self.mask_mod, [p.to(self.device) for p in picked], block)
        return BlockMask(runs_of_kinds(kinds, *self.BLOCK_SIZE), (q_len, self.seq_lengths[1]),
                         (len(picked[0]), len(picked[1])), mod)

    @classmethod
    def from_kv_blocks(cls, kv_num_blocks: Tensor, kv_indices: Tensor,
                       full_kv_num_blocks: Tensor | None = None,
                       full_kv_indices: Tensor | None = None, BLOCK_SIZE: BlockSize = 128,
                       mask_mod: MaskMod | None = None,
                       seq_lengths: tuple[int, int] | None = None, **_: Any) -> BlockMask:
        """From PyTorch's lists: counts [B, H, rows], indices [B, H, rows, columns]."""
        q_block, kv_block = _block_size(BLOCK_SIZE)
        lengths = seq_lengths or (kv_indices.shape[2] * q_block, kv_indices.shape[3] * kv_block)
        columns = -(-lengths[1] // kv_block)
        partial = _listed(kv_num_blocks, kv_indices, columns)
        kinds = partial.to(torch.uint8) * PARTIAL
        if full_kv_num_blocks is not None and full_kv_indices is not None:
            kinds[_listed(full_kv_num_blocks, full_kv_indices, columns)] = FULL
        if mask_mod is None:
            kinds[kinds == PARTIAL] = FULL
        return cls(runs_of_kinds(kinds, q_block, kv_block), lengths,
                   (kinds.shape[0], kinds.shape[1]), mask_mod)

    @classmethod
    def from_torch(cls, mask: Any) -> BlockMask:
        """From a torch.nn.attention.flex_attention.BlockMask; converted once per object."""
        found = _converted.get(mask)
        if found is None or found.mask_mod is not mask.mask_mod:
            found = _converted[mask] = cls.from_kv_blocks(
                mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks,
                mask.full_kv_indices, mask.BLOCK_SIZE, mask.mask_mod, mask.seq_lengths)
        return found

    @property
    def kv_num_blocks(self) -> Tensor:
        return self._listing(self._kinds() == PARTIAL)[0]

    @property
    def kv_indices(self) -> Tensor:
        return self._listing(self._kinds() == PARTIAL)[1]

    @property
    def full_kv_num_blocks(self) -> Tensor:
        return self._listing(self._kinds() == FULL)[0]

    @property
    def full_kv_indices(self) -> Tensor:
        return self._listing(self._kinds() == FULL)[1]

    def _listing(self, member: Tensor) -> tuple[Tensor, Tensor]:
        member = member.expand(*self.shape[:2], -1, -1)
        order = torch.argsort(member.to(torch.uint8), dim=-1, descending=True, stable=True)
        return member.sum(-1, dtype=torch.int32), order.int()

    def __repr__(self) -> str:
        return (f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, "
                f"sparsity={self.sparsity():.2f}%)")


_converted: WeakKeyDictionary[Any, BlockMask] = WeakKeyDictionary()


def _listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Membership bool [B, H, rows, columns] of PyTorch's ordered lists."""
    rank = torch.arange(indices.shape[-1], device=indices.device)
    member = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    target = torch.where(rank < counts[..., None], indices.long(), columns)
    return member.scatter_(-1, target, True)[..., :columns]


def _positions(key: Any, size: int) -> Tensor:
    if isinstance(key, int):
        key = slice(key, key + 1 or None)
    return torch.arange(size)[key]


def _moved(mask_mod: MaskMod, picked: list[Tensor], block: int) -> MaskMod:
    """mask_mod of a slice: its indices are looked up where they were."""
    batch, heads, rows = picked

    def moved(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        query = rows[q_idx // block] * block + q_idx % block
        return mask_mod(batch[b], heads[h], query, kv_idx)

    return moved


def _resample(kinds: Tensor, old: tuple[int, int], new: tuple[int, int],
              lengths: tuple[int, int]) -> Tensor | None:
    """kinds on a finer grid; None where the new blocks do not nest in the old ones."""
    for dim, before, after, length in zip((2, 3), old, new, lengths, strict=True):
        if before % after and before < length:
            return None
        at = torch.arange(-(-length // after), device=kinds.device) * after // before
        kinds = kinds.index_select(dim, at)
    return kinds


def _block_size(size: BlockSize) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(n, int) or n <= 0 for n in pair):
        raise ArgumentError(message("BLOCK_SIZE is not a block size.", got=repr(size),
                                    expected="a positive int, or a pair (q, kv) of them",
                                    remedy="BLOCK_SIZE=128"))
    return pair


def create_block_mask(mask_mod: MaskMod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                      device: torch.device | str | None = None, BLOCK_SIZE: BlockSize = 128,
                      _compile: bool = False, separate_full_blocks: bool = True,
                      **torch_options: Any) -> BlockMask:
    """The block mask of `mask_mod`.

    Args:
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`, True where attended.
        B, H: batch size and number of query heads; None or 1 for any.
        Q_LEN, KV_LEN: lengths in tokens.
        device: where the mask's tables live (default: torch's default device).
        BLOCK_SIZE: tokens per block, one int or (q, kv).
        separate_full_blocks: False marks full blocks as partial.
        _compile and further options of PyTorch's function are accepted and change nothing.

    Raises: ArgumentError for sizes that are negative; the tracer's errors for a wrong mask_mod.

    Examples:
        >>> create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 512, 512)
        BlockMask(shape=(1, 1, 512, 512), BLOCK_SIZE=(128, 128), sparsity=37.50%)
    """
    sizes = {"B": B or 1, "H": H or 1, "Q_LEN": Q_LEN, "KV_LEN": KV_LEN}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 0:
            raise ArgumentError(message(f"create_block_mask: {name} is not a size.",
                                        expected="a non-negative int", got=repr(size)))
    blocks = _block_size(BLOCK_SIZE)
    where = torch.device(device) if device is not None else torch.get_default_device()
    mod = specialize(trace_mask_mod(mask_mod, where))
    table = mask_sparsity(mod, sizes["B"], sizes["H"], Q_LEN, KV_LEN, *blocks, where).table
    if not separate_full_blocks:
        table = all_partial(table, -(-KV_LEN // blocks[1]))
    return BlockMask(table, (Q_LEN, KV_LEN), (sizes["B"], sizes["H"]), mask_mod)


def create_mask(mask_mod: MaskMod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                device: torch.device | str | None = None) -> Tensor:
    """The dense mask, bool [B, H, Q_LEN, KV_LEN]: for small sizes, tests and pictures."""
    where = torch.device(device) if device is not None else torch.get_default_device()
    mod = specialize(trace_mask_mod(mask_mod, where))
    rows = [torch.stack([element_mask(mod, b, h, (0, Q_LEN), KV_LEN, where)
                         for h in range(H or 1)]) for b in range(B or 1)]
    return torch.stack(rows)


