"""Simplify a graph without changing a bit of what it computes.

In: a graph. Out: one with constants folded, identities removed, no dead code (common
subexpressions are shared by construction). Floating-point rules hold for NaN, infinities and
signed zeros, or are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph, Node, cast, const, node
from flexattn.ir.ops import COMMUTATIVE, FLOATS, INTEGERS, LEAVES, Op

Rule = Callable[[Node], Node | None]


def simplify(graph: Graph) -> Graph:
    """The same outputs, computed with fewer operations."""
    done: dict[Node, Node] = {}
    for n in graph.nodes:
        if n.op in LEAVES and n.op is not Op.LOAD:
            done[n] = n
            continue
        args = tuple(done[a] for a in n.args)
        if _may_swap(n) and args[0].is_const and not args[1].is_const:
            args = (args[1], args[0])
        done[n] = _reduce(node(n.op, *args, dtype=n.dtype, attr=n.attr))
    return graph.replace_outputs(*((name, done[n]) for name, n in graph.outputs))


def _may_swap(n: Node) -> bool:
    """MIN and MAX take the sign of a zero from one side."""
    return n.op in COMMUTATIVE and not (n.op in (Op.MIN, Op.MAX) and n.dtype in FLOATS)


def _reduce(n: Node) -> Node:
    if n.op is not Op.LOAD and n.args and all(a.is_const for a in n.args):
        return _fold(n)
    rule = RULES.get(n.op)
    return (rule(n) if rule else None) or n


def _fold(n: Node) -> Node:
    value = evaluate(Graph((("value", n),)), {})["value"]
    return const(value.item(), n.dtype)


def _is(n: Node, value: float) -> bool:
    return n.is_const and n.attr == value


def _log2(n: Node) -> int | None:
    """k where n is the integer constant 2^k."""
    if n.is_const and n.dtype in INTEGERS and n.attr > 0 and n.attr & (n.attr - 1) == 0:
        return n.attr.bit_length() - 1
    return None


def _add(n: Node) -> Node | None:
    x, y = n.args
    return x if n.dtype in INTEGERS and _is(y, 0) else None


def _sub(n: Node) -> Node | None:
    x, y = n.args
    if n.dtype in INTEGERS and x is y:
        return const(0, n.dtype)
    if _is(y, 0) and (n.dtype in INTEGERS or str(y.attr) == "0.0"):
        return x
    return None


def _mul(n: Node) -> Node | None:
    x, y = n.args
    if _is(y, 1):
        return x
    if n.dtype in INTEGERS and _is(y, 0):
        return y
    return None


def _div(n: Node) -> Node | None:
    x, y = n.args
    if _is(y, 1):
        return x
    if n.dtype in (torch.float32, torch.float64) and y.is_const and _is_power_of_two(y.attr):
        return node(Op.MUL, x, const(1.0 / y.attr, n.dtype), dtype=n.dtype)
    return None


def _is_power_of_two(value: float) -> bool:
    if not math.isfinite(value):
        return False
    mantissa, exponent = math.frexp(abs(value))
    return mantissa == 0.5 and abs(exponent) < 126


def _floordiv(n: Node) -> Node | None:
    x, y = n.args
    if n.dtype not in INTEGERS:
        return None
    if _is(y, 1):
        return x
    k = _log2(y)
    return None if k is None else node(Op.SHR, x, const(k, n.dtype), dtype=n.dtype)


def _mod(n: Node) -> Node | None:
    x, y = n.args
    k = _log2(y)
    return None if k is None else node(Op.AND, x, const((1 << k) - 1, n.dtype), dtype=n.dtype)


def _pow(n: Node) -> Node | None:
    """The powers that torch computes without pow, where the exponent is a number."""
    x, y = n.args
    if _is(y, 1):
        return x
    if _is(y, 2):
        return node(Op.MUL, x, x, dtype=n.dtype)
    if n.dtype not in FLOATS - {torch.float16} or not y.is_const:
        return None
    if y.attr == 0.5:
        return node(Op.SQRT, x, dtype=n.dtype)
    if y.attr == -0.5:
        return node(Op.RSQRT, x, dtype=n.dtype)
    if y.attr == 3:
        return node(Op.MUL, node(Op.MUL, x, x, dtype=n.dtype), x, dtype=n.dtype)
    if y.attr in (-1, -2):
        square = x if y.attr == -1 else node(Op.MUL, x, x, dtype=n.dtype)
        return node(Op.DIV, const(1.0, n.dtype), square, dtype=n.dtype)
    return None


def _min_max(n: Node) -> Node | None:
    return n.args[0] if n.args[0] is n.args[1] else None


def _and(n: Node) -> Node | None:
    x, y = n.args
    if x is y:
        return x
    if n.dtype is torch.bool and y.is_const:
        return x if y.attr else y
    return y if _is(y, 0) else None


def _or(n: Node) -> Node | None:
    x, y = n.args
    if x is y:
        return x
    if n.dtype is torch.bool and y.is_const:
        return y if y.attr else x
    return x if _is(y, 0) else None


def _not(n: Node) -> Node | None:
    inner = n.args[0]
    return inner.args[0] if inner.op is Op.NOT else None


def _neg(n: Node) -> Node | None:
    inner = n.args[0]
    return inner.args[0] if inner.op is Op.NEG else None


def _cast(n: Node) -> Node | None:
    """A cast to its own type, or two casts of which the first loses nothing."""
    inner = n.args[0]
    if inner.dtype is n.dtype:
        return inner
    exact = ((torch.int32, torch.int64), (torch.float32, torch.float64),
             (torch.bfloat16, torch.float32), (torch.float16, torch.float32))
    if inner.op is Op.CAST and (inner.args[0].dtype, inner.dtype) in exact:
        return cast(inner.args[0], n.dtype)
    return None


def _where(n: Node) -> Node | None:
    condition, x, y = n.args
    if x is y:
        return x
    if condition.is_const:
        return x if condition.attr else y
    if condition.op is Op.NOT:
        return node(Op.WHERE, condition.args[0], y, x, dtype=n.dtype)
    return None


def _compare_self(value: bool) -> Rule:
    def rule(n: Node) -> Node | None:
        same = n.args[0] is n.args[1] and n.args[0].dtype not in FLOATS
        return const(value, torch.bool) if same else None

    return rule


RULES: dict[Op, Rule] = {
    Op.CAST: _cast,
    Op.NEG: _neg,
    Op.NOT: _not,
    Op.ADD: _add,
    Op.SUB: _sub,
    Op.MUL: _mul,
    Op.DIV: _div,
    Op.FLOORDIV: _floordiv,
    Op.MOD: _mod,
    Op.POW: _pow,
    Op.MIN: _min_max,
    Op.MAX: _min_max,
    Op.AND: _and,
    Op.OR: _or,
    Op.LT: _compare_self(False),
    Op.LE: _compare_self(True),
    Op.EQ: _compare_self(True),
    Op.NE: _compare_self(False),
    Op.WHERE: _where,
}
