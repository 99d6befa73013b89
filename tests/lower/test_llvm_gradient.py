"""A score mod's gradient in LLVM, row by row, against plain sums over positions."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flexattn import compile as objects
from flexattn.analysis.gradient import gradient
from flexattn.ir.graph import Graph
from flexattn.kernels.cpu_dsl import Emitter, Module, Value, const, i64
from flexattn.lower.llvm_gradient import LlvmGradient
from flexattn.lower.llvm_mod import FAULT_WORDS, argument_words
from flexattn.trace import specialize, trace_score_mod

Q, KV = 7, 96  # whole vectors of every width
B, H = 1, 2


def slopes(mod, captured: list[Tensor], score: Tensor, grad: Tensor,
           attended: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The mod's result and d_score [Q, KV] at (B, H), and gradients of the captured tensors."""
    traced = specialize(trace_score_mod(mod, score.dtype))
    assert [t.shape for t in traced.captures] == [t.shape for t in captured]
    derived = gradient(traced.graph)
    both = Graph((*traced.graph.outputs, *derived.graph.outputs), traced.graph.captures,
                 traced.graph.numbers)
    lowered = LlvmGradient(both, derived.loads, 2**15)
    storage = str(score.dtype).removeprefix("torch.")
    text = _emit(lowered, storage)
    run = objects.library(f"test gradient {text}", lambda: text, ["run"]).function(
        "run", *[ctypes.c_void_p] * 9)
    out, d_score = torch.empty_like(score), torch.empty_like(score)
    wide = [torch.zeros(64 + t.numel() + 64, dtype=score.dtype) for t in traced.captures]
    totals = [w[64:-64].view(t.shape) for w, t in zip(wide, traced.captures, strict=True)]
    tables = [torch.tensor([*words, 0]) for words in
              (*argument_words(traced.captures, traced.numbers), argument_words(totals, ())[0])]
    fault, mask = torch.zeros(FAULT_WORDS, dtype=torch.int64), attended.to(torch.int8)
    run(*(t.data_ptr() for t in (score, grad, mask, out, d_score, *tables, fault)))
    assert all((w[:64] == 0).all() and (w[-64:] == 0).all() for w in wide), "written outside"
    return out, d_score, totals


def _emit(mod: LlvmGradient, storage: str) -> str:
    e = Module(objects.host().vector_bits, storage).function("run", ["ptr"] * 9, export=True)
    score, grad, mask, out, d_score, captures, numbers, gradients, fault = e.params
    place = {"b": i64(B), "h": i64(H), "captures": captures, "numbers": numbers, "fault": fault}
    with e.loop(0, Q) as row:
        site = SimpleNamespace(q_idx=row.index, gradients=gradients, **place)
        values = mod.per_row(e, site)
        with e.loop(0, KV, e.lanes, mod.row_sums(e)) as column:
            at = e.add(e.mul(row.index, i64(KV)), column.index)
            allowed = e.compare("ne", e.load(mask, e.vec("i8"), at), const(e.vec("i8"), 0))
            vector = mod.begin_vector(e, SimpleNamespace(
                row=site, kv_base=column.index, row_values=values, attended=allowed,
                column_values=_columns(e, mod, column.index, place)), e.load(score, e.vector, at))
            e.store(vector.score(), out, at)
            given = e.select(allowed, e.load(grad, e.vector, at), e.number(0.0))
            e.store(vector.d_score(given), d_score, at)
            column.next = vector.accumulate(column.values)
        mod.end_row(e, site, values, column.values)
    e.ret()
    return str(e.module)


def _columns(e: Emitter, mod: LlvmGradient, kv_base: Value, place: dict) -> list[Value]:
    return list(mod.per_column(e, SimpleNamespace(kv_base=kv_base, **place)))


def positions() -> tuple[Tensor, ...]:
    return (torch.tensor(B), torch.tensor(H), torch.arange(Q)[:, None].expand(Q, KV),
            torch.arange(KV).expand(Q, KV))


INDICES = {
    "whole row": ((Q,), lambda b, h, q, kv: (q,)),
    "one element": ((3,), lambda b, h, q, kv: (h,)),
    "consecutive": ((KV,), lambda b, h, q, kv: (kv,)),
    "relative": ((KV + Q,), lambda b, h, q, kv: (kv - q + Q - 1,)),
    "backwards": ((KV + Q,), lambda b, h, q, kv: (q - kv + KV - 1,)),
    "every second": ((2 * KV,), lambda b, h, q, kv: (2 * kv + 1,)),
    "pairs": ((KV,), lambda b, h, q, kv: (kv // 2,)),
    "cycle": ((5,), lambda b, h, q, kv: ((kv + q) % 5,)),
    "matrix": ((Q, KV), lambda b, h, q, kv: (q, kv)),
    "turned matrix": ((KV, Q), lambda b, h, q, kv: (kv, q)),
    "four": ((2, 3, Q, KV), lambda b, h, q, kv: (b, h, q, kv)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_one_read(rng, name, dtype):
    """d/dt of sum(grad * t[index] * score): grad * score at every position's element."""
    shape, index = INDICES[name]
    t = torch.randn(shape, dtype=dtype, requires_grad=True)
    score, grad = torch.randn(2, Q, KV, dtype=dtype)
    attended = torch.rand(Q, KV) < 0.7
    out, d_score, (total,) = slopes(lambda s, *at: s * t[index(*at)], [t], score, grad, attended)
    where = tuple(i.expand(Q, KV) for i in index(*positions()))
    kept = torch.where(attended, grad, 0).double()
    expected = torch.zeros(shape, dtype=torch.float64)
    expected.index_put_(where, kept * score.double(), accumulate=True)
    exact = dict(rtol=1e-5, atol=1e-5) if dtype is torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.double(), expected, **exact)
    read = t.detach()[where].double()
    torch.testing.assert_close(out.double(), score.double() * read, **exact)
    torch.testing.assert_close(d_score.double(), kept * read, **exact)


def test_two_reads_add_up(rng):
    t = torch.randn(KV + Q, requires_grad=True)
    score, grad = torch.randn(2, Q, KV)
    _, _, (total,) = slopes(lambda s, b, h, q, kv: s + t[kv] + 3 * t[q + kv], [t], score, grad,
                            torch.ones(Q, KV, dtype=torch.bool))
    *_, q, kv = positions()
    expected = torch.zeros(KV + Q).index_put((kv,), grad, accumulate=True)
    expected = expected.index_put((q + kv,), 3 * grad, accumulate=True)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_lanes_that_are_not_attended_give_zero_whatever_they_hold(rng):
    t = torch.randn(KV, requires_grad=True)
    score, grad = torch.randn(2, Q, KV)
    attended = torch.rand(Q, KV) < 0.5
    score[~attended], grad[~attended] = float("nan"), float("inf")
    _, d_score, (total,) = slopes(lambda s, b, h, q, kv: s * t[kv], [t], score, grad, attended)
    assert total.isfinite().all() and (d_score[~attended] == 0).all()


def test_reads_beyond_the_tensor_add_nothing_outside_of_it(rng):
    """A windowed table: what is not attended is out of range, before and after the tensor."""
    t = torch.randn(20, requires_grad=True)
    score, grad = torch.randn(2, Q, KV)
    *_, q, kv = positions()
    distance = kv - q
    attended = (distance >= 0) & (distance < 20)
    _, _, (total,) = slopes(lambda s, b, h, q, kv: s + t[kv - q], [t], score, grad, attended)
    expected = torch.zeros(20).index_put((distance.clamp(0, 19),), grad * attended,
                                         accumulate=True)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
