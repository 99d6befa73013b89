"""How kernels are launched: graphs, streams, no waiting, no new compiles, nothing written or read
beside the tensors, the same bits in every run, offsets beyond 32 bits."""

from __future__ import annotations

import math

import pytest
import torch

from flexattn import compile_triton, create_block_mask, flex_attention
from flexattn.reference import attention
from flexattn.runtime import launch_gpu, launch_triton, launch_triton_decode


def softcap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def tensors(q_len=300, kv_len=300, batch=2, heads=4, head_dim=64, grad=False):
    return [torch.randn(batch, heads, n, head_dim, device="cuda", dtype=torch.bfloat16,
                        requires_grad=grad) for n in (q_len, kv_len, kv_len)]


def close(found, wanted, tolerance=2e-2):
    assert (found.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


@pytest.mark.parametrize("q_len", [1, 300])
def test_graph_capture_replays_on_new_inputs(q_len):
    q, k, v = tensors(q_len)
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx + 299 >= kv_idx, None, None, q_len,
                             300, device="cuda")
    flex_attention(q, k, v, softcap, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flex_attention(q, k, v, softcap, mask)
    for t in (q, k, v):
        t.copy_(torch.randn_like(t))
    out.fill_(math.nan)
    graph.replay()
    close(out, attention(q, k, v, softcap, lambda b, h, q_idx, kv_idx: q_idx + 299 >= kv_idx,
                         None, torch.float64)[0])


def test_graph_capture_of_training():
    q, k, v = tensors(grad=True)
    d_out = torch.randn_like(q)
    for _ in range(2):
        torch.autograd.grad(flex_attention(q, k, v, softcap), (q, k, v), d_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(flex_attention(q, k, v, softcap), (q, k, v), d_out)
    with torch.no_grad():
        for t in (q, k, v):
            t.copy_(torch.randn_like(t))
    graph.replay()
    out = attention(q, k, v, softcap, None, None, torch.float64)[0]
    for x, y in zip(grads, torch.autograd.grad(out, (q, k, v), d_out.double()), strict=True):
        close(x, y)


def test_streams():
    """Calls on other streams wait for their inputs only, and get their own."""
    calls = [tensors(q_len) for q_len in (300, 1, 200, 7)]
    flex_attention(*calls[0])
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = []
    for inputs, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            found += [[flex_attention(*inputs, softcap) for _ in range(5)]]
    torch.cuda.synchronize()
    for inputs, outs in zip(calls, found, strict=True):
        wanted = attention(*inputs, softcap, None, None, torch.float64)[0]
        for out in outs:
            close(out, wanted)


@pytest.mark.parametrize("q_len", [1, 300])
def test_the_host_does_not_wait(q_len):
    q, k, v = tensors(q_len, grad=True)
    bias = torch.randn(300, device="cuda", requires_grad=True)
    d_out = torch.randn_like(q)
    mask = create_block_mask(causal, None, None, q_len, 300, device="cuda")

    def step():
        out = flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + bias[kv_idx], mask)
        return torch.autograd.grad(out, (q, k, v, bias), d_out)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lengths_batches_and_values_never_compile_again(monkeypatch):
    def call(length, batch, slope, grad=True):
        q, k, v = tensors(length, length, batch, grad=grad)
        bias = torch.randn(length, device="cuda")
        out = flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx:
                             score + slope * (kv_idx - q_idx) + bias[kv_idx])
        if grad:
            out.sum().backward()

    for slope in (0.1, 0.2):
        for length, batch in ((100, 2), (104, 3), (1, 2), (16, 2)):
            call(length, batch, slope)

    def forbidden(*_):
        raise AssertionError("a new compile")

    monkeypatch.setattr(compile_triton, "compiled", forbidden)
    for n in range(100):
        call(65 + 3 * n, 2, 0.1)
        call(100, 1 + n % 40, 0.1)
        call(100, 2, 0.3 + 0.01 * n)
        call(1 + n % 16, 2, 0.1)


def test_a_growing_cache_is_prepared_once(monkeypatch):
    """Copied for each token, or with room for all; with a mask that grows as well."""
    prepared, first = [], launch_triton_decode.prepare

    def counted(call):
        prepared.append(call)
        return first(call)

    monkeypatch.setitem(launch_gpu.FORWARD, "triton decode", counted)
    launch_gpu._choices.clear()
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(2, 2, 2, 5000, 128, device="cuda", dtype=torch.bfloat16)
    real = torch.rand(2, 5000, device="cuda") < 0.9
    for kv_len in (5, 100, 127, 128, 129, 1000, 1001, 4000, 5000):
        k, v = cache[0, :, :, :kv_len], cache[1, :, :, :kv_len]
        kept = real[:, :kv_len].clone()
        mask = create_block_mask(lambda b, h, q_idx, kv_idx, kept=kept: kept[b, kv_idx], 2, None,
                                 1, kv_len, device="cuda")
        for keys, values in ((k, v), (k.contiguous(), v.contiguous())):
            for mod in (None, mask.mask_mod):
                out = flex_attention(q, keys, values, softcap, mod and mask, enable_gqa=True)
                close(out, attention(q, keys, values, softcap, mod, None, torch.float64)[0])
    assert len(prepared) == 2


@pytest.mark.parametrize("q_len", [1, 9, 300])
def test_nothing_is_touched_beside_the_output(monkeypatch, q_len):
    guards = []

    def guarded(q, value_dim):
        batch, heads, length, _ = q.shape
        whole = torch.full((batch * heads * length * value_dim + 2048,), 7.0, device="cuda",
                           dtype=q.dtype)
        inside = whole[1024:-1024].view(batch, heads, length, value_dim)
        inside.fill_(math.nan)
        guards.append(whole)
        return inside

    for module in (launch_triton, launch_triton_decode):
        monkeypatch.setattr(module, "like_query", guarded)
    monkeypatch.setattr(launch_gpu, "FORWARD", {
        name: kernel for name, kernel in launch_gpu.FORWARD.items() if "triton" in name})
    launch_gpu._choices.clear()
    q, k, v = tensors(q_len, 301, head_dim=80)
    out = flex_attention(q, k, v, softcap)
    close(out, attention(q, k, v, softcap, None, None, torch.float64)[0])
    assert guards
    for whole in guards:
        assert (whole[:1024] == 7).all() and (whole[-1024:] == 7).all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lengths", [(1, 5000), (12, 3000), (700, 700)], ids=str)
def test_every_run_gives_the_same_bits(lengths, deterministic):
    """Races would show; other work keeps the GPU busy in between. Hopper's backward adds up dq in
    any order."""
    q, k, v = tensors(*lengths, heads=8, head_dim=128, grad=True)
    d_out, noise = torch.randn_like(q), torch.randn(2048, 2048, device="cuda")
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: (kv_idx - q_idx) % 700 < 500, None, None,
                             *lengths, device="cuda")
    launch_gpu._backwards.clear()
    first = None
    for _ in range(20):
        out = flex_attention(q, k, v, softcap, mask,
                             kernel_options={"deterministic": deterministic})
        found = [out, *torch.autograd.grad(out, (q, k, v), d_out)]
        noise @= noise / noise.norm()
        first = first or found
        served = {choice.kernel for choice in launch_gpu._backwards.values()}
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, first, strict=True):
            if name == "dq" and served == {"hopper"}:
                assert not deterministic
                close(x, y, 3e-3)
            else:
                assert torch.equal(x, y), name


def test_more_elements_than_32_bits_count():
    shape = (1040, 16, 1024, 128)
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * 2 * math.prod(shape):
        pytest.skip("needs 44 GB of GPU memory")
    q, k, v = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
               .requires_grad_() for _ in range(3))
    out = flex_attention(q, k, v, softcap)
    grads = torch.autograd.grad(out, (q, k, v), out.detach())
    for b in (0, 1023, 1039):
        inputs = [t[b:b + 1].detach().requires_grad_() for t in (q, k, v)]
        wanted = attention(*inputs, softcap, None, None, torch.float64)[0]
        close(out[b:b + 1], wanted)
        exact = torch.autograd.grad(wanted, inputs, out[b:b + 1].detach().double())
        for x, y in zip(grads, exact, strict=True):
            close(x[b:b + 1], y)


@pytest.mark.parametrize("q_len", [1, 200])
def test_rows_farther_apart_than_32_bits_count(q_len):
    """The last keys lie more than 2^31 elements behind the first."""
    kv_len, stride = 4200, (1 << 19) + 8
    store = torch.empty(kv_len * stride, device="cuda", dtype=torch.bfloat16)
    k = store.as_strided((1, 1, kv_len, 64), (kv_len * stride, kv_len * stride, stride, 1))
    v = store.as_strided((1, 1, kv_len, 64), (kv_len * stride, kv_len * stride, stride, 1), 64)
    k.normal_()
    v.normal_()
    q = torch.randn(1, 1, q_len, 64, device="cuda", dtype=torch.bfloat16)
    out = flex_attention(q, k, v)
    close(out, attention(q, k.contiguous(), v.contiguous(), None, None, None, torch.float64)[0])
