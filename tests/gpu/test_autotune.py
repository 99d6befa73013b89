"""Calls that ask for the fastest kernel and tile: the same results, chosen once."""

from __future__ import annotations

import pytest
import torch

import flexattn
from flexattn.runtime import autotune, launch_gpu
from tests.gpu.pairs import error

TUNED = {"autotune": True}


def capped(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


@pytest.fixture
def timed(monkeypatch):
    """The runs that are timed; nothing is known before."""
    launch_gpu._choices.clear()
    launch_gpu._backwards.clear()
    seconds, found = autotune.gpu_seconds, []

    def counted(run):
        found.append(seconds(run))
        return found[-1]

    monkeypatch.setattr(autotune, "gpu_seconds", counted)
    monkeypatch.setattr(autotune, "_labels", {})
    yield found
    launch_gpu._choices.clear()
    launch_gpu._backwards.clear()


@pytest.mark.parametrize("q_len", [1000, 1])
def test_same_results_and_timed_once(q_len, rng, timed, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune.compile, "cache_directory", lambda: None)
    q, k, v = (torch.randn(2, 8, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for n in (q_len, 1000, 1000))
    mask = flexattn.create_block_mask(lambda b, h, q_idx, kv_idx: q_idx + 1000 - q_len >= kv_idx,
                                      None, None, q_len, 1000, device="cuda")

    def results(**options):
        out = flexattn.flex_attention(q, k, v, capped, mask, kernel_options=options)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    plain = results()
    assert not timed
    tuned = results(**TUNED)
    first = len(timed)
    assert first > 2 and all(seconds > 0 for seconds in timed)
    for found, wanted in zip(tuned, plain, strict=True):
        assert error(found, wanted.double()) < 1e-2
    results(**TUNED)
    assert len(timed) == first


def test_not_while_a_graph_is_captured(timed):
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float16)
    wanted = flexattn.flex_attention(q, q, q, capped)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flexattn.flex_attention(q, q, q, capped, kernel_options=TUNED)
    graph.replay()
    assert not timed and torch.equal(out, wanted)


def test_a_graph_captures_what_was_found_before(timed):
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float16)
    flexattn.flex_attention(q, q, q, capped, kernel_options=TUNED)
    known = dict(launch_gpu._choices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flexattn.flex_attention(q, q, q, capped, kernel_options=TUNED)
    assert launch_gpu._choices == known and len(known) == 1


def test_explain_names_tile_and_resources():
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float16)
    for kernel in flexattn.explain(q, q, q, capped).kernels:
        assert any(name.endswith("tile_kv") for name in kernel.tile)
        assert int(kernel.facts["registers of a thread"].split(",")[0]) > 0
        assert int(kernel.facts["bytes of shared memory"].split(",")[0]) > 0
