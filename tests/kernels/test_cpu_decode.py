"""The split-KV decoding kernel against the dense oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flexattn import compile
from flexattn.runtime import cpu_call, launch_cpu
from tests.kernels.cpu_attend import alibi, attend, check, softcap, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def only_decoding(monkeypatch):
    """What these tests call must be the decoding kernel."""
    monkeypatch.setattr(launch_cpu, "_run_forward", None)


@pytest.fixture
def many_splits(monkeypatch):
    """Short sequences are split too."""
    monkeypatch.setattr(launch_cpu, "_KEYS_WORTH_SPLITTING", 64)
    monkeypatch.setattr(cpu_call, "_WORK_FOR_A_TEAM", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 32), (16, 256), (512, 512)], ids=str)
def test_dtypes_and_head_dims(rng, many_splits, dtype, head_dims):
    for _ in range(3):
        sizes = rng.integers(1, (3, 3, 4, 9, 900))
        check(*tensors((*map(int, sizes), *head_dims), dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_split_or_not_is_the_same_to_rounding(rng, set_threads, many_splits, threads):
    set_threads(threads)
    q, k, v = tensors((2, 1, 3, 2, 1000, 64, 64))
    first = check(q, k, v)
    for _ in range(5):
        again = attend(q, k, v)
        assert torch.equal(again.out, first.out) and torch.equal(again.lse, first.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mods_and_masks(rng, many_splits, dtype):
    window, last = int(rng.integers(1, 400)), int(rng.integers(400, 700))
    for score_mod in (None, softcap, alibi):
        check(*tensors((2, 2, 2, 3, 700, 64, 64), dtype), score_mod,
              lambda b, h, q, kv: (kv <= last + q) & (kv > last + q - window), slack=8)


def test_heads_with_masks_of_their_own(rng, many_splits):
    keep = torch.rand(2, 6, 5, 300) < 0.3
    keep[1, 2, 3] = False
    keep[0, :, :, 128:256] = False
    result = check(*tensors((2, 2, 3, 5, 300, 64, 64)), None,
                   lambda b, h, q, kv: keep[b, h, q, kv], block=(128, 64))
    assert (result.out[1, 2, 3] == 0).all() and result.lse[1, 2, 3] == -math.inf


def test_strides_and_one_cache_for_the_whole_batch(rng, many_splits):
    q, k, v = tensors((3, 2, 2, 1, 500, 64, 64))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2] for x in (k, v))
    check(q, k, v)
    assert torch.equal(attend(q, k[:1], v[:1]).out[2], attend(q[2:], k[:1], v[:1]).out[0])


def test_nan_and_infinity(rng, many_splits):
    q, k, v = tensors((1, 1, 1, 4, 400, 64, 64))
    special = torch.zeros(4, 400)
    special[0, 390], special[1, 3], special[2, :300] = math.nan, math.inf, -math.inf
    out = attend(q, k, v, lambda s, b, h, q, kv: s + special[q, kv]).out
    score = (q @ k.transpose(-1, -2)) / 8 + special
    torch.testing.assert_close(out, torch.softmax(score, -1) @ v, equal_nan=True, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [128, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_vector_widths(rng, many_splits, monkeypatch, bits, dtype):
    monkeypatch.setattr(compile.Host, "vector_bits", bits)
    monkeypatch.setattr(cpu_call, "_plans", {})
    check(*tensors((1, 2, 2, 3, 300, 64, 48), dtype), alibi, slack=8)
