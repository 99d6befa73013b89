"""Masks that are traced once, and masks whose blocks nobody looks at."""

import copy
import pickle

import pytest
import torch

from flexattn import create_block_mask, flex_attention, masks
from flexattn.block_mask import BlockMask, settled, undivided
from flexattn.integrations.torch_block_mask import as_torch


def counted(calls):
    def mod(b, h, q_idx, kv_idx):
        calls.append(0)
        return q_idx >= kv_idx
    return mod


def test_a_settled_mask_is_traced_once_until_its_mod_is_changed():
    calls = []
    mask = settled(create_block_mask(counted(calls), None, None, 50, 50))
    q = torch.randn(1, 1, 50, 16)
    calls.clear()
    wanted = flex_attention(q, q, q, block_mask=create_block_mask(masks.causal, None, None, 50, 50))
    for _ in range(3):
        assert torch.equal(flex_attention(q, q, q, block_mask=mask), wanted)
    assert len(calls) == 1
    mask.mask_mod = lambda b, h, q_idx, kv_idx: kv_idx <= 3
    assert not torch.equal(flex_attention(q, q, q, block_mask=mask), wanted)


def real_tokens(batch, kv_len):
    real = torch.rand(batch, kv_len) < 0.7
    real[:, -1] = True
    return real


@pytest.mark.parametrize("q_len, kv_len", [(1, 300), (5, 77), (200, 260)])
def test_an_undivided_mask_attends_as_its_mod_says(rng, q_len, kv_len):
    real = real_tokens(2, kv_len)

    def mod(b, h, q_idx, kv_idx):
        return real[b, kv_idx] & (kv_idx <= q_idx + kv_len - q_len)

    q = torch.randn(2, 2, q_len, 16)
    k, v = torch.randn(2, 2, 2, kv_len, 16)
    mask = undivided(mod, 2, q_len, kv_len, "cpu")
    dense = real[:, None, None] & torch.ones(q_len, kv_len, dtype=bool).tril(kv_len - q_len)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), wanted.nan_to_num(),
                               rtol=1e-4, atol=1e-5)


def test_blocks_of_an_undivided_mask_are_not_looked_at_and_its_tables_are_shared():
    """No value of `real` can be read; lengths with as many blocks have the same tensors."""
    def made(kv_len):
        real = torch.empty(2, kv_len, dtype=torch.bool, device="meta")
        return undivided(lambda b, h, q_idx, kv_idx: real[b, kv_idx], 2, 1, kv_len, "meta")

    one, other = made(300), made(310)
    assert one.shape == (2, 1, 1, 300) and one.traced(one.device).captures[0].shape == (2, 300)
    assert one.rows().full is other.rows().full
    fine = one.regrid(16, 64)
    assert fine.BLOCK_SIZE == (16, 64) and fine is one.regrid(16, 64)
    assert fine.rows().end is other.regrid(16, 64).rows().end


def test_tables_are_of_the_blocks_asked_for():
    mask = undivided(masks.causal, 1, 40, 300, "cpu").regrid(16, 64)
    assert mask.rows().offsets.tolist() == [0, 1, 2, 3]
    assert mask.rows().end.tolist() == [5, 5, 5] and not mask.rows().full.any()
    assert mask.to_dense().sum() == 15


@pytest.mark.parametrize("make", [as_torch, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
                                  lambda m: m.to("cpu")])
def test_copies_are_masks_of_the_same_kind(make):
    mask = undivided(masks.causal, 1, 1, 300, "cpu")
    mask.traced(mask.device)
    made = make(mask)
    assert isinstance(made, BlockMask) and type(made.regrid(16, 64)) is type(made)
    assert torch.equal(made.to_dense(), mask.to_dense())
