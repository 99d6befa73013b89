"""Which blocks of a mask are empty, partial or full, as rows of runs.

In: a traced mask mod and the sizes. Out: a `RunTable`. Exact: every element is evaluated, in
chunks of bounded memory, never Q x KV at once. A dimension (batch, head) that the mod does not
read is evaluated once and stays broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexattn.ir.evaluate import evaluate
from flexattn.ir.mod import Mod

EMPTY, PARTIAL, FULL = range(3)
_CHUNK = 1 << 22  # elements evaluated at once


@dataclass(frozen=True)
class RunTable:
    """Rows of runs of blocks.

    offsets int32 [batch * heads * num_rows + 1]: the runs of row (b, h, r) are offsets[i] to
    offsets[i + 1]; start, end int32 [runs]: blocks [start, end) along the other axis, ascending;
    full bool [runs]: no element needs the mask. batch and heads are 1 where broadcast; row_block
    and col_block are block sizes in tokens.
    """

    offsets: Tensor
    start: Tensor
    end: Tensor
    full: Tensor
    batch: int
    heads: int
    num_rows: int
    row_block: int
    col_block: int

    def to(self, device: torch.device | str) -> RunTable:
        moved = {name: getattr(self, name).to(device)
                 for name in ("offsets", "start", "end", "full")}
        return replace(self, **moved)


def runs_of_kinds(kinds: Tensor, row_block: int, col_block: int) -> RunTable:
    """The table of `kinds` uint8 [batch, heads, rows, columns] (EMPTY, PARTIAL or FULL)."""
    batch, heads, rows, columns = kinds.shape
    flat = kinds.reshape(-1, columns)
    before = torch.nn.functional.pad(flat, (1, 0))[:, :-1] if columns else flat
    after = torch.nn.functional.pad(flat, (0, 1))[:, 1:] if columns else flat
    first = (flat != EMPTY) & (flat != before)
    last = (flat != EMPTY) & (flat != after)
    row, start = first.nonzero(as_tuple=True)
    end = last.nonzero(as_tuple=True)[1] + 1
    counts = torch.bincount(row, minlength=flat.shape[0])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return RunTable(offsets.int(), start.int(), end.int(), flat[row, start] == FULL, batch, heads,
                    rows, row_block, col_block)


def kinds_of_runs(table: RunTable, num_columns: int) -> Tensor:
    """The uint8 [batch, heads, rows, columns] that `runs_of_kinds` takes."""
    rows = table.batch * table.heads * table.num_rows
    lengths = (table.end - table.start).long()
    kinds = torch.zeros(rows, num_columns, dtype=torch.uint8, device=table.start.device)
    counts = (table.offsets[1:] - table.offsets[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
    first = torch.repeat_interleave(table.start.long() - lengths.cumsum(0) + lengths, lengths)
    columns = torch.arange(len(first), device=first.device) + first
    kind = torch.where(table.full, FULL, PARTIAL).to(torch.uint8)
    kinds[torch.repeat_interleave(row, lengths), columns] = torch.repeat_interleave(kind, lengths)
    return kinds.view(table.batch, table.heads, table.num_rows, num_columns)


def block_kinds(mod: Mod, batch: int, heads: int, q_len: int, kv_len: int, q_block: int,
                kv_block: int, device: torch.device) -> Tensor:
    """Exact kinds [batch or 1, heads or 1, rows, columns] of the mask's blocks."""
    read = mod.graph.inputs()
    batch, heads = batch if "b" in read else 1, heads if "h" in read else 1
    rows, columns = -(-q_len // q_block), -(-kv_len // kv_block)
    kinds = torch.zeros(batch, heads, rows, columns, dtype=torch.uint8, device=device)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for row, top, bottom in _bands(q_len, q_block, kv_len):
            attended = element_mask(mod, b, h, (top, bottom), kv_len, device)
            kinds[b, h, row:row + -(-(bottom - top) // q_block)] |= _kinds(
                attended, q_block, kv_block)
    return kinds


def _bands(q_len: int, q_block: int, kv_len: int) -> Iterator[tuple[int, int, int]]:
    """(first row of blocks, first query, end query) of bands that fit a chunk."""
    step = max(_CHUNK // max(kv_len * q_block, 1), 1) * q_block
    for top in range(0, q_len, step):
        yield top // q_block, top, min(top + step, q_len)


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


def _kinds(attended: Tensor, q_block: int, kv_block: int) -> Tensor:
    counts = _block_sums(attended, q_block, kv_block)
    areas = _block_sums(torch.ones_like(attended), q_block, kv_block)
    return ((counts > 0).to(torch.uint8) + (counts == areas).to(torch.uint8) * (counts > 0))


def _block_sums(attended: Tensor, q_block: int, kv_block: int) -> Tensor:
    q_len, kv_len = attended.shape
    padded = torch.nn.functional.pad(
        attended.to(torch.uint8), (0, -kv_len % kv_block, 0, -q_len % q_block))
    rows, columns = padded.shape[0] // q_block, padded.shape[1] // kv_block
    return padded.view(rows, q_block, columns, kv_block).sum((1, 3), dtype=torch.int32)
