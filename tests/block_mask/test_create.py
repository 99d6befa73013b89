"""Block masks against the dense mask, counted block by block in plain Python."""

import random

import pytest
import torch

from flexattn import masks
from flexattn.block_mask import create_block_mask, create_mask
from flexattn.errors import ArgumentError, DtypeError

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
