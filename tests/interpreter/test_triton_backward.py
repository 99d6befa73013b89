"""The Triton backward kernels, run by Triton's interpreter, against autograd of the dense oracle in
float64."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter.attend import check_gradients, gradients, tensors


def softcap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (96, 32)], ids=str)
def test_odd_lengths_and_dims(rng, dims):
    q_len, kv_len = map(int, rng.integers(1, 40, 2))
    check_gradients(*tensors(2, 2, 1, q_len, kv_len, dims), with_lse=False)
    check_gradients(*tensors(2, 1, 2, q_len, kv_len, dims, kv_batch=1), softcap)


def test_masks_with_empty_full_and_partial_blocks(rng):
    length = int(rng.integers(40, 60))
    document = torch.sort(torch.randint(0, 4, (2, length))).values
    check_gradients(*tensors(2, 1, 2, length, length, (16, 16)), softcap,
                    lambda b, h, q_idx, kv_idx: (document[b, q_idx] == document[b, kv_idx])
                    & (q_idx - h >= kv_idx))
    check_gradients(*tensors(1, 1, 1, length, 40, (16, 16)), None,
                    lambda b, h, q_idx, kv_idx: ((q_idx < 20) | (kv_idx > 3)) & (q_idx != 7),
                    block=32)


def biases(q_len, kv_len):
    """Reads of every kind, and the tensors they are of."""
    head, column = torch.randn(4, requires_grad=True), torch.randn(kv_len, requires_grad=True)
    relative = torch.randn(4, q_len + kv_len, requires_grad=True)
    pair = torch.randn(q_len, kv_len, requires_grad=True)
    group = torch.arange(kv_len) // 5

    def mod(score, b, h, q_idx, kv_idx):
        return (score * head[h] + column[kv_idx] * relative[h, q_idx - kv_idx + kv_len]
                + pair[q_idx, kv_idx] + pair[q_idx, group[kv_idx]])

    return mod, (head, column, relative, pair)


@pytest.mark.parametrize("deterministic", [False, True])
def test_captured_gradients(rng, deterministic):
    q_len, kv_len = map(int, rng.integers(20, 40, 2))
    mod, captures = biases(q_len, kv_len)
    check_gradients(*tensors(1, 2, 2, q_len, kv_len, (16, 16)), mod, causal, captures,
                    options={"deterministic": deterministic})


def test_deterministic_gradients_do_not_depend_on_the_order_of_batches():
    mod, captures = biases(20, 24)
    q, k, v = tensors(3, 2, 2, 20, 24, (16, 16))
    d_out, d_lse = torch.randn_like(q), torch.randn(q.shape[:3])
    found = [gradients(*(t[order] for t in (q, k, v)), mod, None, captures, d_out[order],
                       d_lse[order], {"deterministic": True})
             for order in ([0, 1, 2], [2, 0, 1])]
    for x, y in zip(*(grads[3:] for grads in found), strict=True):
        assert torch.equal(x, y)


def test_dq_is_rounded_from_lines_with_room(rng):
    from flexattn.kernels.triton_backward import round_query_gradient

    q_len, scale = int(rng.integers(33, 64)), float(rng.random())
    total = torch.randn(6, 128, 64)
    dq = torch.full((2, q_len + 1, 3, 64), 7.0).transpose(1, 2)  # one row more, not to be touched
    round_query_gradient[(4 * 6, 1, 1)](total, (dq, *dq.stride()[:3]), (3, q_len, 128), scale, 64,
                                        32)
    wanted = (total[:, :q_len].double() * scale).view(2, 3, q_len, 64)
    torch.testing.assert_close(dq[:, :, :q_len].double(), wanted, rtol=1e-6, atol=0)
    assert (dq[:, :, q_len:] == 7).all()
