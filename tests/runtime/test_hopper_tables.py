"""The rows and runs that Hopper's kernels walk, against the block mask they were made of."""

from __future__ import annotations

import pytest
import torch

from flexattn.block_mask import create_block_mask
from flexattn.runtime.hopper_tables import hopper_table


def walked(table, row):
    """The blocks of a row in the order of the kernel, and whether each needs no mask."""
    first, whole, run, partial, full = table.rows[row].tolist()
    blocks = []
    for start, end in table.runs[run:].tolist():
        blocks += range(start, end)
        if len(blocks) >= partial + full:
            break
    assert len(blocks) == partial + full or partial + full == 0
    pairs = [(block, i >= partial) for i, block in enumerate(blocks[:partial + full])]
    return ([(first, bool(whole))] if first >= 0 else []) + pairs


@pytest.mark.parametrize("tile", [(128, 128), (192, 128), (128, 64)])
@pytest.mark.parametrize("lengths", [(1000, 1000), (640, 900), (100, 1025)])
def test_every_block_once(lengths, tile):
    q_len, kv_len = lengths
    period = int(torch.randint(300, 900, ()))

    def mask(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (kv_idx % period < 300) & (q_idx > 200 * (h % 2))

    made = create_block_mask(mask, None, 2, q_len, kv_len)
    table, runs = hopper_table(made, *tile, True), made.regrid(*tile).rows()
    last = -(-kv_len // tile[1]) - 1
    assert (table.batches, table.heads) == (0, 1)
    for row in range(2 * runs.num_rows):
        wanted = [(block, bool(runs.full[i]))
                  for i in range(runs.offsets[row], runs.offsets[row + 1])
                  for block in range(runs.start[i], runs.end[i])]
        found = walked(table, row)
        assert sorted(found) == sorted(wanted)
        if kv_len % tile[1] and any(block == last for block, _ in wanted):
            assert found[0][0] == last, "only the first block is bounded"


def test_longest_rows_first():
    made = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 1024, 1024)
    assert hopper_table(made, 128, 128, True).order.tolist() == list(range(7, -1, -1))


def test_without_a_mask_all_blocks_are_full():
    made = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 512, 512)
    rows = hopper_table(made, 128, 128, False).rows
    assert rows[:, 1].tolist() == [1] * 4 and rows[:, 3].sum() == 0


def test_an_empty_row():
    made = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx > 255, None, None, 512, 512)
    assert hopper_table(made, 128, 128, True).rows[:, 0].tolist()[:2] == [-1, -1]
