"""Linear forms: a variable that meets itself cancels, as in `q_idx - q_idx % 64`.

An integer node is a * q_idx + c * kv_idx + residual, with constants a and c and a residual that has
an interval over each tile. Plain intervals lose that two operands move together; the linear forms
of both, combined, do not. In: a graph, and the overall ranges of its nodes. Out: which nodes gain
(`LinearForms.shared`), and their sharper intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from flexattn.analysis.bounds import Bound, Interval, both, either, maximum, minimum, negate, point
from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import INTEGERS, Op

VARIABLES = ("q_idx", "kv_idx")
_LARGEST = 1 << 58  # of a value that takes part: sums of three stay below 2^63
_STEEPEST = 1 << 20  # of a factor
_COMPARED = frozenset({Op.LT, Op.LE, Op.EQ, Op.NE})
_ZERO = (0, 0)

Slope = tuple[int, int]


class LinearForms:
    """slope: (factor of q_idx, factor of kv_idx) of the integer nodes that have one."""

    def __init__(self, graph: Graph, overall: Mapping[Node, Interval], wraps: Set[Node]) -> None:
        self.overall, self.wraps = overall, wraps
        self.slope: dict[Node, Slope] = {}
        for n in graph.nodes:
            varies = n.dtype in INTEGERS and self._moderate(n) and self.constant(n) is None
            found = self._slope(n) if varies else _ZERO
            if found != _ZERO and max(map(abs, found)) <= _STEEPEST:
                self.slope[n] = found
        self.shared = frozenset(n for n in graph.nodes if self._cancels(n))

    def _moderate(self, n: Node) -> bool:
        x = self.overall[n]
        return n not in self.wraps and x.lo >= -_LARGEST and x.hi <= _LARGEST

    def constant(self, n: Node) -> int | None:
        x = self.overall[n]
        return int(x.lo) if x.is_point else None

    def period(self, n: Node) -> int | None:
        """c where n is x mod c, for a positive constant c."""
        if n.op not in (Op.MOD, Op.AND) or n.dtype not in INTEGERS:
            return None
        c = self.constant(n.args[1])
        if c is None or c <= 0:
            return None
        if n.op is Op.MOD:
            return c
        return c + 1 if c & (c + 1) == 0 else None

    def factor(self, n: Node) -> int | None:
        """c where n is x * c or x << log2(c)."""
        c = self.constant(n.args[1]) if n.op in (Op.MUL, Op.SHL) else None
        return 1 << c if c is not None and n.op is Op.SHL and 0 <= c < 63 else c

    def _slope(self, n: Node) -> Slope:
        if n.op is Op.INPUT:
            return tuple(int(n.attr == name) for name in VARIABLES)  # type: ignore[return-value]
        slopes = [self.slope.get(a, _ZERO) for a in n.args]
        if n.op is Op.ADD:
            return slopes[0][0] + slopes[1][0], slopes[0][1] + slopes[1][1]
        if n.op is Op.SUB:
            return slopes[0][0] - slopes[1][0], slopes[0][1] - slopes[1][1]
        if n.op is Op.NEG:
            return -slopes[0][0], -slopes[0][1]
        if n.op in (Op.MUL, Op.SHL):
            c = self.factor(n)
            return _ZERO if c is None else (slopes[0][0] * c, slopes[0][1] * c)
        return slopes[0] if self.period(n) is not None else _ZERO

    def _cancels(self, n: Node) -> bool:
        """Whether a variable occurs in both operands and (partly) cancels."""
        if n.op not in _COMPARED | {Op.ADD, Op.SUB} or n in self.wraps:
            return False
        x, y = (self.slope.get(a, _ZERO) for a in n.args)
        sign = -1 if n.op is Op.ADD else 1
        return all(map(self._moderate, n.args)) and any(
            i * j * sign > 0 for i, j in zip(x, y, strict=True))


class Residuals:
    """Intervals of residuals over tiles. `values` holds those of a node's arguments and is filled
    by the caller, in topological order."""

    def __init__(self, forms: LinearForms, inputs: Mapping[str, Interval],
                 values: Mapping[Node, Interval]) -> None:
        self.forms, self.inputs, self.values = forms, inputs, values
        self._known: dict[Node, Interval] = {}

    def sharpened(self, n: Node, found: Interval) -> Interval:
        """`found`, narrowed by the linear forms of n's arguments."""
        x, y = (self._residual(a) for a in n.args)
        slopes = [self.forms.slope.get(a, _ZERO) for a in n.args]
        if n.op is Op.ADD:
            y = Interval(-y.hi, -y.lo)
            slopes[1] = (-slopes[1][0], -slopes[1][1])
        lo, hi = x.lo - y.hi, x.hi - y.lo
        for name, i, j in zip(VARIABLES, *slopes, strict=True):
            lo, hi = _plus(lo, hi, i - j, self.inputs[name])
        if n.op in (Op.ADD, Op.SUB):
            return Interval(maximum(found.lo, lo), minimum(found.hi, hi))
        return _compared(n.op, found, lo, hi)

    def _residual(self, n: Node) -> Interval:
        """n - slope * (q_idx, kv_idx)."""
        if n not in self.forms.slope:
            return self.values[n]
        if n not in self._known:
            self._known[n] = self._compute(n)
        return self._known[n]

    def _compute(self, n: Node) -> Interval:
        if n.op is Op.INPUT:
            return point(0)
        if n.op in (Op.ADD, Op.SUB):
            x, y = (self._residual(a) for a in n.args)
            return Interval(x.lo + y.lo, x.hi + y.hi) if n.op is Op.ADD else Interval(
                x.lo - y.hi, x.hi - y.lo)
        x = self._residual(n.args[0])
        period, factor = self.forms.period(n), self.forms.factor(n)
        if period is not None:
            inner = self.values[n.args[0]]
            return Interval(x.lo - inner.hi // period * period, x.hi - inner.lo // period * period)
        if n.op is Op.NEG or (factor is not None and factor < 0):
            factor = factor or -1
            return Interval(x.hi * factor, x.lo * factor)
        return Interval(x.lo * factor, x.hi * factor)


def _plus(lo: Bound, hi: Bound, factor: int, variable: Interval) -> tuple[Bound, Bound]:
    if factor == 0:
        return lo, hi
    ends = (variable.lo, variable.hi) if factor > 0 else (variable.hi, variable.lo)
    return lo + ends[0] * factor, hi + ends[1] * factor


def _compared(op: Op, found: Interval, lo: Bound, hi: Bound) -> Interval:
    """`found`, and what the difference of the operands in [lo, hi] says."""
    if op is Op.LT:
        return Interval(either(found.lo, hi < 0), both(found.hi, lo < 0))
    if op is Op.LE:
        return Interval(either(found.lo, hi <= 0), both(found.hi, lo <= 0))
    equal, perhaps = both(lo == 0, hi == 0), both(lo <= 0, hi >= 0)
    if op is Op.EQ:
        return Interval(either(found.lo, equal), both(found.hi, perhaps))
    return Interval(either(found.lo, negate(perhaps)), both(found.hi, negate(equal)))
