"""The gradient of a score mod, as a graph.

In: the graph of a score mod. Out: a `Gradient`: a graph of the same inputs and `grad` (the
cotangent of the mod's result) with outputs `d_score` and one `d_load<i>` for each read of a
captured tensor that requires grad. Reverse mode over the nodes with one rule per Op, as torch
defines the derivative (0 at kinks of floor and sign; half to each of equal minimum operands,
all to the value that is clamped).
Cotangents are float32, or float64 for float64 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexattn.ir.graph import Graph, Node, cast, const, node
from flexattn.ir.ops import CLAMP, FLOATS, Op
from flexattn.ir.simplify import simplify


@dataclass(frozen=True)
class Gradient:
    """`loads[i]` is the read that output `d_load<i>` belongs to: add it to the gradient of
    capture `loads[i].attr` at index `loads[i].args`."""

    graph: Graph
    loads: tuple[Node, ...]


def gradient(graph: Graph) -> Gradient:
    """d score and d captures of a score mod's graph."""
    result = graph.output("score")
    reached = _depends_on_gradient(graph)
    seed = node(Op.INPUT, dtype=_cotangent_dtype(result), attr="grad")
    totals: dict[Node, Node] = {result: seed}
    for n in reversed(graph.nodes):
        total = totals.get(n)
        if total is None or n not in reached:
            continue
        for arg, part in zip(n.args, TABLE[n.op](n, total), strict=True):
            if part is not None and arg in reached:
                part = cast(part, _cotangent_dtype(arg))
                totals[arg] = _add(totals[arg], part) if arg in totals else part
    score = node(Op.INPUT, dtype=result.dtype, attr="score")
    loads = tuple(n for n in graph.nodes if n.op is Op.LOAD and n in totals)
    zero = const(0.0, _cotangent_dtype(score))
    outputs = [("d_score", totals.get(score, zero))]
    outputs += [(f"d_load{i}", totals[n]) for i, n in enumerate(loads)]
    # The indices of loads are simplified together with the rest, and found again as outputs.
    marks = [(f"{i}.{d}", a) for i, n in enumerate(loads) for d, a in enumerate(n.args)]
    simple = dict(simplify(graph.replace_outputs(*outputs, *marks)).outputs)
    loads = tuple(node(Op.LOAD, *(simple[f"{i}.{d}"] for d in range(len(n.args))), dtype=n.dtype,
                       attr=n.attr) for i, n in enumerate(loads))
    return Gradient(graph.replace_outputs(*((k, simple[k]) for k, _ in outputs)), loads)


def _depends_on_gradient(graph: Graph) -> set[Node]:
    """Float nodes between the result and the score or a captured tensor that requires grad."""
    reached: set[Node] = set()
    for n in graph.nodes:
        source = (n.op is Op.INPUT and n.attr == "score") or (
            n.op is Op.LOAD and graph.captures[n.attr].requires_grad)
        if n.dtype in FLOATS and (source or any(a in reached for a in n.args)):
            reached.add(n)
    return reached


def _cotangent_dtype(n: Node) -> torch.dtype:
    return torch.float64 if n.dtype is torch.float64 else torch.float32


def _op(op: Op, *args: Node) -> Node:
    return node(op, *args, dtype=args[-1].dtype)


def _add(x: Node, y: Node) -> Node:
    return _op(Op.ADD, x, y)


def _mul(g: Node, factor: Node) -> Node:
    return _op(Op.MUL, g, cast(factor, g.dtype))


def _scale(g: Node, factor: float) -> Node:
    return _op(Op.MUL, g, const(factor, g.dtype))


def _one_minus(x: Node) -> Node:
    return _op(Op.SUB, const(1.0, x.dtype), x)


def _less(x: Node, y: Node) -> Node:
    return node(Op.LT, x, y, dtype=torch.bool)


def _equal(x: Node, y: Node) -> Node:
    return node(Op.EQ, x, y, dtype=torch.bool)


def _zero(g: Node) -> Node:
    return const(0.0, g.dtype)


def _where(condition: Node, x: Node, y: Node) -> Node:
    return _op(Op.WHERE, condition, x, y)


def _wide(n: Node, g: Node) -> Node:
    """A value of the mod in the cotangent's type."""
    return cast(n, g.dtype)


Rule = Callable[[Node, Node], tuple[Node | None, ...]]


def _unary(factor: Callable[[Node, Node], Node]) -> Rule:
    """d x = g * factor(x, result), both in the cotangent's type."""
    return lambda n, g: (_op(Op.MUL, g, factor(_wide(n.args[0], g), _wide(n, g))),)


def _nothing(n: Node, g: Node) -> tuple[None, ...]:
    """Piecewise constant, or not differentiable."""
    return (None,) * len(n.args)


def _divide(n: Node, g: Node) -> tuple[Node, Node]:
    y = _wide(n.args[1], g)
    dx = _op(Op.DIV, g, y)
    return dx, _op(Op.NEG, _op(Op.MUL, dx, _wide(n, g)))


def _mod(n: Node, g: Node) -> tuple[Node, Node]:
    """x mod y = x - floor(x / y) * y."""
    x, y = (_wide(a, g) for a in n.args)
    return g, _op(Op.NEG, _op(Op.MUL, g, _op(Op.FLOOR, _op(Op.DIV, x, y))))


def _pow(n: Node, g: Node) -> tuple[Node, Node]:
    x, y = (_wide(a, g) for a in n.args)
    one_less = _op(Op.POW, x, _op(Op.SUB, y, const(1.0, y.dtype)))
    dx = _where(_equal(y, _zero(y)), _zero(g), _op(Op.MUL, g, _op(Op.MUL, y, one_less)))
    log = _op(Op.MUL, _wide(n, g), _op(Op.LOG, x))
    at_zero = node(Op.AND, _equal(x, _zero(x)), node(Op.LE, _zero(y), y, dtype=torch.bool),
                   dtype=torch.bool)
    return dx, _where(at_zero, _zero(g), _op(Op.MUL, g, log))


def _extremum(n: Node, g: Node) -> tuple[Node, Node]:
    """To the operand chosen; half to each where they are equal, all to the first in a clamp."""
    x, y = n.args
    if n.attr == CLAMP:
        low, high = (x, y) if n.op is Op.MIN else (y, x)
        inside = node(Op.LE, low, high, dtype=torch.bool)
        return _where(inside, g, _zero(g)), _where(_less(high, low), g, _zero(g))
    half = _scale(g, 0.5)
    first = _less(x, y) if n.op is Op.MIN else _less(y, x)
    second = _less(y, x) if n.op is Op.MIN else _less(x, y)
    dx = _where(first, g, _where(_equal(x, y), half, _zero(g)))
    dy = _where(second, g, _where(_equal(x, y), half, _zero(g)))
    return dx, dy


def _inverse(x: Node) -> Node:
    return _op(Op.DIV, const(1.0, x.dtype), x)


def _erf_slope(x: Node, _: Node) -> Node:
    bell = _op(Op.EXP, _op(Op.NEG, _op(Op.MUL, x, x)))
    return _scale(bell, 2.0 / math.sqrt(math.pi))


TABLE: dict[Op, Rule] = {
    Op.INPUT: _nothing,
    Op.NUMBER: _nothing,
    Op.CONST: _nothing,
    Op.LOAD: _nothing,  # the cotangent of a read is an output
    Op.CAST: lambda n, g: (g,),
    Op.SQRT: _unary(lambda x, r: _inverse(_scale(r, 2.0))),
    Op.RSQRT: _unary(lambda x, r: _scale(_op(Op.MUL, r, _op(Op.MUL, r, r)), -0.5)),
    Op.EXP: _unary(lambda x, r: r),
    Op.EXP2: _unary(lambda x, r: _scale(r, math.log(2.0))),
    Op.EXPM1: _unary(lambda x, r: _add(r, const(1.0, r.dtype))),
    Op.LOG: _unary(lambda x, r: _inverse(x)),
    Op.LOG2: _unary(lambda x, r: _inverse(_scale(x, math.log(2.0)))),
    Op.LOG1P: _unary(lambda x, r: _inverse(_add(x, const(1.0, x.dtype)))),
    Op.SIN: _unary(lambda x, r: _op(Op.COS, x)),
    Op.COS: _unary(lambda x, r: _op(Op.NEG, _op(Op.SIN, x))),
    Op.TANH: _unary(lambda x, r: _one_minus(_op(Op.MUL, r, r))),
    Op.SIGMOID: _unary(lambda x, r: _op(Op.MUL, r, _one_minus(r))),
    Op.ERF: _unary(_erf_slope),
    Op.FLOOR: _nothing,
    Op.CEIL: _nothing,
    Op.TRUNC: _nothing,
    Op.ROUND: _nothing,
    Op.NEG: lambda n, g: (_op(Op.NEG, g),),
    Op.ABS: _unary(lambda x, r: _op(Op.SIGN, x)),
    Op.SIGN: _nothing,
    Op.NOT: _nothing,
    Op.ADD: lambda n, g: (g, g),
    Op.SUB: lambda n, g: (g, _op(Op.NEG, g)),
    Op.MUL: lambda n, g: (_mul(g, n.args[1]), _mul(g, n.args[0])),
    Op.DIV: _divide,
    Op.FLOORDIV: _nothing,
    Op.MOD: _mod,
    Op.POW: _pow,
    Op.MIN: _extremum,
    Op.MAX: _extremum,
    Op.AND: _nothing,
    Op.OR: _nothing,
    Op.XOR: _nothing,
    Op.SHL: _nothing,
    Op.SHR: _nothing,
    Op.LT: _nothing,
    Op.LE: _nothing,
    Op.EQ: _nothing,
    Op.NE: _nothing,
    Op.WHERE: lambda n, g: (None, _where(n.args[0], g, _zero(g)),
                            _where(n.args[0], _zero(g), g)),
}
