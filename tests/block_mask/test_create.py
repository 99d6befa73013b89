"""Block masks against the dense mask, counted block by block in plain Python."""

import random

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from flexattn import BlockMask, flex_attention, masks
from flexattn.block_mask import create_block_mask, create_mask
from flexattn.errors import ArgumentError, DtypeError, ShapeError

documents = torch.randint(0, 4, (2, 300)).sort(-1).values
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k <= 40),
    "documents": lambda b, h, q, k: (documents[b, q] == documents[b, k]) & (q >= k),
    "heads": lambda b, h, q, k: (q - k).abs() <= 30 * (h + 1),
    "nothing": lambda b, h, q, k: k < 0,
    "scattered": lambda b, h, q, k: (q * 7 + k * 13) % 97 == 0,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [16, (64, 32), 128])
def test_equals_brute_force(name, block):
    q_len, kv_len = random.randint(1, 300), random.randint(1, 300)
    mask = create_block_mask(MASKS[name], 2, 3, q_len, kv_len, BLOCK_SIZE=block)
    dense = create_mask(MASKS[name], 2, 3, q_len, kv_len)
    rows, columns = mask.BLOCK_SIZE
    partial, full = mask.kv_num_blocks, mask.full_kv_num_blocks
    empty_area = 0
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        for i in range(-(-q_len // rows)):
            kinds = [[], []]
            for j in range(-(-kv_len // columns)):
                tile = dense[b, h, i * rows:(i + 1) * rows, j * columns:(j + 1) * columns]
                if tile.any():
                    kinds[int(tile.all())].append(j)
                else:
                    empty_area += tile.numel()
            for (count, index), expected in zip(
                    ((partial, mask.kv_indices), (full, mask.full_kv_indices)), kinds,
                    strict=True):
                assert index[b, h, i, :count[b, h, i]].tolist() == expected, (q_len, kv_len, i)
    assert mask.sparsity() == pytest.approx(100 * empty_area / dense.numel())


def test_dense_mask_is_the_users_function():
    q, k = torch.arange(50)[:, None], torch.arange(70)
    assert torch.equal(create_mask(MASKS["window"], 1, 1, 50, 70)[0, 0], (q >= k) & (q - k <= 40))


def test_full_blocks_are_partial_where_not_wanted_apart():
    mask = create_block_mask(masks.causal, 1, 2, 300, 300, separate_full_blocks=False)
    assert mask.full_kv_num_blocks is None and mask.full_q_indices is None
    assert mask.kv_num_blocks[0, 1].tolist() == [1, 2, 3]
    assert not mask.rows().full.any()


def test_unread_dimensions_are_broadcast():
    mask = create_block_mask(MASKS["heads"], 5, 3, 200, 200)
    assert (mask.rows().batch, mask.rows().heads) == (1, 3)
    assert mask.shape == (5, 3, 200, 200) and mask.kv_num_blocks.shape == (5, 3, 2)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(sizes):
    mask = create_block_mask(masks.causal, None, None, *sizes)
    assert len(mask.rows().start) == 0 and mask.shape[2:] == sizes
    assert len(mask.columns().offsets) == -(-sizes[1] // 128) + 1


def test_errors():
    with pytest.raises(ArgumentError, match="BLOCK_SIZE"):
        create_block_mask(masks.causal, 1, 1, 10, 10, BLOCK_SIZE=0)
    with pytest.raises(ArgumentError, match="Q_LEN"):
        create_block_mask(masks.causal, 1, 1, -1, 10)
    with pytest.raises(DtypeError, match="bool"):
        create_block_mask(lambda b, h, q, k: q - k, 1, 1, 10, 10)
    with pytest.raises(ArgumentError, match="BLOCK_SIZE"):
        create_block_mask(masks.causal, 1, 1, 10, 10, BLOCK_SIZE=64.0)
    with pytest.raises(ArgumentError, match="no such option"):
        create_block_mask(masks.causal, 1, 1, 10, 10, block_size=32)
    with pytest.raises(ArgumentError, match="Q_LEN"):
        create_mask(masks.causal, 1, 1, -1, 10)


def test_sizes_of_numpy_and_tensors():
    mask = create_block_mask(masks.causal, None, None, np.int64(300), torch.tensor(300),
                             BLOCK_SIZE=np.int64(32), compute_dq_write_order=False)
    assert mask.shape == (1, 1, 300, 300) and mask.BLOCK_SIZE == (32, 32)
    assert create_mask(masks.causal, 0, None, 4, 4).shape == (0, 1, 4, 4)


def test_lengths_beyond_the_rows_of_blocks():
    """A kernel would read beyond the table."""
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1).int()
    with pytest.raises(ArgumentError, match="too few rows"):
        BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=32, seq_lengths=(65, 64))
    q = torch.randn(1, 1, 300, 16)
    mask = create_block_mask(masks.causal, None, None, 64, 64)
    mask.seq_lengths = (300, 300)
    with pytest.raises(ShapeError, match="too few rows"):
        flex_attention(q, q, q, block_mask=mask)
    theirs = torch_flex.create_block_mask(masks.causal, 1, 1, 64, 64, device="cpu")
    flex_attention(*(q[:, :, :64],) * 3, block_mask=theirs)
    theirs.seq_lengths = (300, 300)
    with pytest.raises(ArgumentError, match="too few rows"):
        flex_attention(q, q, q, block_mask=theirs)


@pytest.mark.parametrize("mask", [
    lambda b, h, q, k: q * q <= k**3 + 1, lambda b, h, q, k: k**3 - q >= 0,
    lambda b, h, q, k: k < abs(q**3), lambda b, h, q, k: (q**5) << 9 > k])
def test_powers_in_further_arithmetic(mask):
    blocks = create_block_mask(mask, 1, 1, 64, 64, BLOCK_SIZE=16)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), create_mask(mask, 1, 1, 64, 64)[0, 0].view(
        4, 16, 4, 16).any(3).any(1))
    blocks.verify()
