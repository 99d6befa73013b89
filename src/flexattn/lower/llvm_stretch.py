"""Masks that attend one stretch of keys in each row: causal masks, windows, their conjunctions.

In: the graph of a mask. Out: a `Stretch`, inequalities between kv_idx and scalars of the row,
which emits the ends of a row's stretch. Rejects, with None, what is no conjunction of those, and
masks that read a captured tensor at an index: its range counts only where attended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexattn.ir.graph import Graph, Node, node
from flexattn.ir.ops import Op
from flexattn.lower.integer_ranges import Range
from flexattn.lower.llvm_lanes import Value
from flexattn.lower.llvm_levels import ROW, Levels

_FAR = 2**62  # beyond any index; sides within it do not wrap


@dataclass(frozen=True)
class Bound:
    """coefficient * kv_idx + x <= y (< where strict); x and y are scalars of the row."""

    coefficient: int
    x: Node
    y: Node
    strict: bool


@dataclass(frozen=True)
class Stretch:
    """Keys within all bounds, of rows that fulfil all conditions (a node, and what it must be)."""

    bounds: tuple[Bound, ...]
    conditions: tuple[tuple[Node, bool], ...]

    def ends(self, e: Any, scalar: Callable[[Node], Value],
             truth: Callable[[Node], Value]) -> tuple[Value, Value]:
        """The first key, and the one after the last, as i64 from 0 on; the first is not before
        the other in rows that attend to nothing. scalar and truth give the value of a node."""
        low, high = e.const("i64", 0), e.const("i64", _FAR)
        nothing, one = e.const("i64", 0), e.const("i64", 1)
        for bound in self.bounds:
            x, y = scalar(bound.x), scalar(bound.y)
            if bound.coefficient == 0:
                holds = e.compare("slt" if bound.strict else "sle", x, y)
                high = e.select(holds, high, nothing)
            elif bound.coefficient > 0:
                last = e.intrinsic("ssub.sat.i64", "i64", y, x)
                end = last if bound.strict else e.intrinsic("sadd.sat.i64", "i64", last, one)
                high = e.min(high, end)
            else:
                first = e.intrinsic("ssub.sat.i64", "i64", x, y)
                first = e.intrinsic("sadd.sat.i64", "i64", first, one) if bound.strict else first
                low = e.max(low, first)
        for condition, wanted in self.conditions:
            yes, no = (high, nothing) if wanted else (nothing, high)
            high = e.select(truth(condition), yes, no)
        return low, e.max(high, nothing)


def find_stretch(graph: Graph, levels: Levels, ranges: Mapping[Node, Range]) -> Stretch | None:
    """The stretch of a graph whose only output is a mask."""
    name, mask = graph.outputs[0]
    if name != "mask" or any(n.op is Op.LOAD and n.args for n in graph.nodes):
        return None
    terms: list[tuple[Node, bool]] = []
    bounds: list[Bound] = []
    pending = [(mask, True)]
    while pending:
        n, wanted = pending.pop()
        if n.is_const or levels.level(n) is ROW:
            terms.append((n, wanted))
        elif n.op is Op.NOT:
            pending.append((n.args[0], not wanted))
        elif n.op is (Op.AND if wanted else Op.OR):
            pending += [(arg, wanted) for arg in n.args]
        else:
            found = _bounds(n, wanted, levels, ranges)
            if found is None:
                return None
            bounds += found
    return Stretch(tuple(bounds), tuple(terms))


def _bounds(n: Node, wanted: bool, levels: Levels,
            ranges: Mapping[Node, Range]) -> list[Bound] | None:
    """A comparison of int64, or its contrary."""
    if n.op not in (Op.LT, Op.LE) or n.args[0].dtype is not torch.int64:
        return None
    x, y = n.args if wanted else n.args[::-1]
    strict = (n.op is Op.LT) is wanted
    sides = [(x, y)]
    if x.op is Op.ABS:  # |a| <= y is a <= y and -a <= y
        x = x.args[0]
        sides = [(x, y), (node(Op.NEG, x, dtype=x.dtype), y)]
    coefficients = [levels.affine(side) for side in (x, y)]
    for side, c in zip((x, y), coefficients, strict=True):
        low, high = ranges.get(side, (-_FAR, _FAR))
        if c is None or (c and (low <= -_FAR or high >= _FAR)):
            return None
    bounds = []
    for a, b in sides:
        c = _coefficient(levels, a) - _coefficient(levels, b)
        if abs(c) > 1:
            return None
        bounds.append(Bound(c, levels.at_column_0(a), levels.at_column_0(b), strict))
    return bounds


def _coefficient(levels: Levels, n: Node) -> int:
    c = levels.affine(n)
    assert c is not None, n
    return c
