"""Tables of runs against dense matrices of kinds, row by row in plain Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexattn.analysis.runs import (
    EMPTY,
    FULL,
    PARTIAL,
    Pieces,
    all_partial,
    broadcast_rows,
    cropped,
    kinds_of_runs,
    pieces_of,
    run_table,
    runs_of_kinds,
    segments,
    stacked,
    take_rows,
    transposed,
)


def random_kinds(rng, *shape):
    """Kinds with runs in them."""
    kinds = torch.from_numpy(rng.integers(0, 3, shape)).to(torch.uint8)
    return torch.where(torch.rand(shape) < 0.6, kinds.roll(1, -1), kinds)


def runs_of_row(kinds):
    """(start, end, full) of the runs of one row, in plain Python."""
    runs: list[list] = []
    for column, kind in enumerate(kinds):
        if kind != EMPTY and runs and runs[-1][1] == column and runs[-1][2] == (kind == FULL):
            runs[-1][1] += 1
        elif kind != EMPTY:
            runs.append([column, column + 1, kind == FULL])
    return runs


def check(table, kinds):
    """The table holds exactly the runs of `kinds` [batch, heads, rows, columns]."""
    batch, heads, rows, columns = kinds.shape
    assert (table.batch, table.heads, table.num_rows) == (batch, heads, rows)
    assert {t.dtype for t in (table.offsets, table.start, table.end)} == {torch.int32}
    offsets = table.offsets.tolist()
    assert len(offsets) == batch * heads * rows + 1 and offsets[0] == 0
    for i, row in enumerate(kinds.flatten(0, 2).tolist()):
        here = slice(offsets[i], offsets[i + 1])
        got = [list(run) for run in zip(table.start[here].tolist(), table.end[here].tolist(),
                                        table.full[here].tolist(), strict=True)]
        assert got == runs_of_row(row), (i, row)
    assert offsets[-1] == len(table.start)


@pytest.fixture
def kinds(rng):
    return random_kinds(rng, *rng.integers(1, 4, 2), *rng.integers(1, 12, 2))


@pytest.mark.parametrize("round_", range(10))
def test_kinds_and_runs(kinds, round_):
    table = runs_of_kinds(kinds, 64, 32)
    check(table, kinds)
    assert (table.row_block, table.col_block) == (64, 32)
    assert torch.equal(kinds_of_runs(table, kinds.shape[-1]), kinds)
    check(transposed(table, kinds.shape[-1]), kinds.transpose(-1, -2))
    check(all_partial(table, kinds.shape[-1]), kinds.clamp(max=PARTIAL))


def test_pieces_in_any_order_become_runs(kinds):
    """Every block a piece of its own, shuffled."""
    batch, heads, rows, columns = kinds.shape
    row, column = (kinds.reshape(-1, columns) != EMPTY).nonzero(as_tuple=True)
    order = torch.randperm(len(row))
    row, column = row[order], column[order]
    full = kinds.reshape(-1, columns)[row, column] == FULL
    pieces = Pieces(row, column, column + 1, full)
    check(run_table(pieces, columns, batch, heads, rows, 1, 1), kinds)


def test_rows_are_taken_repeated_and_cropped(kinds, rng):
    batch, heads, rows, columns = kinds.shape
    table = runs_of_kinds(kinds, 1, 1)
    at = torch.from_numpy(rng.integers(0, batch * heads * rows, 6))
    check(take_rows(table, at, 1, 2, 3), kinds.reshape(-1, columns)[at].view(1, 2, 3, columns))
    height, width = int(rng.integers(0, rows + 1)), int(rng.integers(0, columns + 1))
    cut = cropped(table, height, width)
    assert torch.equal(kinds_of_runs(cut, width), kinds[:, :, :height, :width])
    one = runs_of_kinds(kinds[:1, :1], 1, 1)
    check(broadcast_rows(one, 2, 3), kinds[:1, :1].expand(2, 3, -1, -1))


def test_tables_of_consecutive_rows_are_joined(kinds):
    batch, heads, rows, columns = kinds.shape
    parts = [runs_of_kinds(row.view(1, 1, 1, -1), 1, 1) for row in kinds.reshape(-1, columns)]
    check(stacked(parts, batch, heads, rows), kinds)


def test_segments_tell_two_tables_apart(rng):
    first, second = random_kinds(rng, 7, 9), random_kinds(rng, 7, 9)
    tables = [pieces_of(runs_of_kinds(k[None, None], 1, 1)) for k in (first, second)]
    found = segments(tables, 9)
    seen = torch.zeros(7, 9, 2, dtype=torch.uint8)
    for i in range(len(found.row)):
        seen[found.row[i], found.start[i]:found.end[i]] += torch.tensor(
            [int(k[i]) for k in found.kinds], dtype=torch.uint8)
    assert torch.equal(seen, torch.stack([first, second], -1))
    other = found.select_where(lambda a, b: a != b)
    assert bool((other.kinds[0] != other.kinds[1]).all())
    assert int((other.end - other.start).sum()) == int((first != second).sum())


def test_nothing(rng):
    empty = torch.zeros(2, 1, 3, 5, dtype=torch.uint8)
    table = runs_of_kinds(empty, 1, 1)
    check(table, empty)
    check(transposed(table, 5), empty.transpose(-1, -2))
    for shape in ((1, 1, 0, 4), (1, 1, 4, 0)):
        check(runs_of_kinds(torch.zeros(shape, dtype=torch.uint8), 1, 1),
              torch.zeros(shape, dtype=torch.uint8))


def test_columns_of_a_long_mask_need_no_dense_matrix():
    rows = 1 << 16
    row = torch.arange(rows)
    pieces = Pieces(torch.cat([row[1:], row]), torch.cat([row[1:] * 0, row]),
                    torch.cat([row[1:], row + 1]), torch.cat([row[1:] >= 0, row < 0]))
    table = run_table(pieces, rows, 1, 1, rows, 1, 1)  # causal: full below the diagonal
    flipped = transposed(table, rows)
    assert torch.equal(flipped.start, torch.stack([row, row + 1], 1).view(-1)[:-1].int())
    assert torch.equal(flipped.full, (torch.arange(2 * rows - 1) % 2).bool())
    assert replace(table).nbytes == 4 * (rows + 1) + 9 * (2 * rows - 1)
