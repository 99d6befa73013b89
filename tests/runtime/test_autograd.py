"""What a call keeps for its backward, and which gradients flow where."""

from __future__ import annotations

import pytest
import torch

from flexattn import AuxRequest, create_block_mask, flex_attention, masks
from flexattn.errors import DerivativeError, DeviceError


def inputs(**options):
    return [torch.randn(1, 2, 30, 16, requires_grad=True, **options) for _ in range(3)]


@pytest.mark.parametrize("which", range(4))
def test_a_tensor_changed_after_the_forward_is_noticed(which):
    q, k, v = inputs()
    slopes = torch.rand(2, requires_grad=True)
    out = flex_attention(q, k, v, lambda s, b, h, q, kv: s * slopes[h])
    with torch.no_grad():
        (q, k, v, slopes)[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_captured_index_changed_after_the_forward_is_noticed():
    q, k, v = inputs()
    document = torch.zeros(30, dtype=torch.long)
    mask = create_block_mask(lambda b, h, q, kv: document[q] == document[kv], None, None, 30, 30)
    out = flex_attention(q, k, v, block_mask=mask)
    document[15:] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_hooks_for_saved_tensors_see_the_inputs():
    """What activation checkpointing and offloading rest on."""
    q, k, v = inputs()
    seen = set()
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.add(t.data_ptr()), t.clone())[1], lambda t: t):
        out = flex_attention(q, k, v)
    assert {t.data_ptr() for t in (q, k, v)} <= seen
    wanted = torch.autograd.grad(flex_attention(q, k, v).sum(), [q, k, v])
    for g, w in zip(torch.autograd.grad(out.sum(), [q, k, v]), wanted, strict=True):
        assert torch.equal(g, w)


def test_checkpointing():
    q, k, v = inputs()
    slopes = torch.rand(2, requires_grad=True)

    def layer(q, k, v):
        return flex_attention(q, k, v, lambda s, b, h, q, kv: s * slopes[h])

    wanted = torch.autograd.grad(layer(q, k, v).sum(), [q, k, v, slopes])
    again = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)
    for g, w in zip(torch.autograd.grad(again.sum(), [q, k, v, slopes]), wanted, strict=True):
        assert torch.equal(g, w)


def test_only_captured_tensors_need_gradients():
    q, k, v = (t.detach() for t in inputs())
    slopes = torch.rand(2, requires_grad=True)
    out = flex_attention(q, k, v, lambda s, b, h, q, kv: s * slopes[h])
    out.square().sum().backward()
    assert slopes.grad is not None and bool((slopes.grad != 0).all())


def test_without_gradients_nothing_is_kept():
    q, k, v = inputs()
    with torch.no_grad():
        assert flex_attention(q, k, v).grad_fn is None
    assert flex_attention(q.detach(), k.detach(), v.detach()).grad_fn is None


def test_lse_alone_and_max_scores_never():
    q, k, v = inputs()
    _, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True, max_scores=True))
    assert not aux.max_scores.requires_grad
    got = torch.autograd.grad(aux.lse.sum(), [q, k, v], retain_graph=True)
    score = (q @ k.transpose(-1, -2)) / 4
    wanted = torch.autograd.grad(torch.logsumexp(score, -1).sum(), [q, k])
    for g, w in zip(got, (*wanted, torch.zeros_like(v)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_the_same_tensor_as_query_key_and_value():
    x = torch.randn(1, 2, 30, 16, requires_grad=True)
    mask = create_block_mask(masks.causal, None, None, 30, 30)
    got, = torch.autograd.grad(flex_attention(x, x, x, block_mask=mask).square().sum(), x)
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    wanted = torch.autograd.grad(flex_attention(*parts, block_mask=mask).square().sum(), parts)
    torch.testing.assert_close(got, sum(wanted), rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused_not_left_out():
    q, k, v = inputs()
    out = flex_attention(q, k, v)
    penalty, = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(DerivativeError, match="reference.attention"):
        (out.sum() + penalty.square().sum()).backward()


def test_a_device_without_a_kernel():
    q = torch.randn(1, 1, 4, 16, device="meta")
    with pytest.raises(DeviceError, match="No kernel"):
        flex_attention(q, q, q)
