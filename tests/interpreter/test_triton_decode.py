"""The Triton decoding kernels, run by Triton's interpreter, against the dense oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flexattn import create_block_mask
from flexattn.attention import AuxRequest
from flexattn.errors import IndexOutOfRangeError
from flexattn.reference import attention
from flexattn.runtime import launch_gpu, launch_triton_decode
from flexattn.runtime.gpu_launch import Refusal
from flexattn.runtime.launch_triton_decode import packed_heads, prepare
from tests.interpreter.attend import make_call

ALL = AuxRequest(True, True)


def tensors(batch, kv_heads, group, q_len, kv_len, dims, dtype=torch.float32, kv_batch=None):
    """Fresh q, k and v."""
    kv_batch = kv_batch or batch
    return (torch.randn(batch, kv_heads * group, q_len, dims[0], dtype=dtype),
            torch.randn(kv_batch, kv_heads, kv_len, dims[0], dtype=dtype),
            torch.randn(kv_batch, kv_heads, kv_len, dims[1], dtype=dtype))


def check(q, k, v, score_mod=None, mask_mod=None, *, block=32, tolerance=2e-5, scale=None,
          splits=None, mask_heads=None):
    """out, lse and max_scores of the kernel equal those of the oracle. splits: whether the keys
    are to be dealt out."""
    mask = mask_mod and create_block_mask(mask_mod, q.shape[0], mask_heads, q.shape[2], k.shape[2],
                                          BLOCK_SIZE=block)
    call = make_call(q, k, v, score_mod, mask, scale, ALL, {})
    chosen = launch_gpu.choice(call)
    assert chosen.kernel == "triton decode"
    if splits is not None:
        assert (chosen.prepared.splits(k.shape[2]) > 1) is splits
    found = launch_gpu.forward(call)
    wanted = attention(q, k, v, score_mod, mask_mod, scale, torch.float64)
    for x, y in zip((found.out, found.lse, found.max_scores), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
    return call


def softcap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


@pytest.mark.parametrize("group, q_len", [(1, 1), (3, 1), (5, 4), (2, 16)], ids=str)
def test_any_group_and_few_queries(rng, group, q_len):
    kv_len = int(rng.integers(70, 130))
    q, k, v = tensors(1, 2, group, q_len, kv_len, (16, 24))
    check(q, k, v, splits=True)
    check(*tensors(4, 2, group, q_len, int(rng.integers(1, 40)), (32, 16), kv_batch=1), softcap,
          splits=False)


def test_mods_know_their_head_and_query(rng):
    slopes, table = torch.rand(6), torch.randn(6, 100)

    def bias(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx) + table[h, kv_idx] * (b + 1) * 0.1

    check(*tensors(2, 2, 3, 3, int(rng.integers(50, 100)), (16, 16)), bias)


def test_masks_with_an_offset_and_every_kind_of_block(rng):
    kv_len = int(rng.integers(150, 200))
    offset, start = torch.tensor(kv_len - 5), torch.tensor(int(rng.integers(0, 60)))

    def window(b, h, q_idx, kv_idx):
        return (q_idx + offset >= kv_idx) & ((kv_idx >= start + 20 * b) | (kv_idx < 10))

    q, k, v = tensors(2, 1, 4, 5, kv_len, (16, 16))
    assert packed_heads(check(q, k, v, softcap, window, splits=True)) == 4


def test_scattered_blocks(rng):
    """Runs of one block, more than splits."""
    kv_len = 320
    chosen = torch.rand(kv_len // 16) < 0.5
    chosen[rng.integers(len(chosen))] = True
    odd = torch.rand(kv_len) < 0.5

    def scattered(b, h, q_idx, kv_idx):
        return chosen[kv_idx // 16] & (odd[kv_idx] | (kv_idx // 64 != 1))

    check(*tensors(1, 1, 3, 2, kv_len, (16, 16)), None, scattered, block=16)
    check(*tensors(1, 1, 3, 2, kv_len - 7, (16, 16)), None, scattered, block=16)


def test_a_mask_that_differs_within_a_group(rng):
    """Then heads are not packed."""
    kv_len = int(rng.integers(60, 100))
    q, k, v = tensors(2, 2, 3, 2, kv_len, (16, 16))
    call = check(q, k, v, softcap, lambda b, h, q_idx, kv_idx: kv_idx % (h + 2) != 1,
                 mask_heads=6)
    assert packed_heads(call) == 1
    check(q, k, v, None, lambda b, h, q_idx, kv_idx: kv_idx >= 20 * h, mask_heads=6)


def test_16_bit_numbers(rng):
    check(*tensors(1, 2, 2, 1, int(rng.integers(60, 90)), (32, 32), torch.float16), softcap,
          lambda b, h, q_idx, kv_idx: kv_idx >= 7, tolerance=1e-2)


def test_rows_that_attend_to_nothing():
    q, k, v = tensors(2, 1, 2, 4, 100, (16, 16))
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: (q_idx % 2 == 1) & (b == 1), 2, None, 4,
                             100, BLOCK_SIZE=32)
    for score_mod in (None, softcap):
        found = launch_gpu.forward(make_call(q, k, v, score_mod, mask, None, ALL, {}))
        empty = torch.ones(2, 2, 4, dtype=torch.bool)
        empty[1, :, 1::2] = False
        assert (found.out[empty] == 0).all() and (found.lse[empty] == -math.inf).all()
        assert (found.max_scores[empty] == -math.inf).all()
        assert found.lse[~empty].isfinite().all() and found.out.isfinite().all()


def test_strides_and_scales(rng):
    kv_len = int(rng.integers(60, 90))
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2)
               for t in tensors(2, 2, 2, 3, kv_len, (16, 16)))
    check(q, k.mT.contiguous().mT, v, scale=-0.7)
    check(q, k, v, softcap, scale=0.0)


def test_a_read_out_of_range_is_reported():
    table = torch.randn(20)
    call = make_call(*tensors(1, 1, 1, 1, 30, (16, 16)),
                 lambda score, b, h, q_idx, kv_idx: score + table[kv_idx], None, None, ALL, {})
    launch_gpu.forward(call)
    with pytest.raises(IndexOutOfRangeError, match=r"captured tensor 0 \(shape \(20,\)\)"):
        launch_gpu.forward(call)


def test_more_splits_than_are_read_at_a_time(monkeypatch):
    monkeypatch.setattr(launch_triton_decode, "_INTERPRETED_AT_ONCE", 40)
    check(*tensors(1, 1, 1, 1, 640, (16, 16)), splits=True)


def test_a_growing_cache_is_prepared_once(monkeypatch):
    """Whether it is copied for each token or has room for all, with padding and without."""
    k, v, real = torch.randn(2, 1, 200, 16), torch.randn(2, 1, 200, 16), torch.rand(2, 200) < 0.9
    q, prepared = torch.randn(2, 4, 1, 16), []

    def counted(call):
        prepared.append(call)
        return prepare(call)

    monkeypatch.setitem(launch_gpu.FORWARD, "triton decode", counted)
    launch_gpu._choices.clear()
    for kv_len in (3, 16, 17, 18, 100, 101, 200):
        kept = real[:, :kv_len].clone()
        kept[:, 0] = True
        keys, values = k[:, :, :kv_len], v[:, :, :kv_len]
        check(q, keys, values, softcap)
        check(q, keys.contiguous(), values.contiguous(), softcap)
        check(q, keys, values, None, lambda b, h, q_idx, kv_idx, kept=kept: kept[b, kv_idx])
    assert len(prepared) == 2


def test_a_shorter_table_is_another_preparation():
    """What is proven of reads is part of what calls share: beyond a table's end none is."""
    q, k, v = tensors(1, 1, 2, 1, 60, (16, 16))
    table = torch.randn(40)
    for kv_len in (30, 40):
        check(q, k[:, :, :kv_len], v[:, :, :kv_len],
              lambda score, b, h, q_idx, kv_idx: score + table[kv_idx])
    call = make_call(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[kv_idx], None, None,
                     ALL, {})
    launch_gpu.forward(call)
    with pytest.raises(IndexOutOfRangeError, match=r"shape \(40,\)"):
        launch_gpu.forward(call)


def test_many_queries_are_refused():
    found = prepare(make_call(*tensors(1, 1, 1, 17, 30, (16, 16)), None, None, None, ALL, {}))
    assert isinstance(found, Refusal) and "17 queries" in found.reason
