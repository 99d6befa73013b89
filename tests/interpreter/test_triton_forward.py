"""The Triton forward kernel, run by Triton's interpreter, against the dense oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flexattn import create_block_mask
from flexattn.attention import AuxRequest
from flexattn.errors import IndexOutOfRangeError
from flexattn.reference import attention
from flexattn.runtime import launch_gpu
from tests.interpreter.attend import call_of, check, make_call, tensors


def softcap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (96, 32), (8, 80)], ids=str)
def test_odd_lengths_and_dims(rng, dims):
    q_len, kv_len = map(int, rng.integers(1, 50, 2))
    check(*tensors(2, 2, 1, q_len, kv_len, dims))
    check(*tensors(2, 1, 3, q_len, kv_len, dims, kv_batch=1), softcap)


def test_16_bit_numbers(rng):
    """float16 only: the interpreter has no products of bfloat16."""
    kv_len = int(rng.integers(20, 50))
    check(*tensors(1, 2, 2, 20, kv_len, (32, 32), torch.float16), softcap, causal, tolerance=1e-2)


def test_masks_with_empty_full_and_partial_blocks(rng):
    length = int(rng.integers(60, 90))
    document = torch.sort(torch.randint(0, 4, (2, length))).values
    check(*tensors(2, 1, 2, length, length, (16, 16)), None,
          lambda b, h, q_idx, kv_idx: (document[b, q_idx] == document[b, kv_idx])
          & (q_idx - h >= kv_idx))
    check(*tensors(1, 1, 1, length, 40, (16, 16)), softcap,
          lambda b, h, q_idx, kv_idx: (q_idx < 20) | (kv_idx > 3), block=32)


def test_rows_that_attend_to_nothing_give_zero_and_minus_infinity():
    q, k, v = tensors(1, 1, 1, 40, 40, (16, 16))
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: (q_idx % 3 > 0) & (q_idx < 30), None,
                             None, 40, 40, BLOCK_SIZE=16)
    found = launch_gpu.forward(make_call(q, k, v, None, mask, None, AuxRequest(True, True), {}))
    rows = torch.arange(40)
    empty = (rows % 3 == 0) | (rows >= 30)
    assert (found.out[0, 0, empty] == 0).all() and (found.lse[0, 0, empty] == -math.inf).all()
    assert found.out.isfinite().all() and found.lse[0, 0, ~empty].isfinite().all()


def test_captured_tensors_of_every_shape_and_stride():
    bias = torch.randn(3, 80).t()[:, 1:]
    check(*tensors(1, 2, 1, 30, 34, (16, 16)), lambda score, b, h, q_idx, kv_idx:
          score + bias[q_idx - kv_idx + 34, h] * bias[kv_idx, 0] + bias[-1, -2])
    scale = torch.tensor(0.3, dtype=torch.bfloat16)
    check(*tensors(1, 2, 1, 17, 20, (16, 16)),
          lambda score, b, h, q_idx, kv_idx: torch.where(kv_idx % 3 == 0, score * scale, -score))


def test_negative_and_zero_scales_and_strides():
    q, k, v = tensors(1, 2, 1, 33, 20, (16, 16))
    check(q, k, v, scale=-0.7)
    check(q, k, v, scale=0.0)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    check(q, k.mT.contiguous().mT, v, softcap, causal)


def test_a_read_out_of_range_is_reported_at_the_next_call(rng):
    table = torch.randn(20)
    q, k, v = tensors(1, 1, 1, 30, 20, (16, 16))
    call = make_call(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[q_idx], None, None,
                     AuxRequest(), {})
    launch_gpu.forward(call)
    with pytest.raises(IndexOutOfRangeError, match=r"captured tensor 0 \(shape \(20,\)\)"):
        launch_gpu.forward(call)
    fine = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx < 20, None, None, 30, 20,
                             BLOCK_SIZE=16)
    for _ in range(2):  # where nothing is attended, nothing is reported
        launch_gpu.forward(make_call(
            q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[q_idx], fine, None,
            AuxRequest(), {}))


def test_no_keys():
    q, k, v = tensors(1, 2, 1, 5, 0, (16, 8))
    found = launch_gpu.forward(make_call(q, k, v, None, None, None, AuxRequest(True, True), {}))
    assert (found.out == 0).all() and found.out.shape == (1, 2, 5, 8)
    assert (found.lse == -math.inf).all() and (found.max_scores == -math.inf).all()


BYTES = torch.randint(0, 256, (40,), dtype=torch.uint8)
AWKWARD = {
    "a byte that wraps": lambda s, b, h, q, k: s + (q - k).to(torch.uint8).float() / 64,
    "a bounded byte": lambda s, b, h, q, k: s + (BYTES[q].clamp(max=9) - 12) / 64,
    "a large constant": lambda s, b, h, q, k: s + torch.where(q > 3, 3000000000, -5) * 1e-9,
    "not, as a real": lambda s, b, h, q, k: s + (~(q * k)).float() / 64,
    "halves far out": lambda s, b, h, q, k: s + (torch.round(q + 4000000.5) - 4000000) / 8,
    "trunc of the least": lambda s, b, h, q, k: s + torch.fmod(
        torch.where(q > 3, torch.iinfo(torch.int64).min, k), 3),
    "the sign of nothing": lambda s, b, h, q, k: s + torch.sign(
        torch.where(q > 3, float("nan"), s)),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_numbers(name):
    q, k, v = tensors(1, 2, 1, 20, 30, (16, 16))
    call = call_of(q, k, v, AWKWARD[name])
    result = launch_gpu.forward(call)
    out, lse, _ = attention(q, k, v, AWKWARD[name], None, None, torch.float64)
    torch.testing.assert_close(result.out.double(), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-4, atol=1e-4)
