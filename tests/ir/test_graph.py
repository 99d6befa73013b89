"""Nodes are shared by structure, graphs are ordered and printed, ill-typed nodes are refused."""

import gc
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexattn.ir.graph import Capture, Graph, cast, const, index_input, node
from flexattn.ir.ops import Op

SCORE = node(Op.INPUT, dtype=torch.float32, attr="score")
Q, K = index_input("q_idx"), index_input("kv_idx")


def add(x, y):
    return node(Op.ADD, x, y, dtype=x.dtype)


def test_equal_structure_is_one_object():
    assert add(Q, K) is add(Q, K)
    assert add(Q, K) is not add(K, Q)
    assert const(1, torch.int64) is const(1, torch.int64)
    assert cast(Q, torch.float32) is cast(Q, torch.float32)
    assert cast(Q, torch.int64) is Q


@pytest.mark.parametrize("x, y", [
    ((0.0, torch.float32), (-0.0, torch.float32)), ((1, torch.int64), (1.0, torch.float64)),
    ((1, torch.int64), (1, torch.int32)), ((True, torch.bool), (1, torch.int8)),
    ((math.nan, torch.float32), (math.inf, torch.float32))])
def test_constants_that_differ(x, y):
    assert const(*x) is not const(*y)


def test_nan_is_one_constant():
    assert const(math.nan, torch.float32) is const(float("nan"), torch.float32)


def test_constants_have_their_types_python_type():
    assert [type(const(1, d).attr) for d in (torch.bool, torch.int8, torch.float16)] == [
        bool, int, float]


def test_nodes_do_not_outlive_their_use():
    from flexattn.ir import graph

    gc.collect()
    before = len(graph._interned)
    chain = SCORE
    for i in range(100):
        chain = add(chain, const(i + 0.123456, torch.float32))
    assert len(graph._interned) >= before + 200
    del chain
    gc.collect()
    assert len(graph._interned) <= before


def test_threads_get_one_node():
    def build(_):
        x = SCORE
        for i in range(200):
            x = add(x, const(i + 0.654321, torch.float32))
        return x

    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(build, range(16)))
    assert len({id(n) for n in built}) == 1


def test_arguments_come_before_users():
    x = add(add(Q, K), add(K, Q))
    graph = Graph((("a", x), ("b", node(Op.NEG, x, dtype=torch.int64))))
    order = {n: i for i, n in enumerate(graph.nodes)}
    assert all(order[a] < order[n] for n in graph.nodes for a in n.args)
    assert len(graph.nodes) == len(set(graph.nodes)) == 6
    assert graph.inputs() == {"q_idx", "kv_idx"}
    assert graph.output("a") is x


def test_deep_graphs_do_not_recurse():
    x = Q
    for _ in range(20_000):
        x = add(x, Q)
    assert len(Graph((("x", x),)).nodes) == 20_001


def test_printing():
    table = node(Op.LOAD, Q, dtype=torch.float32, attr=0)
    number = node(Op.NUMBER, dtype=torch.float64, attr=0)
    product = node(Op.MUL, table, cast(number, torch.float32), dtype=torch.float32)
    where = node(Op.WHERE, node(Op.LT, Q, K, dtype=torch.bool), product,
                 const(-math.inf, torch.float32), dtype=torch.float32)
    graph = Graph((("score", where),), (Capture(1, torch.float32),), (torch.float64,))
    assert str(graph) == "\n".join([
        "%0 = input int64 q_idx", "%1 = input int64 kv_idx", "%2 = lt bool %0 %1",
        "%3 = load float32 capture0[%0]", "%4 = number float64 0", "%5 = cast float32 %4",
        "%6 = mul float32 %3 %5", "%7 = const float32 -inf", "%8 = where float32 %2 %6 %7",
        "return score: %8"])


BOOL, HALF = const(True, torch.bool), const(1.0, torch.float16)
WRONG = {
    "operands of two dtypes": lambda: node(Op.ADD, Q, SCORE, dtype=torch.float32),
    "result of another dtype": lambda: node(Op.ADD, Q, K, dtype=torch.int32),
    "arithmetic of bools": lambda: node(Op.ADD, BOOL, BOOL, dtype=torch.bool),
    "exp of integers": lambda: node(Op.EXP, Q, dtype=torch.int64),
    "division of integers": lambda: node(Op.DIV, Q, K, dtype=torch.int64),
    "not of floats": lambda: node(Op.NOT, SCORE, dtype=torch.float32),
    "neg of bools": lambda: node(Op.NEG, BOOL, dtype=torch.bool),
    "and of floats": lambda: node(Op.AND, SCORE, SCORE, dtype=torch.float32),
    "shift of bools": lambda: node(Op.SHL, BOOL, BOOL, dtype=torch.bool),
    "comparison that is no bool": lambda: node(Op.LT, Q, K, dtype=torch.int64),
    "comparison of two dtypes": lambda: node(Op.LT, Q, SCORE, dtype=torch.bool),
    "where without a bool": lambda: node(Op.WHERE, Q, SCORE, SCORE, dtype=torch.float32),
    "where of two dtypes": lambda: node(Op.WHERE, BOOL, SCORE, HALF, dtype=torch.float32),
    "load by a float": lambda: node(Op.LOAD, SCORE, dtype=torch.float32, attr=0),
    "load without a slot": lambda: node(Op.LOAD, Q, dtype=torch.float32),
    "input without a name": lambda: node(Op.INPUT, dtype=torch.int64),
    "a dtype that is none": lambda: cast(Q, torch.complex64),
    "cast of two": lambda: node(Op.CAST, Q, K, dtype=torch.float32),
    "an unknown index": lambda: index_input("kv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_ill_typed_nodes_are_refused(name):
    with pytest.raises(AssertionError):
        WRONG[name]()


LOAD = node(Op.LOAD, Q, dtype=torch.float32, attr=0)
NUMBER = node(Op.NUMBER, dtype=torch.int64, attr=0)


@pytest.mark.parametrize("result, captures, numbers", [
    (LOAD, (Capture(2, torch.float32),), ()), (LOAD, (Capture(1, torch.float16),), ()),
    (NUMBER, (), (torch.float64,))], ids=["rank", "dtype of a capture", "dtype of a number"])
def test_graphs_that_contradict_themselves(result, captures, numbers):
    with pytest.raises(AssertionError):
        Graph((("x", result),), captures, numbers)


def test_replace_outputs_keeps_what_is_known_of_captures():
    graph = Graph((("score", LOAD),), (Capture(1, torch.float32, True),), (torch.int64,))
    other = graph.replace_outputs(("index", Q))
    assert other.captures is graph.captures and other.numbers is graph.numbers
    assert other.outputs == (("index", Q),)
