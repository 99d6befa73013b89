"""Reads of captured tensors in the LLVM lowering, what is hoisted, and the record of reads out of
range, against ir.evaluate and plain Python."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Capture, Graph, Node, cast, const, index_input, node
from flexattn.ir.ops import DTYPES, FLOATS, Op, dtype_name
from flexattn.lower.llvm_levels import COLUMN, ELEMENT, ROW, Levels
from tests.lower.harness import index_inputs, rows

I64 = torch.int64
Q, KV, B, H = (index_input(name) for name in ("q_idx", "kv_idx", "b", "h"))


def add(x: Node, y: Node | int) -> Node:
    return node(Op.ADD, x, y if isinstance(y, Node) else const(y, I64), dtype=I64)


def sub(x: Node, y: Node) -> Node:
    return node(Op.SUB, x, y, dtype=I64)


def mul(x: Node, y: int) -> Node:
    return node(Op.MUL, x, const(y, I64), dtype=I64)


def read(*indices: Node, dtype: torch.dtype = torch.float32, slot: int = 0) -> Node:
    return node(Op.LOAD, *indices, dtype=dtype, attr=slot)


def graph_of(out: Node, *tensors: Tensor) -> Graph:
    return Graph((("out", out),), tuple(Capture(t.dim(), t.dtype) for t in tensors))


def same(graph: Graph, captures: list[Tensor], q_len: int = 13, kv_len: int = 37,
         **where: int) -> None:
    """Equal to the evaluator, with the same verdict on indices."""
    reported = []
    expected = evaluate(graph, index_inputs(q_len, kv_len, **where), captures,
                        on_out_of_range=lambda *args: reported.append(args))["out"]
    got, fault = rows(graph, torch.zeros(q_len, kv_len), captures, **where)
    torch.testing.assert_close(got["out"].to(expected.dtype), expected.expand(q_len, kv_len),
                               rtol=0, atol=0)
    assert bool(fault[0]) == bool(reported)


SIZE = 64
INDICES: dict[str, Callable[[], list[Node]]] = {
    "column": lambda: [KV],
    "row": lambda: [Q],
    "relative": lambda: [add(sub(Q, KV), 40)],
    "relative, forward": lambda: [add(sub(KV, Q), 20)],
    "negative": lambda: [sub(Q, KV)],
    "negative, forward": lambda: [sub(KV, Q)],
    "every second": lambda: [add(mul(KV, 2), -20)],
    "distance": lambda: [node(Op.ABS, sub(Q, KV), dtype=I64)],
    "clamped": lambda: [node(Op.MIN, node(Op.MAX, sub(Q, KV), const(-3, I64), dtype=I64),
                             const(3, I64), dtype=I64)],
    "bucket": lambda: [node(Op.FLOORDIV, KV, const(5, I64), dtype=I64)],
    "cancelled": lambda: [add(sub(Q, KV), KV)],
    "matrix": lambda: [Q, KV],
    "transposed matrix": lambda: [KV, Q],
    "diagonal": lambda: [KV, KV],
    "antidiagonal": lambda: [KV, add(mul(KV, -1), 50)],
    "head table": lambda: [H, add(sub(Q, KV), 40)],
    "four": lambda: [B, H, Q, KV],
}


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
@pytest.mark.parametrize("name", INDICES)
def test_reads(name: str, layout: str, rng: np.random.Generator) -> None:
    indices = INDICES[name]()
    sizes = [5, 5, SIZE, SIZE][-len(indices):] if len(indices) != 2 else [SIZE, SIZE]
    table = torch.from_numpy(rng.normal(size=[2 * s for s in sizes])).float()
    if layout == "contiguous":
        table = table[tuple(slice(s) for s in sizes)].contiguous()
    elif layout == "strided":
        table = table[tuple(slice(1, None, 2) for _ in sizes)].transpose(0, -1)
    else:
        table = table[tuple(slice(s if d else 1) for d, s in enumerate(sizes))].expand(sizes)
    same(graph_of(read(*indices), table), [table], b=1, h=3)


@pytest.mark.parametrize("index", ["column", "row", "relative", "distance"])
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=dtype_name)
def test_reads_of_every_dtype(dtype: torch.dtype, index: str, rng: np.random.Generator) -> None:
    table = torch.from_numpy(rng.normal(0, 9, SIZE)).to(dtype)
    same(graph_of(read(*INDICES[index](), dtype=dtype), table), [table])


def test_zero_dimensional_capture() -> None:
    table = torch.tensor(2.5)
    same(graph_of(read(), table), [table])


def test_index_from_another_tensor(rng: np.random.Generator) -> None:
    documents = torch.from_numpy(np.sort(rng.integers(0, 5, 37)))
    starts = torch.from_numpy(rng.integers(0, 99, 5)).to(torch.int32)
    inner = read(KV, dtype=I64)
    out = read(inner, dtype=torch.int32, slot=1)
    same(graph_of(out, documents, starts), [documents, starts])


def test_narrow_comparison_of_read_values(rng: np.random.Generator) -> None:
    """A wide scalar compared with a narrow vector must not wrap."""
    limits = torch.tensor([2**40, -2**40, 2**32 + 3, 5, -1, 2**31 - 1, -2**31, 36, 0, 7, 8, 9, 1])
    for op in (Op.LT, Op.LE, Op.EQ, Op.NE):
        for args in ((KV, read(Q, dtype=I64)), (read(Q, dtype=I64), KV)):
            same(graph_of(node(op, *args, dtype=torch.bool), limits), [limits])


def test_empty_tensor_is_never_read() -> None:
    """Its address is null; every read is out of range."""
    table = torch.zeros(0)
    for index in (KV, Q, add(sub(Q, KV), 3), node(Op.ABS, sub(Q, KV), dtype=I64)):
        graph = graph_of(read(index), table)
        got, fault = rows(graph, torch.zeros(4, 9), [table])
        assert fault[0] and (got["out"] == 0).all()


def test_guard_pages_are_not_touched() -> None:
    """Reads of a table between two inaccessible pages: any read outside would crash."""
    table = _guarded(torch.arange(SIZE, dtype=torch.float32))
    for index in (add(KV, 60), add(sub(Q, KV), 3), add(mul(KV, 3), -100), add(KV, -70),
                  node(Op.ABS, mul(sub(Q, KV), 9), dtype=I64), add(mul(KV, -1), 5)):
        same(graph_of(read(index), table), [table])


def _guarded(values: Tensor) -> Tensor:
    """The values at the very end of a mapped page whose successor is inaccessible."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    size = values.numel() * values.element_size()
    buffer = (ctypes.c_char * size).from_address(start + page - size)
    table = torch.frombuffer(buffer, dtype=values.dtype)
    table.copy_(values)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    table._area = area  # type: ignore[attr-defined]
    return table


@pytest.mark.parametrize("index", ["column", "row", "distance", "bucket", "head"])
def test_fault_only_where_attended(index: str, rng: np.random.Generator) -> None:
    nodes = {"column": KV, "row": Q, "distance": node(Op.ABS, sub(Q, KV), dtype=I64),
             "bucket": node(Op.FLOORDIV, KV, const(2, I64), dtype=I64), "head": H}
    table = torch.arange(9.0)
    graph = graph_of(read(nodes[index]), table)
    q, kv = torch.arange(13)[:, None], torch.arange(37)
    h = 9 if index == "head" else 2
    bad = {"column": kv >= 9, "row": q >= 9, "distance": (q - kv).abs() >= 9,
           "bucket": kv // 2 >= 9, "head": torch.tensor(True)}[index].expand(13, 37)
    _, fault = rows(graph, torch.zeros(13, 37), [table], h=h, attended=~bad)
    assert fault == [0] * 8
    one = torch.zeros(13, 37, dtype=torch.bool)
    at = bad.nonzero()[rng.integers(int(bad.sum()))]
    one[tuple(at)] = True
    scores = torch.from_numpy(rng.normal(size=(13, 37))).float()
    _, fault = rows(graph, scores, [table], b=4, h=h, attended=one)
    assert fault[:5] == [1, 4, h, *at.tolist()]
    assert struct.unpack("d", struct.pack("q", fault[5]))[0] == scores[tuple(at)].item()


def test_fault_of_a_hoisted_read() -> None:
    """The read inside a value that the columns keep, and one inside a row's."""
    table, map_ = torch.arange(50.0), torch.arange(37)
    map_[30] = 99
    for index in (KV, Q):
        graph = graph_of(read(read(index, dtype=I64), slot=1), map_, table)
        allowed = torch.ones(37, 37, dtype=torch.bool)
        _, fault = rows(graph, torch.zeros(37, 37), [map_, table], attended=allowed)
        assert fault[0] and 30 in fault[3:5]
        allowed[(slice(None), 30) if index is KV else 30] = False
        _, fault = rows(graph, torch.zeros(37, 37), [map_, table], attended=allowed)
        assert not fault[0]


def test_index_from_the_score(rng: np.random.Generator) -> None:
    table = torch.from_numpy(rng.normal(size=40)).float()
    score = node(Op.INPUT, dtype=torch.float32, attr="score")
    graph = graph_of(read(cast(score, I64)), table)
    scores = torch.from_numpy(rng.uniform(-40, 40, (5, 29))).float()
    expected = evaluate(graph, {"score": scores}, [table])["out"]
    got, fault = rows(graph, scores, [table])
    assert torch.equal(got["out"], expected) and not fault[0]


def test_levels() -> None:
    levels = Levels()
    assert levels.level(add(Q, H)) == ROW and levels.affine(add(Q, H)) == 0
    assert levels.level(add(KV, H)) == COLUMN and levels.affine(sub(H, mul(KV, 3))) == -3
    assert levels.level(sub(Q, KV)) == ELEMENT and levels.affine(sub(Q, KV)) == -1
    assert levels.affine(node(Op.MUL, KV, Q, dtype=I64)) is None
    assert levels.affine(node(Op.ABS, KV, dtype=I64)) is None
    assert not levels.is_hoisted(add(KV, 1)) and levels.is_hoisted(read(KV))


def random_mod(rng: np.random.Generator, dtype: torch.dtype) -> tuple[Graph, list[Tensor]]:
    """A few dozen operations on indices, captured tensors and the score."""
    captures = [torch.from_numpy(rng.integers(0, 30, 40)), torch.from_numpy(
        rng.normal(size=(6, 40))).to(dtype), torch.from_numpy(rng.normal(size=81)).to(dtype)]
    integers = [Q, KV, B, H, const(3, I64), read(KV, dtype=I64), read(Q, dtype=I64)]
    reals = [node(Op.INPUT, dtype=dtype, attr="score"), const(0.5, dtype),
             read(H, KV, dtype=dtype, slot=1), read(add(sub(Q, KV), 40), dtype=dtype, slot=2)]
    bools = [node(Op.LE, KV, Q, dtype=torch.bool)]

    def pick(nodes: list[Node]) -> Node:
        return nodes[int(rng.integers(len(nodes)))]

    for _ in range(25):
        kind = rng.integers(4)
        if kind == 0:
            op = rng.choice([Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX, Op.MOD, Op.FLOORDIV])
            integers.append(node(Op(int(op)), pick(integers), pick(integers), dtype=I64))
        elif kind == 1:
            op = Op(int(rng.choice([Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX])))
            reals.append(node(op, pick(reals), pick(reals), dtype=dtype))
        elif kind == 2:
            source = pick([integers, reals][rng.integers(2)])
            bools.append(node(Op.LT, source, source if rng.random() < 0.1 else pick(
                integers if source.dtype is I64 else reals), dtype=torch.bool))
        else:
            op = Op(int(rng.choice([Op.TANH, Op.SIGMOID, Op.NEG, Op.ABS])))
            reals += [node(op, pick(reals), dtype=dtype),
                      node(Op.WHERE, pick(bools), pick(reals), pick(reals), dtype=dtype)]
    total = cast(node(Op.MOD, pick(integers), const(100, I64), dtype=I64), dtype)
    for x in reals:
        total = node(Op.ADD, total, node(Op.TANH, x, dtype=dtype), dtype=dtype)
    return graph_of(total, *captures), captures


@pytest.mark.parametrize("dtype", sorted({torch.float32, torch.float64} & FLOATS, key=str),
                         ids=dtype_name)
@pytest.mark.parametrize("repeat", range(6))
def test_random_mods(repeat: int, dtype: torch.dtype, rng: np.random.Generator) -> None:
    graph, captures = random_mod(rng, dtype)
    scores = torch.from_numpy(rng.normal(size=(40, 40))).to(dtype)
    inputs = {**index_inputs(40, 40, 1, 4), "score": scores}
    expected = evaluate(graph, inputs, captures)["out"]
    for bound in (2**15, 2**62):
        got, fault = rows(graph, scores, captures, b=1, h=4, index_bound=bound)
        close = torch.isclose(got["out"], expected, rtol=0, atol=3e-4 if dtype is torch.float32
                              else 1e-12)
        assert close.float().mean() > 0.999  # comparisons may fall on either side
        assert not fault[0]


def test_quotients_of_indices_stay_exact() -> None:
    """floor(n d / d) = n, which a product with 1 / d misses for some: only scores may be off by
    an ulp."""
    for d in (3, 41, 47, 49, 55, 61):
        quotient = node(Op.DIV, cast(mul(KV, d), torch.float32), const(float(d), torch.float32),
                        dtype=torch.float32)
        graph = graph_of(cast(node(Op.FLOOR, quotient, dtype=torch.float32), I64))
        got, _ = rows(graph, torch.zeros(2, 200))
        assert got["out"][1].tolist() == list(range(200))


@pytest.mark.parametrize("divisor", [20.0, -0.3, 1e-31, 7e31])
def test_quotients_of_scores(divisor: float, rng: np.random.Generator) -> None:
    score = node(Op.INPUT, dtype=torch.float32, attr="score")
    out = node(Op.DIV, score, const(divisor, torch.float32), dtype=torch.float32)
    scores = torch.from_numpy(rng.normal(0, min(abs(divisor), 1.0), (4, 50))).float()
    got, _ = rows(graph_of(out), scores)
    torch.testing.assert_close(got["out"].double(), scores.double() / divisor, rtol=2e-7, atol=0)
