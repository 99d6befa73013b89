"""flex_attention on a GPU: what the pairs of test_pairs do not show."""

from __future__ import annotations

import math

import pytest
import torch

import flexattn
from flexattn.errors import IndexOutOfRangeError
from flexattn.reference import attention
from flexattn.runtime import gpu_mods, launch_gpu
from tests.gpu.pairs import error
from tests.lifetimes import left_alive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_same_call_gives_the_same_bits(seed):
    """A race would show as results that differ between runs. Hopper's backward adds up dq in any
    order."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, 8, 2000, 128, device="cuda", dtype=torch.bfloat16,
                           requires_grad=True) for _ in range(3))
    block = flexattn.create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None,
                                       2000, 2000, device="cuda")
    d_out = torch.randn_like(q)
    runs = []
    for _ in range(20):
        out = flexattn.flex_attention(q, k, v, block_mask=block)
        runs.append([out, *torch.autograd.grad(out, (q, k, v), d_out)])
    served = {found.kernel for found in launch_gpu._backwards.values()}
    for again in runs[1:]:
        for name, x, y in zip(("out", "dq", "dk", "dv"), runs[0], again, strict=True):
            if name == "dq" and "hopper" in served:
                assert error(x, y.double()) < 3e-3
            else:
                assert torch.equal(x, y), name


def test_nothing_is_written_outside_of_the_output(monkeypatch):
    """Canaries around the output of odd shapes."""
    rooms = []

    def empty(q, value_dim):
        room = torch.full((q.shape[0] * q.shape[1] * q.shape[2] * value_dim + 2048,), 7.0,
                          device="cuda", dtype=q.dtype)
        rooms.append(room)
        return room[1024:-1024].view(*q.shape[:3], value_dim)

    monkeypatch.setattr("flexattn.runtime.launch_triton.like_query", empty)
    monkeypatch.setattr("flexattn.runtime.launch_hopper._Forward._new_output",
                        lambda prepared, q: empty(q, prepared._out[0][3]))
    q, k, v = (torch.randn(1, 3, 77, 40, device="cuda", dtype=torch.float16) for _ in range(3))
    out = flexattn.flex_attention(q, k, v)
    assert rooms
    for room in rooms:
        assert (room[:1024] == 7).all() and (room[-1024:] == 7).all()
    assert error(out, attention(q, k, v, dtype=torch.float64)[0]) < 2e-3


def test_tiles_of_queries_that_attend_to_nothing():
    q, k, v = torch.randn(3, 1, 2, 1000, 64, device="cuda", dtype=torch.bfloat16)
    block = flexattn.create_block_mask(lambda b, h, q_idx, kv_idx: q_idx < 200, None, None,
                                       1000, 1000, device="cuda")
    out, aux = flexattn.flex_attention(q, k, v, block_mask=block,
                                       return_aux=flexattn.AuxRequest(lse=True))
    assert (out[:, :, 200:] == 0).all() and (aux.lse[:, :, 200:] == -math.inf).all()
    assert error(out[:, :, :200], attention(q[:, :, :200], k, v, dtype=torch.float64)[0]) < 1e-2


def test_views_whose_rows_are_not_aligned():
    wide = torch.randn(3, 2, 2, 100, 71, device="cuda", dtype=torch.bfloat16)
    q, k, v = wide[..., 3:67]
    assert error(flexattn.flex_attention(q, k, v),
                 attention(q, k, v, dtype=torch.float64)[0]) < 1e-2


def test_a_read_out_of_range_is_reported():
    table = torch.randn(50, device="cuda")
    q, k, v = torch.randn(3, 1, 2, 100, 64, device="cuda", dtype=torch.bfloat16)
    flexattn.flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[q_idx])
    torch.cuda.synchronize()
    with pytest.raises(IndexOutOfRangeError, match="captured tensor 0"):
        flexattn.flex_attention(q, k, v)
    flexattn.flex_attention(q, k, v)
    gpu_mods.check()


def test_cuda_graphs_and_streams():
    q, k, v = torch.randn(3, 1, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    slopes = torch.randn(4, device="cuda")

    def mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (q_idx - kv_idx)

    wanted = flexattn.flex_attention(q, k, v, mod)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flexattn.flex_attention(q, k, v, mod)
    captured.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted)
    q.mul_(2)
    graph.replay()
    assert torch.equal(captured, flexattn.flex_attention(q, k, v, mod))
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        again = flexattn.flex_attention(q, k, v, mod)
    torch.cuda.synchronize()
    assert torch.equal(again, captured)


def test_lengths_batches_and_values_compile_nothing():
    from flexattn import compile_triton

    counts = []
    for i in range(12):
        q, k, v = torch.randn(3, 1 + i % 3, 2, 100 + 37 * i, 64, device="cuda",
                              dtype=torch.bfloat16)
        table = torch.randn(5000 + i, device="cuda")
        flexattn.flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx, c=1.5 + i, t=table:
                                c * torch.tanh(score / c) + t[q_idx])
        counts.append(len(compile_triton._binaries))
    assert counts[2] == counts[-1], "the number became a run-time value at its second one"


def test_masks_of_reals_round_as_on_a_cpu():
    """41 times the nearest number to 1 / 41 is below 1: what torch itself makes of a quotient by
    a Python number on a GPU."""
    q, k, v = torch.randn(3, 1, 2, 400, 64, device="cuda", dtype=torch.float16)

    def mask(b, h, q_idx, kv_idx):
        return torch.floor(q_idx / 41) == torch.floor(kv_idx / 41)

    block = flexattn.create_block_mask(mask, None, None, 400, 400, device="cuda")
    out = flexattn.flex_attention(q, k, v, block_mask=block).cpu()
    wanted = attention(q.cpu(), k.cpu(), v.cpu(), mask_mod=mask, dtype=torch.float64)[0]
    assert error(out, wanted) < 3e-3


def test_more_than_2_to_the_31_elements():
    q = torch.randn(1, 1, 64, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 1, 17_000_000, 128, device="cuda", dtype=torch.bfloat16)
    keep = 16_999_000
    block = flexattn.create_block_mask(lambda b, h, q_idx, kv_idx: kv_idx >= keep, None, None, 64,
                                       17_000_000, device="cuda")
    out = flexattn.flex_attention(q, k, v, block_mask=block)
    wanted = attention(q, k[:, :, keep:], v[:, :, keep:], dtype=torch.float64)[0]
    assert error(out, wanted) < 1e-2


def test_memory_is_of_the_order_of_rows():
    q, k, v = torch.randn(3, 1, 1, 131072, 64, device="cuda", dtype=torch.bfloat16)
    flexattn.flex_attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flexattn.flex_attention(q, k, v)
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 16 * q.shape[2]


@pytest.mark.parametrize("length", [1, 300])
def test_no_tensor_outlives_its_calls(length):
    """Launches are kept for later calls; the tensors of this one are not."""
    assert left_alive(length, 64, device="cuda", dtype=torch.bfloat16) == []


def test_which_kernel_serves_a_call_is_said():
    from flexattn.attention import AuxRequest, _call

    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float32)
    call = _call(q, q, q, None, None, 0.125, AuxRequest(), {})
    assert launch_gpu.choice(call).kernel == "triton"


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float32, 2e-3)])
def test_more_lines_than_a_grid_is_high(dtype, bound, rng):
    """70,000 sequences, forward and backward, by Hopper's kernels and by Triton's."""
    inputs = [torch.randn(70_000, 1, 20, 64, device="cuda", dtype=dtype, requires_grad=True)
              for _ in range(3)]
    out = flexattn.flex_attention(*inputs)
    d_out = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, d_out)
    some = torch.tensor([0, 1, 65_534, 65_535, 65_536, 69_999], device="cuda")
    q, k, v = (t[some].detach().requires_grad_() for t in inputs)
    exact = attention(q, k, v, dtype=torch.float64)[0]
    wanted = torch.autograd.grad((exact * d_out[some]).sum(), (q, k, v))
    for ours, theirs in zip((out, *found), (exact, *wanted), strict=True):
        assert error(ours[some], theirs.double()) < bound
