"""Intervals of a graph's nodes over tiles of (q_idx, kv_idx), for many tiles at once.

In: a graph, an Interval for each input, captured tensors, run-time numbers. Out: an Interval for
each node; the mask's says for each tile whether it is true nowhere, everywhere, or undecided.
Sound: floating point is widened to what its dtype may round to, integers that may leave their dtype
are taken to hold anything, NaN is tracked, reads out of range are clamped as in `ir.evaluate`.
Rejects nothing; what has no bound is unbounded.

A value known for the whole mask (`Ranges`) is a Python number. The rules are in `interval_rules`,
reads in `interval_reads`, cancellation of a variable with itself in `linear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexattn.analysis.bounds import (
    Bound,
    Interval,
    both,
    choose,
    integer_range,
    point,
    to_real,
    unbounded,
)
from flexattn.analysis.interval_reads import Reads, Span
from flexattn.analysis.interval_rules import TABLE
from flexattn.analysis.linear import LinearForms, Residuals
from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import INTEGERS, LEAVES, Op

_SHADOWED = frozenset({Op.ADD, Op.SUB, Op.MUL, Op.NEG, Op.ABS})
Values = dict[Node, Interval]


@dataclass(frozen=True)
class Tiles:
    """Tiles q x kv of the mask for batch entry b and head h: tensors that broadcast together, all
    of one rank, so that what depends on q alone is computed once for many kv. b and h are a
    position per tile, or one int for all."""

    b: Tensor | int
    h: Tensor | int
    q: Span
    kv: Span

    def inputs(self) -> dict[str, Interval]:
        return {"b": point(self.b), "h": point(self.h), "q_idx": self.q.interval,
                "kv_idx": self.kv.interval}

    def span(self, n: Node) -> Span | None:
        """The positions that n stands for, if it is one of them."""
        if n.op is not Op.INPUT:
            return None
        return self.q if n.attr == "q_idx" else self.kv if n.attr == "kv_idx" else None


@dataclass(frozen=True)
class Ranges:
    """What holds for every position: values of nodes in Python numbers, and the integer nodes
    that may leave their dtype."""

    values: Values
    wraps: frozenset[Node]

    def constant(self, n: Node) -> Interval | None:
        found = self.values.get(n)
        return found if found is not None and found.is_point else None


def overall_ranges(graph: Graph, bounds: Mapping[str, tuple[int, int]],
                   reads: Reads | None = None,
                   numbers: Sequence[bool | int | float | Interval] | None = None) -> Ranges:
    """Ranges for inputs within `bounds`, ends included. Inputs without bounds, numbers and captured
    tensors that are not given may be anything; a number may be given by its Interval."""
    values: Values = {}
    wraps: set[Node] = set()
    for n in graph.nodes:
        if n.op is Op.INPUT:
            values[n] = Interval(*bounds[n.attr]) if n.attr in bounds else unbounded(n.dtype)
        elif n.op in (Op.CONST, Op.NUMBER):
            values[n] = _number(n, numbers)
        elif n.op is Op.LOAD:
            values[n] = reads.whole(n.attr) if reads else unbounded(n.dtype)
        else:
            values[n] = TABLE[n.op](n, *(values[a] for a in n.args))
            if n.dtype in INTEGERS and not _fits(values[n], n.dtype):
                values[n] = integer_range(n.dtype)
                wraps.add(n)
    return Ranges(values, frozenset(wraps))


def ranges(graph: Graph, bounds: Mapping[str, tuple[int, int]]) -> dict[Node, tuple[Bound, Bound]]:
    """(lowest, highest) value of each node for inputs within `bounds`, whatever the captured
    tensors and run-time numbers hold: what a lowering may narrow integers by.

    Floating-point nodes may also be NaN.

    Examples:
        >>> from flexattn.ir.graph import Graph, index_input, node
        >>> q, kv = index_input("q_idx"), index_input("kv_idx")
        >>> distance = node(Op.SUB, q, kv, dtype=torch.int64)
        >>> found = ranges(Graph((("distance", distance),)), {"q_idx": (0, 9), "kv_idx": (0, 4)})
        >>> found[distance]
        (-4, 9)
    """
    return {n: x[:2] for n, x in overall_ranges(graph, bounds).values.items()}


def _number(n: Node, numbers: Sequence[bool | int | float | Interval] | None) -> Interval:
    if n.op is Op.NUMBER and numbers is None:
        return unbounded(n.dtype)
    value = n.attr if n.op is Op.CONST or numbers is None else numbers[n.attr]
    if isinstance(value, Interval):
        return value
    return point(value) if value == value else unbounded(n.dtype)


def _fits(x: Interval, dtype: torch.dtype) -> bool:
    anything = integer_range(dtype)
    return bool(anything.lo <= x.lo and x.hi <= anything.hi)


class TileIntervals:
    """Evaluates one output of a graph on tiles. `lengths`: of b, h, q_idx and kv_idx; `base`: sizes
    in tokens (q, kv) that those of most tiles are multiples of."""

    def __init__(self, graph: Graph, captures: Sequence[Tensor],
                 numbers: Sequence[bool | int | float], lengths: Mapping[str, int],
                 base: tuple[int, int] = (1, 1), output: str = "mask") -> None:
        self.reads, self.base = Reads(captures), base
        bounds = {name: (0, max(n - 1, 0)) for name, n in lengths.items()}
        self._analyse(graph, overall_ranges(graph, bounds, self.reads, numbers), output)

    def _analyse(self, graph: Graph, overall: Ranges, output: str = "mask") -> None:
        self.graph, self.output, self.overall = graph, graph.output(output), overall
        self.linear = LinearForms(graph, overall.values, overall.wraps)
        self.order = self._needed()

    def _needed(self) -> list[Node]:
        """What the output needs, without what is the same everywhere."""
        needed: set[Node] = set()
        stack = [self.output]
        while stack:
            n = stack.pop()
            if n not in needed:
                needed.add(n)
                stack += () if self.overall.constant(n) else n.args
        return [n for n in self.graph.nodes if n in needed]

    def __call__(self, tiles: Tiles) -> Interval:
        """The output over each tile: for a mask, (always true, true somewhere perhaps)."""
        return self.values(tiles)[self.output]

    def values(self, tiles: Tiles) -> Values:
        """The interval of every node that the output needs."""
        inputs = tiles.inputs()
        values: Values = {}
        residuals = Residuals(self.linear, inputs, values)
        for n in self.order:
            known = self.overall.constant(n)
            if known is not None:
                values[n] = known
            elif n.op is Op.INPUT:
                values[n] = inputs[n.attr]
            elif n.op is Op.LOAD:
                values[n] = self._read(n, [values[a] for a in n.args], tiles)
            elif n.op in LEAVES:
                values[n] = self._number(n)
            else:
                found = self._apply(n, [values[a] for a in n.args])
                values[n] = residuals.sharpened(n, found) if n in self.linear.shared else found
        return values

    def _number(self, n: Node) -> Interval:
        return self.overall.values[n]

    def _read(self, n: Node, args: list[Interval], tiles: Tiles) -> Interval:
        ranged = [d for d, x in enumerate(args) if not x.is_point]
        span = tiles.span(n.args[ranged[0]]) if len(ranged) == 1 else None
        if span is not None and span.number is not None:
            base = self.base[0] if span is tiles.q else self.base[1]
            return self.reads.consecutive(n.attr, args, ranged[0], span, base)
        return self.reads.interval(n.attr, args)

    def _apply(self, n: Node, args: Sequence[Interval]) -> Interval:
        if n.op is Op.POW and n.dtype in INTEGERS:  # which may wrap for some tiles
            return self.overall.values[n]
        found = TABLE[n.op](n, *args)
        if n not in self.overall.wraps:
            return found
        anything = integer_range(n.dtype)
        if n.op is Op.CAST:
            real = found
        elif n.op in _SHADOWED:
            real = TABLE[n.op](n, *(Interval(to_real(a.lo), to_real(a.hi)) for a in args))
        else:
            return anything
        slack = 2**-40 if n.dtype is torch.int64 and n.op is not Op.CAST else 0.0
        fits = both(real.lo >= anything.lo * (1 - slack), real.hi <= anything.hi * (1 - slack))
        return Interval(choose(fits, found.lo, anything.lo), choose(fits, found.hi, anything.hi))
