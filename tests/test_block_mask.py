"""Block masks against the dense mask, counted block by block in plain Python."""

import random

import pytest
import torch

from flexattn import masks
from flexattn.block_mask import BlockMask, create_block_mask, create_mask
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


def test_columns_are_the_transposed_rows():
    mask = create_block_mask(MASKS["window"], None, None, 300, 300, BLOCK_SIZE=32)
    flipped = create_block_mask(lambda b, h, q, k: MASKS["window"](b, h, k, q), None, None, 300,
                                300, BLOCK_SIZE=32)
    for name in ("offsets", "start", "end", "full"):
        assert torch.equal(getattr(mask.columns(), name), getattr(flipped.rows(), name))


def test_regrid_is_a_new_mask_of_that_grid():
    mask = create_block_mask(MASKS["documents"], 2, 1, 300, 300)
    fine, made = mask.regrid(64, 32), create_block_mask(MASKS["documents"], 2, 1, 300, 300,
                                                       BLOCK_SIZE=(64, 32))
    assert fine is mask.regrid(64, 32)
    for name in ("offsets", "start", "end", "full"):
        assert torch.equal(getattr(fine.rows(), name), getattr(made.rows(), name))
    with pytest.raises(ArgumentError, match="does not fit"):
        mask.regrid(48, 48)


def test_slices_keep_their_mask_mod():
    mask = create_block_mask(MASKS["documents"], 2, 3, 300, 300, BLOCK_SIZE=64)
    part = mask[1, :, 2:4]
    assert part.shape == (1, 3, 128, 300)
    got = create_mask(part.mask_mod, 1, 3, 128, 300)
    assert torch.equal(got, create_mask(MASKS["documents"], 2, 3, 300, 300)[1:, :, 128:256])
    assert torch.equal(part.to_dense(), mask.to_dense()[1:, :, 2:4])


def test_torch_block_masks_are_taken():
    from torch.nn.attention.flex_attention import create_block_mask as torch_create

    theirs = torch_create(MASKS["causal"], None, None, 384, 384, device="cpu")
    ours = BlockMask.from_torch(theirs)
    assert ours is BlockMask.from_torch(theirs)
    made = create_block_mask(MASKS["causal"], None, None, 384, 384)
    for name in ("offsets", "start", "end", "full"):
        assert torch.equal(getattr(ours.rows(), name), getattr(made.rows(), name))


def test_errors():
    with pytest.raises(ArgumentError, match="BLOCK_SIZE"):
        create_block_mask(masks.causal, 1, 1, 10, 10, BLOCK_SIZE=0)
    with pytest.raises(ArgumentError, match="Q_LEN"):
        create_block_mask(masks.causal, 1, 1, -1, 10)
    with pytest.raises(DtypeError, match="bool"):
        create_block_mask(lambda b, h, q, k: q - k, 1, 1, 10, 10)
