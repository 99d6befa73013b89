"""Every operation by plain Python on single values, loads, and what out of range means."""

import math

import pytest
import torch

from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Capture, Graph, cast, const, index_input, node
from flexattn.ir.ops import COMPARISON, FLOAT_UNARY, Op

NAN, INF = math.nan, math.inf
INTS = [-(2**40), -7, -2, -1, 0, 1, 2, 3, 8, 2**40]
REALS = [-INF, -2.5, -1.0, -0.5, -0.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.5, 3.0, INF, NAN]


def log(x):
    return NAN if x < 0 else -INF if x == 0 else math.log(x)


def real(fn):
    """fn on reals, NaN where Python says the argument is no number for it."""
    def safe(*xs):
        if any(x != x for x in xs):
            return NAN
        try:
            return fn(*xs)
        except ValueError:
            return NAN
        except OverflowError:
            return INF

    return safe


def whole(fn):
    return real(lambda x: x if math.isinf(x) else math.copysign(float(fn(x)), x))


UNARY = {
    Op.SQRT: real(lambda x: x if x == 0 else math.sqrt(x)),
    Op.RSQRT: real(lambda x: math.copysign(INF, x) if x == 0 else
                   NAN if x < 0 else 1 / math.sqrt(x)),
    Op.EXP: real(math.exp), Op.EXP2: real(lambda x: 2.0**x), Op.EXPM1: real(math.expm1),
    Op.LOG: real(log), Op.LOG2: real(lambda x: log(x) / math.log(2)),
    Op.LOG1P: real(lambda x: log(1 + x)),
    Op.SIN: real(math.sin), Op.COS: real(math.cos), Op.TANH: real(math.tanh),
    Op.SIGMOID: real(lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0),
    Op.ERF: real(math.erf),
    Op.FLOOR: whole(math.floor), Op.CEIL: whole(math.ceil), Op.TRUNC: whole(math.trunc),
    Op.ROUND: whole(round),
    Op.NEG: lambda x: -x, Op.ABS: abs,
    Op.SIGN: lambda x: 0 if x != x else (x > 0) - (x < 0),
}
COMPARE = {Op.LT: lambda x, y: x < y, Op.LE: lambda x, y: x <= y, Op.EQ: lambda x, y: x == y,
           Op.NE: lambda x, y: x != y}
BINARY = {
    **COMPARE,
    Op.ADD: lambda x, y: x + y, Op.SUB: lambda x, y: x - y, Op.MUL: lambda x, y: x * y,
    Op.MIN: lambda x, y: NAN if x != x or y != y else min(x, y),
    Op.MAX: lambda x, y: NAN if x != x or y != y else max(x, y),
    Op.MOD: lambda x, y: x % y, Op.FLOORDIV: lambda x, y: x // y,
    Op.AND: lambda x, y: x & y, Op.OR: lambda x, y: x | y, Op.XOR: lambda x, y: x ^ y,
    Op.SHL: lambda x, y: wrap(x << y), Op.SHR: lambda x, y: x >> y,
    Op.DIV: lambda x, y: x / y if y else by_zero(x, y),
    Op.POW: real(lambda x, y: x**y),
}


def by_zero(x, y):
    return NAN if x == 0 or x != x else math.copysign(INF, x) * math.copysign(1, y)


def wrap(x):
    """x as an int64."""
    return (x + 2**63) % 2**64 - 2**63


def leaf(name, dtype):
    return node(Op.INPUT, dtype=dtype, attr=name)


def run(op, *columns, dtype):
    """op on columns of values of one dtype."""
    names = [f"x{i}" for i in range(len(columns))]
    result = node(op, *(leaf(n, dtype) for n in names),
                  dtype=torch.bool if op in COMPARISON else dtype)
    inputs = {n: torch.tensor(c, dtype=dtype) for n, c in zip(names, columns, strict=True)}
    return evaluate(Graph((("y", result),)), inputs)["y"]


def equal(got, expected):
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-12,
                               equal_nan=True)


@pytest.mark.parametrize("op", sorted(FLOAT_UNARY | {Op.NEG, Op.ABS, Op.SIGN}))
def test_one_real(op):
    equal(run(op, REALS, dtype=torch.float64), [float(UNARY[op](x)) for x in REALS])


@pytest.mark.parametrize("op", [Op.NEG, Op.ABS, Op.SIGN])
def test_one_integer(op):
    assert run(op, INTS, dtype=torch.int64).tolist() == [UNARY[op](x) for x in INTS]


def test_not():
    assert run(Op.NOT, INTS, dtype=torch.int64).tolist() == [-x - 1 for x in INTS]
    assert run(Op.NOT, [True, False], dtype=torch.bool).tolist() == [False, True]


PAIRS = [(x, y) for x in REALS for y in REALS]
FINITE = [(x, y) for x, y in PAIRS if math.isfinite(x) and math.isfinite(y) and y]


@pytest.mark.parametrize("op", [Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX, Op.DIV,
                                *sorted(COMPARISON)])
def test_two_reals(op):
    got = run(op, *zip(*PAIRS, strict=True), dtype=torch.float64)
    equal(got, [BINARY[op](x, y) for x, y in PAIRS])


@pytest.mark.parametrize("op", [Op.MOD, Op.FLOORDIV])
def test_division_with_remainder(op):
    equal(run(op, *zip(*FINITE, strict=True), dtype=torch.float64),
          [BINARY[op](x, y) for x, y in FINITE])
    pairs = [(x, y) for x in INTS for y in INTS if y]
    assert run(op, *zip(*pairs, strict=True), dtype=torch.int64).tolist() == [
        BINARY[op](x, y) for x, y in pairs]


def test_an_integer_divided_by_zero_does_not_trap():
    for op in (Op.MOD, Op.FLOORDIV):
        assert run(op, [5, -5, 0], [0, 0, 0], dtype=torch.int64).shape == (3,)


def test_powers():
    pairs = [(abs(x), y) for x, y in FINITE if x]
    equal(run(Op.POW, *zip(*pairs, strict=True), dtype=torch.float64),
          [x**y for x, y in pairs])
    whole = [(x, y) for x in range(-3, 4) for y in range(-3, 5)]
    assert run(Op.POW, *zip(*whole, strict=True), dtype=torch.int64).tolist() == [
        x**y if y >= 0 else {1: 1, -1: (-1) ** y}.get(x, 0) for x, y in whole]


SMALL = [-9, -3, 0, 1, 5, 12]


@pytest.mark.parametrize("op", [Op.AND, Op.OR, Op.XOR, Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX,
                                *sorted(COMPARISON)])
def test_two_integers(op):
    pairs = [(x, y) for x in SMALL for y in SMALL]
    assert run(op, *zip(*pairs, strict=True), dtype=torch.int64).tolist() == [
        BINARY[op](x, y) for x, y in pairs]


@pytest.mark.parametrize("op", [Op.AND, Op.OR, Op.XOR])
def test_two_bools(op):
    pairs = [(x, y) for x in (False, True) for y in (False, True)]
    assert run(op, *zip(*pairs, strict=True), dtype=torch.bool).tolist() == [
        BINARY[op](x, y) for x, y in pairs]


@pytest.mark.parametrize("op", [Op.SHL, Op.SHR])
def test_shifts(op):
    pairs = [(x, y) for x in INTS for y in (0, 1, 5, 20)]
    assert run(op, *zip(*pairs, strict=True), dtype=torch.int64).tolist() == [
        BINARY[op](x, y) for x, y in pairs]


def test_integers_wrap_in_their_width():
    assert run(Op.MUL, [100, -100], [3, 3], dtype=torch.int8).tolist() == [44, -44]
    assert run(Op.ADD, [2**31 - 1], [1], dtype=torch.int32).tolist() == [-(2**31)]


def test_where_takes_what_is_chosen():
    condition = leaf("c", torch.bool)
    x, y = leaf("x", torch.float32), leaf("y", torch.float32)
    graph = Graph((("r", node(Op.WHERE, condition, x, y, dtype=torch.float32)),))
    got = evaluate(graph, {"c": torch.tensor([True, False]), "x": torch.tensor([1.0, NAN]),
                           "y": torch.tensor([NAN, 2.0])})["r"]
    assert got.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("source, target, values, expected", [
    (torch.float32, torch.int64, [-1.9, 1.9, 0.5], [-1, 1, 0]),
    (torch.float64, torch.bool, [0.0, -0.0, 0.1, NAN], [False, False, True, True]),
    (torch.int64, torch.int8, [300, -129], [44, 127]),
    (torch.bool, torch.float16, [True, False], [1.0, 0.0]),
    (torch.float32, torch.bfloat16, [1 + 2**-9], [1.0])])
def test_casts(source, target, values, expected):
    graph = Graph((("y", cast(leaf("x", source), target)),))
    got = evaluate(graph, {"x": torch.tensor(values, dtype=source)})["y"]
    assert got.dtype is target and got.tolist() == expected


# Loads

Q, K = index_input("q_idx"), index_input("kv_idx")


def load(rank, *indices, dtype=torch.float32):
    return Graph((("y", node(Op.LOAD, *indices, dtype=dtype, attr=0)),), (Capture(rank, dtype),))


def test_loads_broadcast():
    table = torch.randn(3, 5)
    inputs = {"q_idx": torch.arange(3)[:, None], "kv_idx": torch.arange(-5, 5)}
    got = evaluate(load(2, Q, K), inputs, [table])["y"]
    assert got.tolist() == [[table[i][j].item() for j in range(-5, 5)] for i in range(3)]
    assert evaluate(load(0), inputs, [torch.tensor(7.0)])["y"].item() == 7


def test_out_of_range_is_clamped_and_told():
    told = []
    inputs = {"q_idx": torch.tensor([-9, -4, 0, 3, 4, 99])}
    got = evaluate(load(1, Q), inputs, [torch.arange(4.0)],
                   on_out_of_range=lambda n, dim, index, size: told.append((dim, size)))["y"]
    assert got.tolist() == [0, 0, 0, 3, 3, 3] and told == [(0, 4)]
    told.clear()
    evaluate(load(1, Q), {"q_idx": torch.tensor([-4, 3])}, [torch.arange(4.0)],
             on_out_of_range=lambda *facts: told.append(facts))
    assert not told


def test_nothing_to_read_gives_zero():
    got = evaluate(load(1, Q), {"q_idx": torch.arange(3)}, [torch.empty(0)])["y"]
    assert got.tolist() == [0, 0, 0]


def test_numbers_and_constants_have_their_dtype():
    number = node(Op.NUMBER, dtype=torch.float64, attr=0)
    graph = Graph((("n", cast(number, torch.float32)), ("c", const(3, torch.int8))), (),
                  (torch.float64,))
    values = evaluate(graph, {}, numbers=[0.1])
    assert values["n"].item() == torch.tensor(0.1).item() and values["c"].dtype is torch.int8
