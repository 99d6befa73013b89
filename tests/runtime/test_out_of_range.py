"""Reads of a captured tensor beyond its ends: an error where attended, nothing elsewhere."""

from __future__ import annotations

import pytest
import torch

from flexattn import create_block_mask, flex_attention
from flexattn.errors import IndexOutOfRangeError
from flexattn.runtime.out_of_range import raise_out_of_range
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod


def inputs(q_len=60, kv_len=100, requires_grad=False):
    return [torch.randn(2, 2, n, 16, requires_grad=requires_grad)
            for n in (q_len, kv_len, kv_len)]


@pytest.mark.parametrize("q_len", [1, 60], ids=["decode", "forward"])
def test_the_error_names_tensor_index_and_range(q_len):
    other, table = torch.randn(3), torch.randn(7, 90)
    with pytest.raises(IndexOutOfRangeError) as caught:
        flex_attention(*inputs(q_len), lambda s, b, h, q, kv: s + other[h] + table[b, kv])
    text = str(caught.value)
    assert "captured tensor 1 (shape (7, 90))" in text
    assert "[-90, 90) in dimension 1" in text
    index = int(text.split("got:")[1].split()[0])
    assert 90 <= index < 100 and f"kv_idx={index}" in text


def test_negative_indices_count_from_the_end():
    q, k, v = inputs()
    table = torch.randn(100)
    wanted = flex_attention(q, k, v, lambda s, b, h, q, kv: s + table[99 - kv])
    got = flex_attention(q, k, v, lambda s, b, h, q, kv: s + table[-1 - kv])
    assert torch.equal(got, wanted)
    with pytest.raises(IndexOutOfRangeError, match=r"-101"):
        flex_attention(q, k, v, lambda s, b, h, q, kv: s + table[-2 - kv])


def test_an_index_that_depends_on_the_score():
    """The report holds the score at the position."""
    table = torch.randn(4)
    with pytest.raises(IndexOutOfRangeError, match=r"\[-4, 4\)"):
        flex_attention(*inputs(), lambda s, b, h, q, kv: s + table[(s * 1000).long()])


def test_a_mask_that_reads_beyond_its_table():
    table = torch.ones(50, dtype=torch.bool)
    keep = torch.ones(100, dtype=torch.bool)
    mask = create_block_mask(lambda b, h, q, kv: keep[kv] & (q >= 0), None, None, 60, 100)
    mask.mask_mod = lambda b, h, q, kv: table[kv]
    q, k, v = inputs()
    if not bool(mask.rows().full.all()):  # blocks that need no mask do not ask it
        with pytest.raises(IndexOutOfRangeError, match=r"\[-50, 50\)"):
            flex_attention(q, k, v, block_mask=mask)


def test_a_windowed_table_is_no_mistake_and_trains():
    q, k, v = inputs(requires_grad=True)
    table = torch.randn(20, requires_grad=True)
    mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & (q - kv < 20), None, None, 60, 100)
    out = flex_attention(q, k, v, lambda s, b, h, q, kv: s + table[q - kv], mask)
    got = torch.autograd.grad(out.sum(), [q, k, v, table])
    same = flex_attention(q, k, v, lambda s, b, h, q, kv: s + table[(q - kv).clamp(0, 19)], mask)
    wanted = torch.autograd.grad(same.sum(), [q, k, v, table])
    assert torch.equal(out, same)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_forward_of_a_training_call_raises_before_any_gradient():
    q, k, v = inputs(requires_grad=True)
    table = torch.randn(90, requires_grad=True)
    with pytest.raises(IndexOutOfRangeError):
        flex_attention(q, k, v, lambda s, b, h, q, kv: s + table[kv])


def test_no_report_no_error():
    table = torch.randn(4)
    mod = specialize(trace_score_mod(lambda s, b, h, q, kv: s + table[kv], torch.float32))
    raise_out_of_range(mod, [0] * 8)


def test_mask_report_is_evaluated_without_a_score():
    table = torch.ones(4, dtype=torch.bool)
    mod = specialize(trace_mask_mod(lambda b, h, q, kv: table[kv]))
    with pytest.raises(IndexOutOfRangeError, match="kv_idx=4"):
        raise_out_of_range(mod, [1, 0, 1, 2, 4, 0, 0, 0])
