"""Tables of runs of blocks: what is stored of a block mask, and how tables are made of tables.

In: kinds of blocks, runs in any order, or other tables. Out: `RunTable`s. Work and memory grow with
the runs, not with rows x columns, except where a dense tensor is given or asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message

EMPTY, PARTIAL, FULL = range(3)


@dataclass(frozen=True)
class RunTable:
    """Rows of runs of blocks.

    offsets int32 [batch * heads * num_rows + 1]: the runs of row (b, h, r) are offsets[i] to
    offsets[i + 1]; start, end int32 [runs]: blocks [start, end) along the other axis, ascending;
    full bool [runs]: no element needs the mask. batch and heads are 1 where broadcast; row_block
    and col_block are block sizes in tokens. runs: None, or int32 [1], how many runs there are: then
    start, end and full have room for more, with anything behind the last run; where they have room
    for too few, rows end early.
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
    runs: Tensor | None = None

    def to(self, device: torch.device | str) -> RunTable:
        moved = {name: getattr(self, name).to(device)
                 for name in ("offsets", "start", "end", "full")}
        return replace(self, **moved, runs=None if self.runs is None else self.runs.to(device))

    def exact(self) -> RunTable:
        """Without room; raises ArgumentError where there is too little."""
        if self.runs is None:
            return self
        runs = int(self.runs)
        if runs > len(self.start):
            raise too_little_room(runs, len(self.start))
        return replace(self, start=self.start[:runs], end=self.end[:runs], full=self.full[:runs],
                       runs=None)

    def with_room(self, room: int) -> RunTable:
        """With room for so many runs; raises ArgumentError where there are more."""
        more = room - len(self.start)
        if more < 0:
            raise too_little_room(len(self.start), room)
        start, end, full = (torch.nn.functional.pad(t, (0, more))
                            for t in (self.start, self.end, self.full))
        return replace(self, start=start, end=end, full=full, runs=self.offsets[-1:].clone())

    def row_of_runs(self) -> Tensor:
        """int64 [runs]: (b * heads + h) * num_rows + r of each run."""
        numbers = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.offsets.diff().long(),
                                       output_size=len(self.start))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size()
                   for t in (self.offsets, self.start, self.end, self.full))


def too_little_room(runs: int, room: int) -> ArgumentError:
    return ArgumentError(message(
        "A block mask has more runs than it was given room for, and lacks blocks.",
        expected=f"room for {runs} runs", got=f"room for {room}, in this call or an earlier one "
        "(GPUs report late)", remedy="create_block_mask with a larger max_runs, or without"))


@dataclass(frozen=True)
class Pieces:
    """Blocks [start, end) of rows, int64 [pieces] each, in any order, `full` bool [pieces]; of one
    row they are disjoint. Neighbours of one kind become one run."""

    row: Tensor
    start: Tensor
    end: Tensor
    full: Tensor

    @classmethod
    def join(cls, parts: list[Pieces]) -> Pieces:
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, name) for p in parts])
                     for name in ("row", "start", "end", "full")))

    def select(self, chosen: Tensor) -> Pieces:
        return Pieces(*(t[chosen] for t in (self.row, self.start, self.end, self.full)))


def run_table(pieces: Pieces, columns: int, batch: int, heads: int, num_rows: int, row_block: int,
              col_block: int) -> RunTable:
    """The table of rows 0 to batch * heads * num_rows."""
    rows = batch * heads * num_rows
    stride = columns + 1  # runs of two rows never touch
    key, order = torch.sort(pieces.row * stride + pieces.start)
    end = key + (pieces.end - pieces.start)[order]
    full = pieces.full[order]
    first = torch.ones(len(key) + 1, dtype=torch.bool, device=key.device)
    torch.ne(end[:-1], key[1:], out=first[1:-1])
    first[1:-1] |= full[:-1] != full[1:]
    at = first.nonzero().squeeze(1)
    first_of, last_of = at[:-1], at[1:] - 1
    key, end = key[first_of], end[last_of]
    row = key // stride
    base = row * stride
    bounds = torch.arange(rows + 1, device=key.device) * stride
    offsets = torch.searchsorted(key, bounds, out_int32=True)
    return RunTable(offsets, (key - base).int(), (end - base).int(), full[first_of], batch, heads,
                    num_rows, row_block, col_block)


def stacked(tables: list[RunTable], batch: int, heads: int, num_rows: int) -> RunTable:
    """Tables of consecutive rows as one."""
    if len(tables) == 1:
        return replace(tables[0], batch=batch, heads=heads, num_rows=num_rows)
    counts = torch.cat([t.offsets.diff() for t in tables])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    start, end, full = (torch.cat([getattr(t, name) for t in tables])
                        for name in ("start", "end", "full"))
    return RunTable(offsets, start, end, full, batch, heads, num_rows, tables[0].row_block,
                    tables[0].col_block)


def runs_of_kinds(kinds: Tensor, row_block: int, col_block: int) -> RunTable:
    """The table of `kinds` uint8 [batch, heads, rows, columns] (EMPTY, PARTIAL or FULL)."""
    batch, heads, rows, columns = kinds.shape
    return run_table(pieces_of_kinds(kinds.flatten(0, 2)), columns, batch, heads, rows,
                     row_block, col_block)


def pieces_of_kinds(kinds: Tensor) -> Pieces:
    """The runs of `kinds` uint8 [rows, columns]."""
    rows, columns = kinds.shape
    edge = torch.nn.functional.pad(kinds, (1, 1))  # EMPTY is 0
    first = ((kinds != EMPTY) & (kinds != edge[:, :-2])).view(-1).nonzero().squeeze(1)
    last = ((kinds != EMPTY) & (kinds != edge[:, 2:])).view(-1).nonzero().squeeze(1)
    row = first // max(columns, 1)
    base = row * columns
    return Pieces(row, first - base, last - base + 1, kinds.reshape(-1)[first] == FULL)


def kinds_of_runs(table: RunTable, num_columns: int) -> Tensor:
    """The uint8 [batch, heads, rows, columns] that `runs_of_kinds` takes."""
    rows = table.batch * table.heads * table.num_rows
    kinds = torch.zeros(rows, num_columns, dtype=torch.uint8, device=table.start.device)
    lengths = (table.end - table.start).long()
    row, column = expanded(table.row_of_runs(), table.start.long(), lengths)
    kind = torch.where(table.full, FULL, PARTIAL).to(torch.uint8)
    kinds[row, column] = torch.repeat_interleave(kind, lengths)
    return kinds.view(table.batch, table.heads, table.num_rows, num_columns)


def expanded(row: Tensor, start: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(row, start + 0, 1, ... lengths - 1) of each run."""
    first = torch.repeat_interleave(start - lengths.cumsum(0) + lengths, lengths)
    return (torch.repeat_interleave(row, lengths),
            torch.arange(len(first), device=first.device) + first)


def transposed(table: RunTable, num_columns: int) -> RunTable:
    """The same blocks as rows of `num_columns` columns: where rows differ from the one above."""
    above = table.num_rows + 1
    row = table.row_of_runs()
    row = row + row // max(table.num_rows, 1)  # one more, empty, below each image
    own = Pieces(row, table.start.long(), table.end.long(), table.full)
    moved = replace(own, row=row + 1)
    changed = segments([own, moved], num_columns).select_where(lambda now, old: now != old)
    edges = []
    for kind in (changed.kinds[0], changed.kinds[1]):
        some = kind != EMPTY
        lengths = (changed.end - changed.start)[some]
        row, column = expanded(changed.row[some], changed.start[some], lengths)
        target = (row // above) * num_columns + column
        key, order = torch.sort(target * above + row % above)
        edges.append((key, torch.repeat_interleave(kind[some] == FULL, lengths)[order]))
    (start, full), (end, _) = edges
    target = start // above
    pieces = Pieces(target, start - target * above, end - target * above, full)
    return run_table(pieces, table.num_rows, table.batch, table.heads, num_columns,
                     table.col_block, table.row_block)


@dataclass(frozen=True)
class Segments:
    """Blocks [start, end) of rows over which no table changes; `kinds`: one a table."""

    row: Tensor
    start: Tensor
    end: Tensor
    kinds: tuple[Tensor, ...]

    def select_where(self, condition: Callable[..., Tensor]) -> Segments:
        chosen = condition(*self.kinds)
        return Segments(self.row[chosen], self.start[chosen], self.end[chosen],
                        tuple(k[chosen] for k in self.kinds))


def segments(tables: list[Pieces], columns: int) -> Segments:
    """The common segments of tables whose rows have the same numbers, where one is not empty."""
    stride = columns + 1
    keys, steps = [], []
    for number, pieces in enumerate(tables):
        step = torch.where(pieces.full, FULL, PARTIAL) << (2 * number)
        keys += [pieces.row * stride + pieces.start, pieces.row * stride + pieces.end]
        steps += [step, -step]
    key, order = torch.sort(torch.cat(keys))
    state = torch.cat(steps)[order].cumsum(0)
    chosen = ((key[1:] > key[:-1]) & (state[:-1] != 0)).nonzero().squeeze(1)
    first, last, state = key[chosen], key[chosen + 1], state[chosen]
    row = first // stride
    kinds = tuple((state >> (2 * number)) & 3 for number in range(len(tables)))
    return Segments(row, first - row * stride, last - row * stride, kinds)


def pieces_of(table: RunTable) -> Pieces:
    return Pieces(table.row_of_runs(), table.start.long(), table.end.long(), table.full)


def all_partial(table: RunTable, columns: int) -> RunTable:
    """The same blocks, none of them full."""
    pieces = pieces_of(table)
    marked = replace(pieces, full=torch.zeros_like(pieces.full))
    return run_table(marked, columns, table.batch, table.heads, table.num_rows, table.row_block,
                     table.col_block)


def take_rows(table: RunTable, rows: Tensor, batch: int, heads: int, num_rows: int) -> RunTable:
    """The rows with these numbers, int64 [batch * heads * num_rows], in this order."""
    offsets = table.offsets.long()
    counts = (offsets[1:] - offsets[:-1])[rows]
    _, at = expanded(rows, offsets[rows], counts)
    return RunTable(torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), table.start[at],
                    table.end[at], table.full[at], batch, heads, num_rows, table.row_block,
                    table.col_block)


def broadcast_rows(table: RunTable, batch: int, heads: int) -> RunTable:
    """The table with rows for every batch entry and head."""
    if (table.batch, table.heads) == (batch, heads):
        return table
    images = torch.arange(table.batch * table.heads, device=table.offsets.device)
    images = images.view(table.batch, table.heads, 1).expand(batch, heads, 1)
    rows = images * table.num_rows + torch.arange(table.num_rows, device=images.device)
    return take_rows(table, rows.reshape(-1), batch, heads, table.num_rows)


def cropped(table: RunTable, num_rows: int, columns: int) -> RunTable:
    """The first rows and columns."""
    images = torch.arange(table.batch * table.heads, device=table.offsets.device)[:, None]
    rows = images * table.num_rows + torch.arange(num_rows, device=images.device)
    pieces = pieces_of(take_rows(table, rows.reshape(-1), table.batch, table.heads, num_rows))
    cut = replace(pieces, end=pieces.end.clamp(max=columns)).select(pieces.start < columns)
    return run_table(cut, columns, table.batch, table.heads, num_rows, table.row_block,
                     table.col_block)
