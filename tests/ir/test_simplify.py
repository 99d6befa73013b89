"""Every rule fires, and neither a rule nor a whole graph changes a bit of what is computed."""

import math
import random

import pytest
import torch

from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Capture, Graph, cast, const, index_input, node
from flexattn.ir.ops import COMPARISON, FLOATS, INTEGERS, Op
from flexattn.ir.simplify import RULES, simplify
from tests.trace.eager import same

F32, F64, I64, BOOL = torch.float32, torch.float64, torch.int64, torch.bool
S = node(Op.INPUT, dtype=F32, attr="score")
Q, K = index_input("q_idx"), index_input("kv_idx")
C = node(Op.LT, Q, K, dtype=BOOL)
D = node(Op.LE, K, Q, dtype=BOOL)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, -3.0, math.inf, -math.inf, math.nan, 1e-40, 3e38]


def op(o, *args):
    return node(o, *args, dtype=BOOL if o in COMPARISON else args[-1].dtype)


def f(x):
    return const(x, F32)


def i(x):
    return const(x, I64)


def true(x=True):
    return const(x, BOOL)


# (before, after): what the simplifier must find
RULES_FIRE = {
    "x + 0": (op(Op.ADD, Q, i(0)), Q),
    "0 + x": (op(Op.ADD, i(0), Q), Q),
    "x - 0": (op(Op.SUB, S, f(0.0)), S),
    "n - 0": (op(Op.SUB, Q, i(0)), Q),
    "n - n": (op(Op.SUB, Q, Q), i(0)),
    "x * 1": (op(Op.MUL, S, f(1)), S),
    "1 * x": (op(Op.MUL, f(1), S), S),
    "n * 0": (op(Op.MUL, Q, i(0)), i(0)),
    "x / 1": (op(Op.DIV, S, f(1)), S),
    "x / 4": (op(Op.DIV, S, f(4)), op(Op.MUL, S, f(0.25))),
    "n // 1": (op(Op.FLOORDIV, Q, i(1)), Q),
    "n // 8": (op(Op.FLOORDIV, Q, i(8)), op(Op.SHR, Q, i(3))),
    "n % 8": (op(Op.MOD, Q, i(8)), op(Op.AND, Q, i(7))),
    "x ** 1": (op(Op.POW, S, f(1)), S),
    "x ** 2": (op(Op.POW, S, f(2)), op(Op.MUL, S, S)),
    "x ** 3": (op(Op.POW, S, f(3)), op(Op.MUL, op(Op.MUL, S, S), S)),
    "x ** 0.5": (op(Op.POW, S, f(0.5)), op(Op.SQRT, S)),
    "x ** -0.5": (op(Op.POW, S, f(-0.5)), op(Op.RSQRT, S)),
    "x ** -1": (op(Op.POW, S, f(-1)), op(Op.DIV, f(1), S)),
    "x ** -2": (op(Op.POW, S, f(-2)), op(Op.DIV, f(1), op(Op.MUL, S, S))),
    "min(x, x)": (op(Op.MIN, S, S), S),
    "max(x, x)": (op(Op.MAX, S, S), S),
    "c & c": (op(Op.AND, C, C), C),
    "c & True": (op(Op.AND, C, true()), C),
    "False & c": (op(Op.AND, true(False), C), true(False)),
    "n & 0": (op(Op.AND, Q, i(0)), i(0)),
    "c | c": (op(Op.OR, C, C), C),
    "c | True": (op(Op.OR, C, true()), true()),
    "False | c": (op(Op.OR, true(False), C), C),
    "n | 0": (op(Op.OR, Q, i(0)), Q),
    "not not": (op(Op.NOT, op(Op.NOT, C)), C),
    "- -": (op(Op.NEG, op(Op.NEG, S)), S),
    "casts through a wider type": (cast(cast(cast(Q, torch.int32), I64), torch.int8),
                                   cast(cast(Q, torch.int32), torch.int8)),
    "there and back": (cast(cast(S, F64), F32), S),
    "where c x x": (op(Op.WHERE, C, S, S), S),
    "where True": (op(Op.WHERE, true(), S, f(0)), S),
    "where False": (op(Op.WHERE, true(False), S, f(3)), f(3)),
    "where not": (op(Op.WHERE, op(Op.NOT, C), S, f(3)), op(Op.WHERE, C, f(3), S)),
    "n < n": (op(Op.LT, Q, Q), true(False)),
    "n <= n": (op(Op.LE, Q, Q), true()),
    "n == n": (op(Op.EQ, Q, Q), true()),
    "n != n": (op(Op.NE, Q, Q), true(False)),
    "folding": (op(Op.ADD, op(Op.MUL, i(3), i(4)), op(Op.NEG, i(2))), i(10)),
    "folding in its own type": (op(Op.ADD, f(0.1), f(0.2)), f((torch.tensor(0.1) + 0.2).item())),
    "what folding makes simple": (op(Op.MUL, S, op(Op.SUB, f(3), f(2))), S),
}


@pytest.mark.parametrize("name", RULES_FIRE)
def test_rules_fire(name):
    before, after = RULES_FIRE[name]
    assert before is not after
    assert simplify(Graph((("x", before),))).output("x") is after
    equal(Graph((("x", before),)))


def test_every_rule_is_tested():
    assert set(RULES) <= {before.op for before, _ in RULES_FIRE.values()} | {Op.CAST}


# What looks like an identity and is none, for NaN, infinities and signed zeros
NO_IDENTITIES = {
    "x + 0.0": op(Op.ADD, S, f(0.0)), "x + -0.0": op(Op.ADD, S, f(-0.0)),
    "x - -0.0": op(Op.SUB, S, f(-0.0)), "x - x": op(Op.SUB, S, S), "x * 0": op(Op.MUL, S, f(0)),
    "x / x": op(Op.DIV, S, S), "x / 3": op(Op.DIV, S, f(3)), "x == x": op(Op.EQ, S, S),
    "x != x": op(Op.NE, S, S), "x // 2": op(Op.FLOORDIV, S, f(2)), "x % 2": op(Op.MOD, S, f(2)),
    "x ** 0": op(Op.POW, S, f(0)), "narrow and back": cast(cast(S, torch.float16), F32),
    "int and back": cast(cast(S, torch.int32), F32), "n ** 3": op(Op.POW, Q, i(3)),
}


@pytest.mark.parametrize("name", NO_IDENTITIES)
def test_no_false_identities(name):
    equal(Graph((("x", NO_IDENTITIES[name]),)))


def equal(graph):
    """graph and its simplification have the same bits everywhere."""
    inputs = {"score": torch.tensor(SPECIAL * 4), "q_idx": torch.arange(44) - 5,
              "kv_idx": torch.arange(44) % 7}
    captures = [torch.randn(7)] * len(graph.captures)
    numbers = [random.uniform(-3, 3) for _ in graph.numbers]
    before, after = (evaluate(g, inputs, captures, numbers) for g in (graph, simplify(graph)))
    for name, expected in before.items():
        assert after[name].dtype is expected.dtype
        if expected.dtype.is_floating_point:
            same(after[name].expand(44), expected.expand(44))
        else:
            assert torch.equal(after[name].expand(44), expected.expand(44))


def test_what_is_not_used_goes():
    loads = [node(Op.LOAD, x, dtype=F32, attr=0) for x in (Q, K)]
    dead = op(Op.WHERE, true(), loads[0], op(Op.EXP, loads[1]))
    graph = simplify(Graph((("x", dead),), (Capture(1, F32),)))
    assert [n.op for n in graph.nodes] == [Op.INPUT, Op.LOAD]


def test_simplifying_twice_changes_nothing():
    for before, _ in RULES_FIRE.values():
        once = simplify(Graph((("x", before),)))
        assert simplify(once).output("x") is once.output("x")


def test_indices_of_loads_are_simplified():
    index = op(Op.ADD, op(Op.MUL, Q, i(1)), i(0))
    graph = simplify(Graph((("x", node(Op.LOAD, index, dtype=F32, attr=0)),), (Capture(1, F32),)))
    assert graph.output("x") is node(Op.LOAD, Q, dtype=F32, attr=0)


# Random graphs

CONSTANTS = [0, 1, 2, -1, 3, 8, 0.5, -0.5, -0.0, math.inf, math.nan]
DTYPES = [F32, F64, torch.bfloat16, I64, torch.int32, torch.int8, BOOL]


def random_graph(rng):
    """Some 30 random well-typed nodes over scores, indices, a table and a number."""
    pool = [S, Q, K, C, D, node(Op.LOAD, op(Op.MOD, Q, i(7)), dtype=F32, attr=0),
            node(Op.NUMBER, dtype=F64, attr=0)]
    for dtype in DTYPES:
        pool += [const(rng.choice(CONSTANTS[:8] if dtype not in FLOATS else CONSTANTS), dtype)
                 for _ in range(2)]
    for _ in range(30):
        pool.append(random_node(rng, pool))
    chosen = pool[-4:]
    return Graph(tuple((f"x{n}", x) for n, x in enumerate(chosen)), (Capture(1, F32),), (F64,))


def random_node(rng, pool):
    x = rng.choice(pool)
    peers = [n for n in pool if n.dtype is x.dtype]
    y = rng.choice(peers)
    choices = [Op.CAST, Op.EQ, Op.LE, Op.LT, Op.NE, Op.WHERE]
    if x.dtype is BOOL:
        choices += [Op.NOT, Op.AND, Op.OR, Op.XOR]
    else:
        choices += [Op.NEG, Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX, Op.MOD, Op.FLOORDIV]
        choices += [Op.AND, Op.OR, Op.NOT] if x.dtype in INTEGERS else [Op.DIV, Op.POW, Op.EXP]
    o = rng.choice(choices)
    if o is Op.CAST:
        whole = x.dtype not in FLOATS  # a float out of an integer's range has no defined value
        return cast(x, rng.choice(DTYPES if whole else [d for d in DTYPES if d in FLOATS]))
    if o is Op.POW:  # an exponent that only folding makes constant is none in torch
        y = rng.choice([n for n in peers if n.is_const])
    if o is Op.WHERE:
        return node(o, rng.choice([n for n in pool if n.dtype is BOOL]), x, y, dtype=x.dtype)
    return op(o, x) if o in (Op.NOT, Op.NEG, Op.EXP) else op(o, x, y)


def test_random_graphs(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    fewer = 0
    for _ in range(300):
        graph = random_graph(rng)
        fewer += len(simplify(graph).nodes) < len(graph.nodes)
        equal(graph)
    assert fewer > 100
