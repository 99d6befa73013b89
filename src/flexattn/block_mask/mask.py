"""BlockMask: which blocks of Q x KV attention has to touch.

In: rows of runs (see analysis.runs), by `create_block_mask` or from PyTorch's lists. Out: an
immutable BlockMask that kernels read by query rows and by key columns, in the blocks of any tile.
Rejects what does not describe a mask (ArgumentError, ShapeError), and a mask_mod that contradicts
its blocks where asked to (`verify`, MaskMismatchError).
"""

from __future__ import annotations

import pickle
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import grid_of, mask_runs, turned_runs
from flexattn.analysis.runs import (
    EMPTY,
    FULL,
    PARTIAL,
    RunTable,
    broadcast_rows,
    cropped,
    kinds_of_runs,
    pieces_of,
    runs_of_kinds,
    segments,
    take_rows,
)
from flexattn.block_mask.arguments import (
    BlockSize,
    MaskMod,
    check_options,
    checked_block_size,
    positions,
)
from flexattn.block_mask.bounded import bounded_columns, bounded_runs, room_for
from flexattn.block_mask.evidence import Evidence, evidence
from flexattn.block_mask.listing import Listings, checked_lists, kinds_of_lists
from flexattn.block_mask.moved import inside_blocks, joined, negated, sliced
from flexattn.errors import ArgumentError, MaskMismatchError, ShapeError, message
from flexattn.pictures.methods import Pictures
from flexattn.trace import Mod, memo


class BlockMask(Listings, Pictures):
    """Block-sparse mask of attention. Made by `create_block_mask`; immutable but for `mask_mod`,
    which may be assigned.

    shape: (B, H, q_len, kv_len); B and H may be 1, for any batch or head. BLOCK_SIZE: tokens per
    block, (q, kv). An element is attended if its block is full, or partial and mask_mod says so.

    Examples:
        >>> mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 512, 512)
        >>> mask.sparsity()
        37.5
        >>> (mask & ~mask).sparsity()
        100.0
    """

    def __init__(self, rows: RunTable, seq_lengths: tuple[int, int], shape: tuple[int, int],
                 mask_mod: MaskMod | None, *, proved: bool = False,
                 separate_full_blocks: bool = True) -> None:
        """proved: the blocks are those of mask_mod, which alone says what is attended."""
        self.table, self.seq_lengths = rows, seq_lengths
        self._exact = rows if rows.runs is None else None
        if not torch.compiler.is_compiling():
            for tensor in (rows.offsets, rows.start, rows.end, rows.full):
                # Tells torch.compile that this size varies, as maybe_mark_dynamic(tensor, 0).
                tensor._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
        self._batch, self._heads = shape
        self._mask_mod, self._proved = mask_mod, proved
        self.separate_full_blocks = separate_full_blocks
        self._lost_mod = ""  # the name of a mask_mod that could not be saved
        self._columns: RunTable | None = None
        self._elements_of: MaskMod | None = None
        self._regrids: dict[tuple[int, int], BlockMask] = {}

    # What kernels read

    def rows(self) -> RunTable:
        """Runs of key blocks, for each row of query blocks. Of a mask that was made with max_runs,
        this waits for the device once."""
        if self._exact is None:
            self._exact = self.table.exact()
        return self._exact

    def columns(self) -> RunTable:
        """Runs of query blocks, for each column of key blocks."""
        if self._columns is None:
            self._columns = turned_runs(self.rows(), self._num_columns)
        return self._columns

    def traced(self, device: torch.device) -> Mod:
        """The traced mask of the elements of partial blocks, of this mask and of all its
        regrids."""
        return memo.mask_mod(self.element_mod(), device)

    def regrid(self, tile_q: int, tile_kv: int) -> BlockMask:
        """This mask in blocks of tile_q x tile_kv tokens, by proof; the same object for the same
        tile."""
        key = (tile_q, tile_kv)
        if key == self.BLOCK_SIZE:
            return self
        if key not in self._regrids:
            self._regrids[key] = self._of(self.element_mod(), self.shape, key)
        return self._regrids[key]

    def kernel_runs(self, tile_q: int, tile_kv: int, by_columns: bool = False) -> RunTable:
        """The runs in tiles of a kernel, by rows or by columns; with room (see analysis.runs), and
        without waiting for the device, where the mask was made with max_runs."""
        if self.table.runs is None:
            fine = self.regrid(tile_q, tile_kv)
            return fine.columns() if by_columns else fine.rows()
        table = self.table
        if (tile_q, tile_kv) != self.BLOCK_SIZE:
            mod = self.traced(self.device)
            table = bounded_runs(mod, grid_of(mod, *self.shape, tile_q, tile_kv), self.device,
                                 room_for(table, tile_q, tile_kv))
        columns = -(-self.seq_lengths[1] // tile_kv)
        return bounded_columns(table, columns) if by_columns else table

    def element_mod(self) -> MaskMod:
        """What says alone which elements are attended: mask_mod, unless blocks were given that are
        not its own."""
        if self._elements_of is not None:
            return self._elements_of
        mod = self.mask_mod
        if mod is None or not (self._proved or self._first_wrong_block() is None):
            mod = inside_blocks(mod, self._kinds(), self.BLOCK_SIZE)
        self._elements_of = mod
        return mod  # not read back: Dynamo reads None of the first of two masks made in a graph

    def _of(self, mask_mod: MaskMod, shape: tuple[int, int, int, int], blocks: tuple[int, int]
            ) -> BlockMask:
        table = self._runs(mask_mod, shape, blocks)
        return type(self)(table, shape[2:], shape[:2], mask_mod, proved=True)

    def _runs(self, mask_mod: MaskMod, shape: tuple[int, int, int, int], blocks: tuple[int, int]
              ) -> RunTable:
        mod = memo.mask_mod(mask_mod, self.device)
        return mask_runs(mod, grid_of(mod, *shape, *blocks), self.device)

    # What it is

    @property
    def mask_mod(self) -> MaskMod | None:
        """The mask of the elements of partial blocks; None: all of them."""
        if self._lost_mod:
            raise ArgumentError(message(
                f"The block mask was saved without its mask_mod ({self._lost_mod}), which cannot "
                "be pickled.", remedy="assign it again: block_mask.mask_mod = mask_mod"))
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, mask_mod: MaskMod | None) -> None:
        self._mask_mod, self._lost_mod = mask_mod, ""
        self._proved, self._elements_of = False, None
        self._regrids.clear()

    @property
    def is_proved(self) -> bool:
        """Whether the blocks are those of mask_mod, because they were made from it."""
        return self._proved and self._mask_mod is not None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self._batch, self._heads, *self.seq_lengths)

    @property
    def BLOCK_SIZE(self) -> tuple[int, int]:
        return self.table.row_block, self.table.col_block

    @property
    def device(self) -> torch.device:
        return self.table.offsets.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the tables that have been made so far."""
        return self.table.nbytes + (self._columns.nbytes if self._columns else 0)

    @property
    def _num_columns(self) -> int:
        return -(-self.seq_lengths[1] // self.table.col_block)

    def _kinds(self) -> Tensor:
        return kinds_of_runs(self.rows(), self._num_columns)

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
        table, (q_len, kv_len) = self.rows(), self.seq_lengths
        top = (table.row_of_runs() % max(table.num_rows, 1)) * table.row_block
        height = torch.clamp(q_len - top, max=table.row_block)
        ends = [torch.clamp(t.long() * table.col_block, max=kv_len)
                for t in (table.start, table.end)]
        total = table.batch * table.heads * q_len * kv_len
        return 100.0 * (1.0 - float((height * (ends[1] - ends[0])).sum()) / max(total, 1))

    def __repr__(self) -> str:
        return (f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, "
                f"sparsity={self.sparsity():.2f}%)")

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_string()}"

    # Checks

    def verify(self) -> None:
        """Checks blocks that were given against mask_mod, without looking at all elements.

        Raises: MaskMismatchError that names the first wrong block: an empty one where mask_mod
            attends something, or a full one where it does not attend everything.
        """
        if self.mask_mod is None:
            return
        wrong = self._first_wrong_block()
        if wrong is not None:
            (b, h, row, column), kind, actual = wrong
            raise MaskMismatchError(message(
                f"Block [batch {b}, head {h}, row {row}, column {column}] is {_NAMES[kind]}, but "
                f"by the mask_mod it is {_NAMES[actual]}.", expected=_NAMES[actual],
                got=_NAMES[kind], remedy="create_block_mask, or lists that agree with mask_mod"))

    def _first_wrong_block(self) -> tuple[tuple[int, int, int, int], int, int] | None:
        """(batch, head, row, column), its kind here and by mask_mod."""
        assert self.mask_mod is not None
        own = self._runs(self.mask_mod, self.shape, self.BLOCK_SIZE)
        tables = [broadcast_rows(t, *self.shape[:2]) for t in (self.rows(), own)]
        found = segments([pieces_of(t) for t in tables], self._num_columns).select_where(
            lambda here, there: ((here == EMPTY) & (there != EMPTY))
            | ((here == FULL) & (there != FULL)))
        if not len(found.row):
            return None
        image, row = divmod(int(found.row[0]), self.rows().num_rows)
        at = (*divmod(image, self._heads), row, int(found.start[0]))
        return at, int(found.kinds[0][0]), int(found.kinds[1][0])

    def explain(self) -> Evidence:
        """How the blocks follow from mask_mod: what was proved, what had to be evaluated, and which
        expressions defeated the proof. Prints as text.

        Examples:
            >>> mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 512, 512)
            >>> print(mask.explain())
            16 blocks: 6 empty, 4 partial, 6 full
            12 proved as they are, 4 seen to be partial at a few points
            no block had its elements evaluated
        """
        mod = self.traced(self.device)
        return evidence(mod, *self.shape, *self.BLOCK_SIZE, self.device)

    # Masks made of it

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask's tables on `device`; tensors captured by its mask_mod stay where they are."""
        return self._with(self.table.to(device))

    def settings(self) -> tuple[Any, ...]:
        """Everything but the tables."""
        return (self.seq_lengths, self.shape[:2], self._mask_mod, self._proved,
                self.separate_full_blocks, self._lost_mod)

    @classmethod
    def of_settings(cls, rows: RunTable, seq_lengths: tuple[int, int], shape: tuple[int, int],
                    mask_mod: MaskMod | None, proved: bool, separate: bool, lost: str
                    ) -> BlockMask:
        made = cls(rows, seq_lengths, shape, mask_mod, proved=proved,
                   separate_full_blocks=separate)
        made._lost_mod = lost
        return made

    def _with(self, rows: RunTable, *changed: Any) -> BlockMask:
        """Another table; `changed` are the first settings."""
        return self.of_settings(rows, *changed, *self.settings()[len(changed):])

    def __getitem__(self, index: Any) -> BlockMask:
        """Batch entries, heads and rows of query blocks, by ints, slices or index tensors; the
        mask_mod follows. An int keeps a dimension of size 1, as in torch.

        Raises: ArgumentError for an index out of range, and if a ragged last row of blocks is taken
            and is not the last one then.
        """
        rows, (q_len, kv_len) = self.rows(), self.seq_lengths
        picked = positions(index, (self._batch, self._heads, rows.num_rows))
        ragged = q_len % rows.row_block
        if ragged and bool((picked[2][:-1] == rows.num_rows - 1).any()):
            raise ArgumentError(message("The last row of blocks is ragged and must stay the last.",
                                        got=str(picked[2].tolist())))
        sizes = [len(p) for p in picked]
        taken = [torch.zeros(1, dtype=torch.int64) if size == 1 else p
                 for p, size in zip(picked[:2], (rows.batch, rows.heads), strict=True)]
        image = taken[0][:, None] * rows.heads + taken[1]
        at = (image[:, :, None] * rows.num_rows + picked[2]).reshape(-1).to(self.device)
        table = take_rows(rows, at, len(taken[0]), len(taken[1]), sizes[2])
        length = torch.clamp(q_len - picked[2] * rows.row_block, max=rows.row_block).sum()
        mod = self._mask_mod and sliced(self._mask_mod, picked, rows.row_block, self.device)
        return self._with(table, (int(length), kv_len), (sizes[0], sizes[1]), mod)

    def adjust(self, q_len: int, kv_len: int) -> BlockMask:
        """The mask for other lengths: by proof from its mask_mod, which must be valid there.

        Blocks that were given, and not made by `create_block_mask`, can only be cut.

        Raises: ArgumentError for lengths beyond given blocks.
        """
        if self._proved and self.mask_mod is not None:
            return self._of(self.mask_mod, (*self.shape[:2], q_len, kv_len), self.BLOCK_SIZE)
        if q_len > self.seq_lengths[0] or kv_len > self.seq_lengths[1]:
            raise ArgumentError(message(
                "A block mask that was made from lists cannot be made longer.",
                expected=f"at most {self.seq_lengths}", got=str((q_len, kv_len)),
                remedy="create_block_mask with the new lengths"))
        table = cropped(self.rows(), -(-q_len // self.BLOCK_SIZE[0]),
                        -(-kv_len // self.BLOCK_SIZE[1]))
        return self._with(table, (q_len, kv_len), self.shape[:2], self._mask_mod)

    _adjust = adjust  # PyTorch's name

    def __and__(self, other: BlockMask) -> BlockMask:
        """Attended where both masks attend."""
        return self._joined(other, either=False)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Attended where at least one of the masks attends."""
        return self._joined(other, either=True)

    def __invert__(self) -> BlockMask:
        """Attended where this mask does not attend."""
        return self._of(negated(self.element_mod()), self.shape, self.BLOCK_SIZE)

    def _joined(self, other: BlockMask, either: bool) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        pairs = list(zip(self.shape, other.shape, strict=True))
        if self.seq_lengths != other.seq_lengths or any(
                m != n and 1 not in (m, n) for m, n in pairs[:2]):
            raise ShapeError(message("The block masks have different shapes.", got=str(other.shape),
                                     expected=f"{self.shape}, batch and heads may be 1"))
        batch, heads = (max(pair) for pair in pairs[:2])
        mod = joined(self.element_mod(), other.element_mod(), either)
        return self._of(mod, (batch, heads, *self.seq_lengths), self.BLOCK_SIZE)

    # From PyTorch's lists

    @classmethod
    def from_kv_blocks(cls, kv_num_blocks: Tensor, kv_indices: Tensor,
                       full_kv_num_blocks: Tensor | None = None,
                       full_kv_indices: Tensor | None = None, BLOCK_SIZE: BlockSize = 128,
                       mask_mod: MaskMod | None = None,
                       seq_lengths: tuple[int, int] | None = None, **torch_options: Any
                       ) -> BlockMask:
        """From PyTorch's lists: counts [B, H, rows], indices [B, H, rows, columns].

        What PyTorch's function takes beyond these is accepted and changes nothing.

        Raises: ArgumentError for one full list without the other, for unknown options, and for
            lengths that the lists do not cover; ShapeError for other ranks.
        """
        check_options("from_kv_blocks", torch_options)
        q_block, kv_block = checked_block_size(BLOCK_SIZE)
        full = checked_lists((kv_num_blocks, kv_indices), (full_kv_num_blocks, full_kv_indices))
        covered = kv_indices.shape[2] * q_block
        lengths = seq_lengths or (covered, kv_indices.shape[3] * kv_block)
        if lengths[0] > covered:
            raise ArgumentError(message(
                "The lists have too few rows of blocks for seq_lengths.", got=str(lengths[0]),
                expected=f"at most {covered} queries, {q_block} a row",
                remedy="list all rows, or create_block_mask with these lengths"))
        kinds = kinds_of_lists((kv_num_blocks, kv_indices), full, -(-lengths[1] // kv_block))
        if mask_mod is None:
            kinds[kinds == PARTIAL] = FULL
        return cls(runs_of_kinds(kinds, q_block, kv_block), (lengths[0], lengths[1]),
                   (kinds.shape[0], kinds.shape[1]), mask_mod,
                   separate_full_blocks=full is not None)

    @classmethod
    def from_torch(cls, mask: Any) -> BlockMask:
        """From a torch.nn.attention.flex_attention.BlockMask; converted once per object."""
        found = _converted.get(mask)
        if (found is None or found._mask_mod is not mask.mask_mod
                or found.seq_lengths != tuple(mask.seq_lengths)):
            found = _converted[mask] = cls.from_kv_blocks(
                mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks,
                mask.full_kv_indices, mask.BLOCK_SIZE, mask.mask_mod, mask.seq_lengths)
        return found

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """For torch.save; a mask_mod that cannot be pickled is left out."""
        state = self.__dict__ | {"_columns": None, "_regrids": {}, "_elements_of": None}
        try:
            pickle.dumps(self._mask_mod)
        except (pickle.PicklingError, AttributeError, TypeError):
            lost = getattr(self._mask_mod, "__qualname__", repr(self._mask_mod))
            state |= {"_mask_mod": None, "_lost_mod": lost}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockMask:
        return self._with(self.table)


_NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
_converted: WeakKeyDictionary[Any, BlockMask] = WeakKeyDictionary()
