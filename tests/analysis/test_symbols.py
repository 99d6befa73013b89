"""Symbols compute what Python computes; what they cannot, they refuse."""

from __future__ import annotations

import operator
import random

import pytest
import torch

from flexattn.analysis.bounds import choose, is_number, maximum, minimum, negate, point, to_real
from flexattn.analysis.symbols import NoSymbolError, Symbol, chosen
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph, index_input

X, Y = (Symbol(index_input(name)) for name in ("q_idx", "kv_idx"))


def value(symbol, x, y):
    inputs = {"q_idx": torch.tensor(x), "kv_idx": torch.tensor(y)}
    return evaluate(Graph((("v", symbol.node),)), inputs)["v"].item()


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.floordiv,
                                operator.mod,
                                operator.lt, operator.le, operator.gt, operator.ge, operator.eq,
                                operator.ne, minimum, maximum])
def test_two_operands(op):
    for _ in range(20):
        x, y = random.randint(-50, 50), random.choice([-7, -1, 1, 3, 40])
        assert value(op(X, Y), x, y) == op(x, y)
        assert value(op(X, y), x, 0) == op(x, y)
        assert value(op(x, Y), 0, y) == op(x, y)


def test_shifts_signs_and_bits():
    x = random.randint(1, 1000)
    assert value(X >> 3, x, 0) == x >> 3 and value(X << 3, x, 0) == x << 3
    assert value(x >> Y, 0, 2) == x >> 2
    assert value(-X, x, 0) == -x and value(~X, x, 0) == ~x
    assert value((-X).sign(), x, 0) == -1
    assert value(X & 12, x, 0) == x & 12 and value(12 | X, x, 0) == x | 12
    assert value(X ^ Y, x, 77) == x ^ 77


def test_truth_values_and_choices():
    for x, y in ((1, 2), (2, 1), (1, 1)):
        assert value((X < Y) | (X == Y), x, y) == (x <= y)
        assert value(negate(X < Y), x, y) == (x >= y)
        assert value(choose(X < Y, 5, Y), x, y) == (5 if x < y else y)
        assert value(chosen(X < Y, True, X == Y), x, y) == (x <= y)
    assert value(to_real(X) * 0.5, 3, 0) == 1.5


def test_points_are_known_by_their_node():
    assert point(X + 1).is_point and not is_number(X) and is_number(3)
    assert (X + 1).node is (X + 1).node


def test_refusals():
    with pytest.raises(NoSymbolError, match="64 bits"):
        X + (1 << 63)
    with pytest.raises(NoSymbolError, match="branch"):
        bool(X < Y)
