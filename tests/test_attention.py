"""flex_attention against the dense oracle in float64, forward and gradients; and its errors."""

import random

import pytest
import torch
from torch.autograd import forward_ad

import flexattn
from flexattn import (
    AuxRequest,
    and_masks,
    create_block_mask,
    flex_attention,
    masks,
    reference,
)
from flexattn.errors import (
    ArgumentError,
    ControlFlowError,
    DerivativeError,
    DtypeError,
    IndexOutOfRangeError,
    ShapeError,
    UnsupportedOpError,
)
from tests.lifetimes import left_alive

slopes = torch.rand(4)
documents = torch.randint(0, 3, (200,)).sort().values
SCORES = {
    "none": None,
    "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "relative": lambda s, b, h, q, k: s + (q - k),
}
MASKS = {
    "none": None,
    "causal": masks.causal,
    "window": and_masks(masks.causal, masks.sliding_window(20)),
    "documents": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
    "some rows empty": lambda b, h, q, k: (q % 3 != 0) & (k <= q),
}


def inputs(dtype=torch.float32, heads=4, kv_heads=2, dim=16, value_dim=24):
    q_len, kv_len = random.randint(1, 200), random.randint(1, 200)
    q = torch.randn(2, q_len, heads, dim, dtype=dtype).transpose(1, 2)
    k = torch.randn(2, kv_heads, kv_len, dim, dtype=dtype)
    v = torch.randn(2, kv_heads, kv_len, 2 * value_dim, dtype=dtype)[..., ::2]
    return [t.detach().requires_grad_() for t in (q, k, v)]


def block_mask(mask, q, k):
    return mask and create_block_mask(mask, None, None, q.shape[2], k.shape[2])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_forward_and_gradients(score, mask):
    q, k, v = inputs()
    out, aux = flex_attention(q, k, v, SCORES[score], block_mask(MASKS[mask], q, k),
                              enable_gqa=True, return_aux=AuxRequest(lse=True, max_scores=True))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected, lse, top = reference.attention(*wide, SCORES[score], MASKS[mask])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(aux.lse.double(), lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(aux.max_scores.double(), top, rtol=1e-4, atol=1e-4)

    d_out = torch.randn_like(out)
    finite = torch.isfinite(lse)
    got = torch.autograd.grad((out * d_out).sum() + aux.lse[finite].sum(), [q, k, v])
    wanted = torch.autograd.grad((expected * d_out).sum() + lse[finite].sum(), wide)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3)


def test_gradient_of_a_learned_bias():
    q, k, v = inputs()
    bias = torch.randn(4, 400, requires_grad=True)

    def mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx - kv_idx + 200]

    d_out = torch.randn(*q.shape[:3], v.shape[-1])
    mask = block_mask(masks.causal, q, k)
    (flex_attention(q, k, v, mod, mask, enable_gqa=True) * d_out).sum().backward()
    got, bias.grad = bias.grad, None
    (reference.attention(q, k, v, mod, masks.causal)[0] * d_out).sum().backward()
    torch.testing.assert_close(got, bias.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    q, k, v = inputs(dtype)
    out = flex_attention(q, k, v, SCORES["alibi"], enable_gqa=True)
    expected = reference.attention(*(t.double() for t in (q, k, v)), SCORES["alibi"])[0]
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-10}[dtype]
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = create_block_mask(masks.causal, None, None, 5, 5)
    assert torch.autograd.gradcheck(
        lambda *t: flex_attention(*t, SCORES["softcap"], mask,
                                  return_aux=AuxRequest(lse=True))[0], (q, k, v))


def test_a_changed_closure_is_never_stale():
    q, k, v = (t.detach() for t in inputs())
    for factor in (0.5, 2.0, -1.0):
        def mod(score, b, h, q_idx, kv_idx, factor=factor):
            return score * factor
        expected = reference.attention(q, k, v, mod)[0]
        torch.testing.assert_close(flex_attention(q, k, v, mod, enable_gqa=True), expected,
                                   rtol=1e-4, atol=1e-4)


def test_out_of_range_counts_only_where_attended():
    q = k = v = torch.randn(1, 1, 40, 16)
    table = torch.randn(30)

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[kv_idx]

    inside = create_block_mask(lambda b, h, q, k: k < 30, None, None, 40, 40)
    expected = reference.attention(q, k[:, :, :30], v[:, :, :30], mod)[0]
    torch.testing.assert_close(flex_attention(q, k, v, mod, inside), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexOutOfRangeError):
        flex_attention(q, k, v, mod)


def test_errors_say_what_to_do():
    q = torch.randn(1, 4, 8, 16)
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        flex_attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ShapeError, match="4-D"):
        flex_attention(q[0], q[0], q[0])
    with pytest.raises(ShapeError, match="other lengths"):
        flex_attention(q, q, q, block_mask=create_block_mask(masks.causal, None, None, 9, 9))
    with pytest.raises(ArgumentError, match="return_aux"):
        flex_attention(q, q, q, return_lse=True, return_aux=AuxRequest())
    with pytest.raises(ControlFlowError, match="torch.where"):
        flex_attention(q, q, q, lambda s, b, h, q, k: s if q >= k else -1e9)
    assert set(flexattn.__all__) <= set(dir(flexattn))


def test_no_tensor_outlives_its_calls():
    assert left_alive(30, 16) == []


def test_negated_views():
    """Their memory holds the opposite."""
    parts = torch.randn(1, 2, 20, 16, dtype=torch.complex64)
    q, k, v = parts.conj().imag, parts.real, parts.conj().imag
    torch.testing.assert_close(flex_attention(q, k, v),
                               flex_attention(-parts.imag, k, -parts.imag))
    table = torch.randn(20, dtype=torch.complex64).conj().imag
    with pytest.raises(DtypeError, match="resolve_neg"):
        flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[kv_idx])


def test_a_mod_that_switches_gradients_off():
    """Its gradients would be wrong; a mask has none, and without gradients all is well."""
    weights, q = torch.rand(20, requires_grad=True), torch.randn(1, 1, 20, 16)

    def mod(s, b, h, q_idx, kv_idx):
        with torch.no_grad():
            return s * weights[kv_idx]

    with pytest.raises(UnsupportedOpError, match="gradients off"):
        flex_attention(q, q, q, mod)
    with torch.no_grad():
        flex_attention(q, q, q, lambda s, b, h, q_idx, kv_idx: s * weights[kv_idx])


def test_forward_mode_is_refused():
    q = torch.randn(1, 1, 20, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(DerivativeError, match="forward-mode"):
            flex_attention(q, dual, q)
        flex_attention(q, q, q)


def test_an_empty_captured_tensor():
    nothing, q = torch.zeros(0), torch.randn(1, 1, 20, 16)
    with pytest.raises(IndexOutOfRangeError, match="shape .0,."):
        flex_attention(q, q, q, lambda s, b, h, q_idx, kv_idx: s + nothing[kv_idx])


def test_many_trained_captures():
    """LLVM once aborted the process."""
    weights = [torch.randn(20, requires_grad=True) for _ in range(40)]
    q = torch.randn(1, 1, 20, 16)

    def mod(s, b, h, q_idx, kv_idx):
        for w in weights:
            s = s + w[q_idx] * w[kv_idx]
        return s

    d_out = torch.randn_like(q)
    found = torch.autograd.grad(flex_attention(q, q, q, mod), weights, d_out)
    wanted = torch.autograd.grad(reference.attention(q, q, q, mod)[0], weights, d_out)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
