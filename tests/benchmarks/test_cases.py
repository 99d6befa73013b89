"""What SDPA is given computes the same attention as the mod and the mask; the work is counted
right. torch's own eager flex_attention is the judge."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from benchmarks.cases import CASES, Shape


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", CASES)
def test_sdpa_is_the_same_attention(name: str, kv_heads: int) -> None:
    shape = Shape(2, 4, kv_heads, 300, 300, 16, torch.float64)
    case = CASES[name](shape)
    q, k, v = shape.inputs()
    block_mask = None
    if case.mask_mod is not None:
        block_mask = torch_flex.create_block_mask(case.mask_mod, None, None, 300, 300, "cpu")
    with torch.no_grad():
        expected = torch_flex.flex_attention(q, k, v, case.score_mod, block_mask, enable_gqa=True)
        torch.testing.assert_close(case.sdpa(q, k, v), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_attended_counts_pairs(name: str) -> None:
    length = 270
    case = CASES[name](Shape(1, 2, 2, length, length, 8))
    attended = length * length
    if case.mask_mod is not None:
        mask = torch_flex.create_mask(case.mask_mod, None, None, length, length, "cpu")
        attended = int(mask.sum())
    assert case.attended == attended
    assert case.flops(backward=False) == 2 * 2 * 8 * attended * 2
    assert case.flops(backward=True) == 5 * 2 * 8 * attended * 2


def test_documents_are_eight_and_uneven() -> None:
    case = CASES["documents"](Shape(1, 1, 1, 2048, 2048, 8))
    assert 2048 ** 2 / 8 < case.attended < 2048 ** 2 / 5


def test_the_bias_is_trained_through_sdpa() -> None:
    shape = Shape(1, 2, 2, 32, 32, 8)
    case = CASES["trained_bias"](shape)
    out = case.sdpa(*shape.inputs(requires_grad=True))
    gradient, = torch.autograd.grad(out.square().sum(), case.trained)
    assert gradient.shape == (2, 64) and gradient[:, 1:].abs().min() > 0
    assert not gradient[:, 0].any()  # no query is 32 positions before a key
