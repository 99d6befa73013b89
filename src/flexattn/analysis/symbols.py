"""Bounds that are nodes of a graph: the interval rules, run on them, write the interval form.

In: arithmetic of `Symbol`s and Python numbers, as `analysis.bounds` does it on tensors. Out: nodes
of int64, float64 or bool. Rejects (NoSymbolError) integers beyond 64 bits, and branches.
"""

from __future__ import annotations

from typing import Any

import torch

from flexattn.ir.graph import Node, cast, const, node
from flexattn.ir.ops import COMPARISON, Op


class NoSymbolError(Exception):
    """The interval form needs more than the graph's operations on indices."""


class Symbol:
    """A value that is known when kernels run."""

    __slots__ = ("node",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, n: Node) -> None:
        self.node = n

    def __bool__(self) -> bool:
        raise NoSymbolError("a branch on a value that is not known yet")

    def __add__(self, other: Any) -> Symbol:
        return apply(Op.ADD, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Symbol:
        return apply(Op.SUB, self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return apply(Op.SUB, other, self)

    def __mul__(self, other: Any) -> Symbol:
        return apply(Op.MUL, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Symbol:
        return apply(Op.FLOORDIV, self, other)

    def __rfloordiv__(self, other: Any) -> Symbol:
        return apply(Op.FLOORDIV, other, self)

    def __mod__(self, other: Any) -> Symbol:
        return apply(Op.MOD, self, other)

    def __rmod__(self, other: Any) -> Symbol:
        return apply(Op.MOD, other, self)

    def __rshift__(self, other: Any) -> Symbol:
        return apply(Op.SHR, self, other)

    def __rrshift__(self, other: Any) -> Symbol:
        return apply(Op.SHR, other, self)

    def __lshift__(self, other: Any) -> Symbol:
        return apply(Op.SHL, self, other)

    def __neg__(self) -> Symbol:
        return Symbol(node(Op.NEG, self.node, dtype=self.node.dtype))

    def __invert__(self) -> Symbol:
        return Symbol(node(Op.NOT, self.node, dtype=self.node.dtype))

    def __and__(self, other: Any) -> Symbol:
        return apply(Op.AND, self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Symbol:
        return apply(Op.OR, self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Symbol:
        return apply(Op.XOR, self, other)

    __rxor__ = __xor__

    def __lt__(self, other: Any) -> Symbol:
        return apply(Op.LT, self, other)

    def __le__(self, other: Any) -> Symbol:
        return apply(Op.LE, self, other)

    def __gt__(self, other: Any) -> Symbol:
        return apply(Op.LT, other, self)

    def __ge__(self, other: Any) -> Symbol:
        return apply(Op.LE, other, self)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return apply(Op.EQ, self, other)

    def __ne__(self, other: Any) -> Symbol:  # type: ignore[override]
        return apply(Op.NE, self, other)

    def __abs__(self) -> Symbol:
        return Symbol(node(Op.ABS, self.node, dtype=self.node.dtype))

    def sign(self) -> Symbol:
        return Symbol(node(Op.SIGN, self.node, dtype=self.node.dtype))

    def double(self) -> Symbol:
        return self._as(torch.float64)

    def long(self) -> Symbol:
        return self._as(torch.int64)

    def _as(self, dtype: torch.dtype) -> Symbol:
        return Symbol(cast(self.node, dtype))

    def trunc(self) -> Symbol:
        return self.through("trunc")

    def through(self, function: str) -> Symbol:
        """A function of floating point, by torch's name."""
        return Symbol(node(Op[function.upper()], self.node, dtype=self.node.dtype))

    def rounded(self, dtype: torch.dtype) -> Symbol:
        """To a value of a floating-point dtype."""
        return self._as(dtype).double()


def apply(op: Op, x: Any, y: Any) -> Symbol:
    """An operation of two bounds, at least one of them a symbol."""
    dtype = _common(x, y)
    if dtype is torch.bool and op not in (Op.AND, Op.OR, Op.XOR, Op.EQ, Op.NE):
        dtype = torch.int64
    result = torch.bool if op in COMPARISON else dtype
    return Symbol(node(op, lifted(x, dtype), lifted(y, dtype), dtype=result))


def chosen(condition: Symbol, x: Any, y: Any) -> Symbol:
    dtype = _common(x, y)
    return Symbol(node(Op.WHERE, condition.node, lifted(x, dtype), lifted(y, dtype), dtype=dtype))


def lifted(x: Any, dtype: torch.dtype) -> Node:
    """A bound as a node."""
    if isinstance(x, Symbol):
        return cast(x.node, dtype)
    if dtype is torch.int64 and not -(1 << 63) <= x < 1 << 63:
        raise NoSymbolError("an integer beyond 64 bits")
    return const(x, dtype)


def _common(x: Any, y: Any) -> torch.dtype:
    dtypes = {v.node.dtype if isinstance(v, Symbol) else
              {bool: torch.bool, int: torch.int64, float: torch.float64}[type(v)]
              for v in (x, y)}
    return next(d for d in (torch.float64, torch.int64, torch.bool) if d in dtypes)
