"""Every operation of the LLVM lowering, in every dtype, as vectors and as scalars, against
ir.evaluate; random values and the edges of each type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Capture, Graph, Node, cast, const, index_input, node
from flexattn.ir.ops import (
    ARITHMETIC,
    BITWISE,
    COMPARISON,
    DTYPES,
    FLOAT_UNARY,
    FLOATS,
    INTEGERS,
    UNARY,
    Op,
    dtype_name,
)
from tests.lower.harness import index_inputs, rows

KV = 1003  # not a multiple of any vector
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, float("inf"), float("-inf"),
         float("nan"), 1e-40, 3e38, -3e38, 100.0, -100.0]


def dtypes_of(op: Op) -> list[torch.dtype]:
    if op in FLOAT_UNARY or op is Op.DIV:
        kinds = FLOATS
    elif op in (Op.SHL, Op.SHR):
        kinds = INTEGERS
    elif op in BITWISE or op is Op.NOT:
        kinds = INTEGERS | {torch.bool}
    elif op in ARITHMETIC | UNARY:
        kinds = FLOATS | INTEGERS
    else:
        kinds = DTYPES
    return sorted(kinds, key=str)


def values(dtype: torch.dtype, count: int, rng: np.random.Generator) -> Tensor:
    """Random values, with the edges of the type among them."""
    if dtype is torch.bool:
        return torch.from_numpy(rng.integers(0, 2, count).astype(bool))
    if dtype in INTEGERS:
        info = torch.iinfo(dtype)
        wide = rng.integers(info.min, info.max, count, endpoint=True, dtype=np.dtype(
            dtype_name(dtype)))
        small = rng.integers(max(info.min, -9), 9, count)
        x = torch.from_numpy(np.where(rng.random(count) < 0.5, small, wide)).to(dtype)
        edges = torch.tensor([info.min, info.max, 0, 1, max(info.min, -1)], dtype=dtype)
    else:
        x = torch.from_numpy(rng.normal(0, 3, count)).to(dtype)
        edges = torch.tensor(EDGES).to(dtype)
    places = torch.from_numpy(rng.permutation(count)[:count // 4])
    x[places] = edges[torch.from_numpy(rng.integers(0, len(edges), count // 4))]
    return x


def pair(op: Op, dtype: torch.dtype, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    x, y = values(dtype, KV, rng), values(dtype, KV, rng)
    if op in (Op.FLOORDIV, Op.MOD) and dtype in INTEGERS:
        y[y == 0] = 3  # unspecified, see test_division_never_traps
        if dtype is not torch.uint8:
            y[(x == torch.iinfo(dtype).min) & (y == -1)] = 2
    if op in (Op.FLOORDIV, Op.MOD) and dtype in FLOATS:
        far = (x / y).abs() > 1e5
        y[far & (y != 0) & x.isfinite()] = 2.0
    return x, y


def load(slot: int, dtype: torch.dtype, index: str = "kv_idx") -> Node:
    return node(Op.LOAD, index_input(index), dtype=dtype, attr=slot)


def check(graph: Graph, captures: list[Tensor], numbers=(), q_len: int = 1, kv_len: int = KV,
          tolerance: float | None = None) -> None:
    expected = evaluate(graph, index_inputs(q_len, kv_len), captures, numbers)["out"]
    got, fault = rows(graph, torch.zeros(q_len, kv_len), captures, numbers)
    assert not any(fault)
    expected = expected.expand(q_len, kv_len)
    if expected.dtype in FLOATS:
        eps = tolerance if tolerance is not None else 0.0
        torch.testing.assert_close(got["out"].to(expected.dtype), expected, rtol=eps, atol=1e-38,
                                   equal_nan=True)
    else:
        torch.testing.assert_close(got["out"], expected, rtol=0, atol=0)


def tolerance(op: Op, dtype: torch.dtype) -> float:
    exact = {Op.FLOOR, Op.CEIL, Op.TRUNC, Op.ROUND, Op.NEG, Op.ABS, Op.SIGN, Op.ADD,
             Op.SUB, Op.MUL, Op.DIV, Op.MIN, Op.MAX, Op.CAST, Op.WHERE}
    return 0.0 if op in exact else 8 * torch.finfo(dtype).eps


CASES = [(op, dtype) for op in sorted(UNARY | ARITHMETIC | BITWISE | COMPARISON)
         for dtype in dtypes_of(op)]


@pytest.mark.parametrize("index", ["kv_idx", "q_idx"])
@pytest.mark.parametrize("op, dtype", CASES, ids=lambda x: getattr(x, "name", None) or str(x)[6:])
def test_operation(op: Op, dtype: torch.dtype, index: str, rng: np.random.Generator) -> None:
    """index: vectors of columns, or scalars of rows."""
    if op in UNARY:
        captures = [values(dtype, KV, rng)]
        if op in (Op.SIN, Op.COS):
            captures[0][captures[0].abs() > 1e5] = 1.0
    else:
        captures = list(pair(op, dtype, rng))
    args = [load(i, dtype, index) for i in range(len(captures))]
    result = torch.bool if op in COMPARISON else dtype
    graph = Graph((("out", node(op, *args, dtype=result)),),
                  tuple(Capture(1, dtype) for _ in captures))
    size = {"q_len": KV, "kv_len": 1} if index == "q_idx" else {}
    check(graph, captures, **size, tolerance=tolerance(op, dtype) if result in FLOATS else None)


@pytest.mark.parametrize("source", sorted(DTYPES, key=str), ids=dtype_name)
@pytest.mark.parametrize("target", sorted(DTYPES, key=str), ids=dtype_name)
def test_cast(source: torch.dtype, target: torch.dtype, rng: np.random.Generator) -> None:
    x = values(source, KV, rng)
    if source in FLOATS and target in INTEGERS:
        low, high = (0, 255) if target is torch.uint8 else (-100, 100)
        x = torch.nan_to_num(x).clamp(low, high)
    graph = Graph((("out", cast(load(0, source), target)),), (Capture(1, source),))
    check(graph, [x])


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=dtype_name)
def test_where(dtype: torch.dtype, rng: np.random.Generator) -> None:
    captures = [values(torch.bool, KV, rng), values(dtype, KV, rng), values(dtype, KV, rng)]
    out = node(Op.WHERE, load(0, torch.bool), load(1, dtype), load(2, dtype), dtype=dtype)
    check(Graph((("out", out),), (Capture(1, torch.bool), Capture(1, dtype), Capture(1, dtype))),
          captures)


@pytest.mark.parametrize("dtype", sorted(INTEGERS, key=str), ids=dtype_name)
@pytest.mark.parametrize("op", [Op.FLOORDIV, Op.MOD], ids=lambda op: op.name)
def test_division_by_constants(op: Op, dtype: torch.dtype, rng: np.random.Generator) -> None:
    for divisor in (1, 2, 3, 7, 16, 100, *((-1, -2, -5) if dtype is not torch.uint8 else ())):
        x = values(dtype, KV, rng)
        if divisor == -1:
            x[x == torch.iinfo(dtype).min] = 5
        out = node(op, load(0, dtype), const(divisor, dtype), dtype=dtype)
        check(Graph((("out", out),), (Capture(1, dtype),)), [x])


@pytest.mark.parametrize("index", ["kv_idx", "q_idx"])
@pytest.mark.parametrize("dtype", sorted(INTEGERS, key=str), ids=dtype_name)
@pytest.mark.parametrize("op", [Op.FLOORDIV, Op.MOD], ids=lambda op: op.name)
def test_division_never_traps(op: Op, dtype: torch.dtype, index: str) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([info.min, info.max, 0, 5, info.min], dtype=dtype)
    y = torch.tensor([0, 0, 0, 0, max(info.min, -1)], dtype=dtype)
    out = node(op, load(0, dtype, index), load(1, dtype, index), dtype=dtype)
    zero = node(op, load(0, dtype, index), const(0, dtype), dtype=dtype)
    graph = Graph((("out", out), ("zero", zero)), (Capture(1, dtype), Capture(1, dtype)))
    q_len, kv_len = (5, 1) if index == "q_idx" else (1, 5)
    got, _ = rows(graph, torch.zeros(q_len, kv_len), [x, y])
    assert got["out"].numel() == 5


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 4, 7, -1, -2, 0.5, -0.5, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_power_of_constants(dtype: torch.dtype, exponent: float, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(0, 2, KV)).to(dtype)
    out = node(Op.POW, load(0, dtype), const(exponent, dtype), dtype=dtype)
    check(Graph((("out", out),), (Capture(1, dtype),)), [x], tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bound", [2**15, 2**30, 2**62], ids=["2^15", "2^30", "2^62"])
def test_index_arithmetic_does_not_wrap(bound: int, rng: np.random.Generator) -> None:
    """Ranges decide the width of the lanes; the results are those of int64."""
    q, kv, zero = index_input("q_idx"), index_input("kv_idx"), const(0, torch.int64)
    i64 = torch.int64
    product = node(Op.MUL, q, kv, dtype=i64)
    square = node(Op.MUL, product, product, dtype=i64)
    big = node(Op.ADD, square, const(2**40, i64), dtype=i64)
    nodes = {
        "product": product, "square": square, "big": big,
        "quotient": node(Op.FLOORDIV, big, const(7, i64), dtype=i64),
        "rest": node(Op.MOD, big, const(1000, i64), dtype=i64),
        "below": node(Op.MOD, node(Op.SUB, q, kv, dtype=i64), const(13, i64), dtype=i64),
        "block": node(Op.FLOORDIV, node(Op.SUB, q, kv, dtype=i64), const(13, i64), dtype=i64),
        "least": node(Op.MIN, big, kv, dtype=i64),
        "distance": node(Op.ABS, node(Op.SUB, q, kv, dtype=i64), dtype=i64),
        "number": node(Op.ADD, kv, node(Op.NUMBER, dtype=i64, attr=0), dtype=i64),
        "shifted": node(Op.SHL, kv, const(40, i64), dtype=i64),
        "before": node(Op.LE, kv, node(Op.ADD, q, node(Op.NUMBER, dtype=i64, attr=0), dtype=i64),
                       dtype=torch.bool),
        "after": node(Op.LT, node(Op.NUMBER, dtype=i64, attr=1), kv, dtype=torch.bool),
        "equal": node(Op.EQ, kv, node(Op.NUMBER, dtype=i64, attr=2), dtype=torch.bool),
        "negative": node(Op.SUB, zero, kv, dtype=i64),
        "real": cast(big, torch.float32),
    }
    graph = Graph(tuple(nodes.items()), (), (i64, i64, i64))
    for numbers in ([3, 2**40, 5], [-2**50, -2**50, 2**32 + 5], [2**33, -1, -1]):
        expected = evaluate(graph, index_inputs(9, 40), (), numbers)
        got, _ = rows(graph, torch.zeros(9, 40), (), numbers, index_bound=bound)
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x.expand(9, 40), rtol=0, atol=0, msg=name)


def test_numbers_of_every_kind() -> None:
    numbers = [7, 2.5, True]
    kinds = (torch.int64, torch.float64, torch.bool)
    nodes = tuple((f"out{i}", node(Op.NUMBER, dtype=kind, attr=i)) for i, kind in enumerate(kinds))
    got, _ = rows(Graph(nodes, (), kinds), torch.zeros(2, 5), (), numbers)
    for i, value in enumerate(numbers):
        assert (got[f"out{i}"] == value).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_score_and_grad_are_inputs(dtype: torch.dtype, rng: np.random.Generator) -> None:
    score, grad = (node(Op.INPUT, dtype=dtype, attr=name) for name in ("score", "grad"))
    graph = Graph((("sum", node(Op.ADD, score, node(Op.MUL, grad, score, dtype=dtype),
                                dtype=dtype)),))
    s, g = (torch.from_numpy(rng.normal(size=(3, 21))).to(dtype) for _ in range(2))
    got, _ = rows(graph, s, grad=g)
    torch.testing.assert_close(got["sum"], s + g * s)
