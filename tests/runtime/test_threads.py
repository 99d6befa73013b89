"""The team: every call returns, late threads are not waited for, forks and concurrent callers."""

from __future__ import annotations

import ctypes
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexattn.runtime import threads
from flexattn.runtime.call import Call
from flexattn.runtime.launch_cpu import forward

SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def counting(each):
    """A function for a team whose calls note their thread, and the notes."""
    seen = []

    def work(address):
        assert ctypes.string_at(address, 5) == b"block"
        seen.append(threading.get_ident())
        each()

    return SIGNATURE(work), seen


@pytest.fixture(params=["torch's team", "own pool"])
def either_team(request, monkeypatch):
    if request.param == "own pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("this torch has no OpenMP that can be called")


def test_one_thread_is_the_caller(either_team):
    function, seen = counting(lambda: None)
    threads.run(function, b"block", 1)
    assert seen == [threading.get_ident()]


def test_every_thread_calls_once(either_team):
    barrier = threading.Barrier(3, timeout=60)
    function, seen = counting(barrier.wait)  # returns only when three have started
    threads.run(function, b"block", 3)
    assert len(seen) == len(set(seen)) == 3


def test_late_workers_are_not_waited_for():
    pool = threads.Pool()
    release = threading.Event()
    busy = threading.Thread(target=pool.run, args=(release.wait, 2))
    busy.start()
    began = time.perf_counter()
    ran = []
    pool.run(lambda: ran.append(1), 2)  # the only worker is still at the first job
    assert ran and time.perf_counter() - began < 30
    release.set()
    busy.join(60)
    assert not busy.is_alive()


def test_concurrent_callers(either_team, set_threads, seed):
    set_threads(2)
    lock = threading.Lock()

    def call(i):
        with lock:
            torch.manual_seed(seed + i)
            q, k, v = torch.randn(3, 1, 4, 300, 64)
        out = forward(Call(q, k, v, 0.125)).out
        with lock:
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.125)
        return bool(torch.allclose(out, expected, atol=1e-5))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(12)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child(set_threads, seed):
    """Threads of the parent's team and of its pool do not exist in the child."""
    set_threads(2)
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 4, 300, 64)
    expected = forward(Call(q, k, v, 0.125)).out.numpy().tobytes()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def in_child():  # torch's own operations could hang here
        results.put(forward(Call(q, k, v, 0.125)).out.numpy().tobytes() == expected)

    child = context.Process(target=in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0 and results.get()
