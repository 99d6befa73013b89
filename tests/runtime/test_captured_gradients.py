"""Gradients of tensors captured by a score mod, against the dense oracle's autograd in float64."""

from __future__ import annotations

import pytest
import torch

from flexattn.ir.graph import Node, const, index_input, node
from flexattn.ir.ops import Op
from flexattn.runtime import launch_cpu_backward
from flexattn.runtime.captured_gradients import CapturedGradients, own_dimensions
from tests.kernels.cpu_attend import causal, close, tensors
from tests.kernels.cpu_gradients import check_gradients, differentiate, expected_gradients

S, H, B = 150, 4, 2
MODS = {
    "[H]": ((H,), lambda t: lambda s, b, h, q, kv: s * t[h]),
    "[B]": ((B,), lambda t: lambda s, b, h, q, kv: s + t[b] * torch.tanh(s)),
    "0-d": ((), lambda t: lambda s, b, h, q, kv: s * t),
    "[S] by query": ((S,), lambda t: lambda s, b, h, q, kv: s + t[q] * s),
    "[S] by key": ((S,), lambda t: lambda s, b, h, q, kv: s + t[kv]),
    "[2S-1]": ((2 * S - 1,), lambda t: lambda s, b, h, q, kv: s + t[q - kv + S - 1]),
    "[2S-1] forward": ((2 * S - 1,), lambda t: lambda s, b, h, q, kv: s + t[kv - q + S - 1]),
    "[H, 2S-1]": ((H, 2 * S - 1), lambda t: lambda s, b, h, q, kv: s + t[h, q - kv + S - 1]),
    "[B, H, Q, KV]": ((B, H, S, S), lambda t: lambda s, b, h, q, kv: s + t[b, h, q, kv]),
    "[Q, KV]": ((S, S), lambda t: lambda s, b, h, q, kv: s + t[q, kv]),
    "[KV, Q]": ((S, S), lambda t: lambda s, b, h, q, kv: s + t[kv, q]),
    "distance": ((S,), lambda t: lambda s, b, h, q, kv: s + t[(q - kv).abs()]),
    "bucket": ((16,), lambda t: lambda s, b, h, q, kv: s + t[kv // 10]),
    "few buckets": ((3,), lambda t: lambda s, b, h, q, kv: s + t[(q - kv) % 3]),
    "negative": ((S,), lambda t: lambda s, b, h, q, kv: s + t[-1 - kv]),
    "every second": ((2 * S,), lambda t: lambda s, b, h, q, kv: s + t[2 * kv]),
    "diagonal": ((S, S), lambda t: lambda s, b, h, q, kv: s + t[kv, kv]),
    "two steps": ((S, 5), lambda t: lambda s, b, h, q, kv: s + t[q][kv % 5]),
    "two reads": ((S,), lambda t: lambda s, b, h, q, kv: s + t[q] * t[kv]),
    "three reads": ((H, S), lambda t: lambda s, b, h, q, kv: s * t[h, q] + t[h, kv] - t[0, kv]),
    "through functions": ((H,), lambda t: lambda s, b, h, q, kv:
                          torch.tanh(s / (1 + t[h] ** 2)) * (1 + t[h] ** 2)),
}


@pytest.fixture(params=[1, 2, 16], ids=["1 thread", "2 threads", "16 threads"])
def team(request, set_threads):
    set_threads(request.param)


@pytest.mark.parametrize("name", MODS)
def test_shapes_and_indices(rng, team, name):
    shape, make = MODS[name]
    check_gradients(*tensors((B, 2, 2, S, S, 16, 16)), make, causal, [torch.randn(shape)], slack=10)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("name", ["[H, 2S-1]", "[B, H, Q, KV]", "[S] by query", "bucket"])
def test_memory_too_small_for_copies(rng, set_threads, monkeypatch, heads, name):
    """Units are then shared out so that none is needed, or one thread does all."""
    set_threads(3)
    monkeypatch.setattr(launch_cpu_backward, "_THREAD_BUDGET", 0)
    shape, make = MODS[name]
    check_gradients(*tensors((B, heads, H // heads, S, S, 16, 16)), make, causal,
                    [torch.randn(shape)], slack=4)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64],
                         ids=str)
def test_dtypes_of_captured_tensors(rng, team, kind):
    """A gradient has its tensor's dtype, and is added up in at least float32."""
    q, k, v = tensors((1, 2, 1, 90, 90, 16, 16))
    t = torch.randn(90).to(kind)
    got = differentiate(q, k, v, lambda t: lambda s, b, h, q, kv: s + t[kv], None, [t])
    wanted = differentiate(q, k, v, lambda t: lambda s, b, h, q, kv: s + t[kv], None, [t.double()])
    assert got.captures[0].dtype is kind
    torch.testing.assert_close(got.captures[0].double(), wanted.captures[0],
                               atol=1e-4, rtol={torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(
                                   kind, 1e-5))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every second", "flipped copy"])
def test_strides_of_captured_tensors(rng, team, layout):
    t = {"transposed": torch.randn(S, H).t(), "expanded": torch.randn(1, S).expand(H, S),
         "every second": torch.randn(H, 2 * S)[:, ::2],
         "flipped copy": torch.randn(H, S).flip(1)}[layout]
    check_gradients(*tensors((1, 2, 2, S, S, 16, 16)), lambda t: lambda s, b, h, q, kv:
                    s + t[h, kv], None, [t], slack=4)


def test_several_tensors_of_which_some_need_no_gradient(rng, team):
    q, k, v = tensors((1, 4, 1, S, S, 16, 16))
    slopes, fixed, table = torch.randn(4), torch.randn(S), torch.randn(2 * S)

    def make(slopes, table):
        def mod(s, b, h, q, kv):
            return s * slopes[h] + fixed[kv] + table[q - kv + S]
        return mod

    got = check_gradients(q, k, v, make, causal, [slopes, table], slack=4)
    assert sum(g is None for g in got.captures) == 1


def test_what_the_mask_removes_adds_nothing(rng, team):
    """Also where the index would be out of range."""
    table = torch.randn(20)

    def mask(b, h, q, kv):
        return (q >= kv) & (q - kv < 20)

    q, k, v = tensors((1, 2, 1, S, S, 16, 16))
    d_out = torch.randn_like(v)
    got = differentiate(q, k, v, lambda t: lambda s, b, h, q, kv: s + t[q - kv], mask, [table],
                        d_out=d_out)
    wanted = expected_gradients(
        q, k, v, lambda t: lambda s, b, h, q, kv: s + t[(q - kv).clamp(0, 19)], mask, [table],
        None, d_out, None)
    for g, w in zip((got.query, got.key, got.value, *got.captures), wanted, strict=True):
        close(g, w, 4e-5, "a windowed table")


def load(*indices: Node, slot: int = 0) -> Node:
    return node(Op.LOAD, *indices, dtype=torch.float32, attr=slot)


def test_dimensions_of_an_index_alone():
    q, kv, h = (index_input(name) for name in ("q_idx", "kv_idx", "h"))
    distance = node(Op.SUB, q, kv, dtype=torch.int64)
    assert own_dimensions([load(h, distance)]) == {0: frozenset({"h"})}
    assert own_dimensions([load(h, q), load(h, kv)]) == {0: frozenset({"h"})}
    assert own_dimensions([load(q, slot=1), load(h, q)]) == {0: {"h", "q_idx"}, 1: {"q_idx"}}
    assert own_dimensions([load(const(0, torch.int64), h), load(h, h)]) == {0: frozenset({"h"})}
    assert own_dimensions([]) == {}


def test_without_a_mod():
    totals = CapturedGradients(None, [], frozenset(), 4, torch.float32)
    assert totals.results() == () and totals.copies == 1
