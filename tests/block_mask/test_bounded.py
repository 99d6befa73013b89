"""Block masks with room for a given number of runs."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

from flexattn import create_block_mask, flex_attention, masks
from flexattn.block_mask.bounded import bounded_columns, room_for
from flexattn.errors import ArgumentError


def causal(length, **options):
    return create_block_mask(masks.causal, None, None, length, length, BLOCK_SIZE=16, **options)


def test_it_is_the_same_mask():
    length = random.randint(100, 400)
    mask, wanted = causal(length, max_runs=200), causal(length)
    assert len(mask.table.start) == 200 and int(mask.table.runs) == len(wanted.rows().start)
    for made in (mask, pickle.loads(pickle.dumps(mask)), mask.to("cpu"), mask[:, :, :]):
        for table, expected in ((made.rows(), wanted.rows()), (made.columns(), wanted.columns())):
            for name in ("offsets", "start", "end", "full"):
                assert torch.equal(getattr(table, name), getattr(expected, name))
    assert mask.sparsity() == wanted.sparsity() and str(mask) == str(wanted)
    assert (~mask).sparsity() == pytest.approx((~wanted).sparsity())
    q = torch.randn(1, 1, length, 16)
    assert torch.equal(flex_attention(q, q, q, block_mask=mask),
                       flex_attention(q, q, q, block_mask=wanted))


def test_too_many_runs():
    """A causal mask has two runs in every row of blocks but the first."""
    assert len(causal(320, max_runs=39).table.start) == 39
    with pytest.raises(ArgumentError, match="room for 39 runs"):
        causal(320, max_runs=38)
    with pytest.raises(ArgumentError, match="max_runs is not a size"):
        causal(320, max_runs=-1)


def test_full_blocks_not_kept_apart():
    mask = causal(320, max_runs=20, separate_full_blocks=False)
    assert not mask.rows().full.any() and len(mask.rows().start) == 20


@pytest.mark.parametrize("tile", [(16, 16), (8, 16), (16, 8), (4, 4), (32, 32)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_tiles_of_kernels_have_enough_room(tile, by_columns):
    """With the room that was needed, other tiles of these masks find theirs."""
    ids = torch.arange(300) // random.randint(20, 90)
    for mask_mod in (masks.causal, masks.causal_document(ids), masks.sliding_window(40),
                     masks.prefix_lm(77)):
        exact = create_block_mask(mask_mod, None, None, 300, 300, BLOCK_SIZE=16)
        mask = create_block_mask(mask_mod, None, None, 300, 300, BLOCK_SIZE=16,
                                 max_runs=len(exact.rows().start))
        fine = exact.regrid(*tile)
        wanted = fine.columns() if by_columns else fine.rows()
        found = mask.kernel_runs(*tile, by_columns).exact()
        for name in ("offsets", "start", "end", "full"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_room_grows_with_the_tiles():
    mask = causal(320, max_runs=50)
    assert room_for(mask.table, 16, 16) >= 50
    assert room_for(mask.table, 8, 4) >= 2 * 4 * 50
    assert len(bounded_columns(mask.table, 60).start) >= 3 * 50
