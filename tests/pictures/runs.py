"""Runs made in plain Python from a table of block kinds, and the kinds from elements."""

from types import SimpleNamespace

import torch

EMPTY, PARTIAL, FULL = 0, 1, 2


def kinds_of(attended, block_q, block_kv):
    """Kind of every block of a bool [Q, KV] tensor."""
    tiles = [rows.split(block_kv, 1) for rows in attended.split(block_q)]
    return [[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles]


def runs_of(tables, block_q, block_kv):
    """The RunTable of tables[b][h][row][column] of kinds."""
    offsets, start, end, full = [0], [], [], []
    for row in (row for heads in tables for table in heads for row in table):
        for column, kind in enumerate(row):
            if kind == EMPTY:
                continue
            if column and row[column - 1] == kind:
                end[-1] = column + 1
            else:
                start.append(column)
                end.append(column + 1)
                full.append(kind == FULL)
        offsets.append(len(start))
    numbers = [torch.tensor(t, dtype=torch.int32) for t in (offsets, start, end)]
    return SimpleNamespace(
        offsets=numbers[0], start=numbers[1], end=numbers[2], full=torch.tensor(full).bool(),
        batch=len(tables), heads=len(tables[0]), num_rows=len(tables[0][0]), row_block=block_q,
        col_block=block_kv)


def causal_runs(length, block):
    """Causal, without a table of blocks."""
    rows = torch.arange(length // block)
    start, end = torch.stack([torch.zeros_like(rows), rows], 1), torch.stack([rows, rows + 1], 1)
    full = torch.tensor([True, False]).repeat(len(rows))
    return SimpleNamespace(
        offsets=(torch.arange(len(rows) + 1, dtype=torch.int32) * 2 - 1).clamp(min=0),
        start=start.flatten()[1:].int(), end=end.flatten()[1:].int(), full=full[1:],
        batch=1, heads=1, num_rows=len(rows), row_block=block, col_block=block)
