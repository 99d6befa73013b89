"""How the backward pass divides its work, forks, and concurrent callers."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexattn.runtime import launch_cpu_backward
from flexattn.runtime.launch_cpu import forward
from flexattn.runtime.launch_cpu_backward import _Backward, _even_tiles, backward
from tests.kernels.cpu_attend import call_of, causal, tensors
from tests.kernels.cpu_gradients import check_gradients


def chosen(sizes, threads, make=None, dtype=torch.float32):
    """How a call's work would be divided."""
    call = call_of(*tensors(sizes, dtype), make and make())
    result = forward(call)
    return _Backward(call, result, torch.ones_like(result.out), None)


@pytest.mark.parametrize("heads, threads, one_pass", [
    (8, 2, True), (8, 1, True), (1, 1, True),
    (1, 2, False),  # half of the threads would have nothing to do
    (3, 2, True),  # 3 of 4
    (5, 4, False),  # 5 of 8
])
def test_one_pass_where_it_keeps_threads_busy(set_threads, heads, threads, one_pass):
    set_threads(threads)
    assert chosen((1, heads, 1, 300, 300, 64, 64), threads).one_pass is one_pass


def test_two_passes_where_d_query_in_float32_would_not_fit(set_threads, monkeypatch):
    set_threads(2)
    monkeypatch.setattr(launch_cpu_backward, "_THREAD_BUDGET", 0)
    many = (1, 2, 40, 300, 300, 64, 64)  # 40 query heads to a key head
    assert not chosen(many, 2, dtype=torch.bfloat16).one_pass
    assert chosen(many, 2, dtype=torch.float32).one_pass  # added up where it ends
    check_gradients(*tensors(many, torch.bfloat16), None, causal)


@pytest.mark.parametrize("block", [1, 16, 100, 128, 300, 2048])
def test_tiles_cover_a_block(block):
    for largest, multiple in ((64, 1), (128, 32)):
        tiles, size = _even_tiles(block, largest, multiple)
        assert (tiles - 1) * size < block <= tiles * size
        assert size % multiple == 0 and size <= largest


def run(call, d_out):
    grads = backward(call, forward(call), d_out, None)
    return b"".join(t.numpy().tobytes() for t in (grads.query, grads.key, grads.value,
                                                  *grads.captures))


def learned(seed):
    """A call with a trained bias, and the gradient of its output."""
    torch.manual_seed(seed)
    q, k, v = tensors((1, 4, 1, 200, 200, 32, 32))
    bias = torch.randn(400, requires_grad=True)
    call = call_of(q, k, v, lambda s, b, h, q, kv: s + bias[q - kv + 200], causal)
    return call, torch.randn_like(v)


def test_concurrent_callers(set_threads, seed):
    set_threads(2)
    calls = [learned(seed + i) for i in range(6)]
    alone = [run(*each) for each in calls]
    start = threading.Barrier(3)

    def caller(_):
        start.wait(60)
        torch.set_num_threads(2)
        return [run(*each) for each in calls]

    with ThreadPoolExecutor(3) as callers:
        assert all(got == alone for got in callers.map(caller, range(3)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child(set_threads, seed):
    set_threads(2)
    call, d_out = learned(seed)
    expected = run(call, d_out)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(run(call, d_out) == expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and results.get()
