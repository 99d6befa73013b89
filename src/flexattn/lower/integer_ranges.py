"""Bounds of the integer nodes of a graph, to compute int64 in 32-bit lanes where it is the same.

In: nodes in topological order and a bound of b, h, q_idx and kv_idx. Out: for every integer node
(low, high), both included. Rejects nothing; what is unknown has its dtype's range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from flexattn.ir.graph import Node
from flexattn.ir.ops import INTEGERS, Op

Range = tuple[int, int]


def full_range(dtype: torch.dtype) -> Range:
    info = torch.iinfo(dtype)
    return info.min, info.max


def integer_ranges(nodes: Iterable[Node], index_bound: int,
                   known: Mapping[Node, Range] | None = None) -> dict[Node, Range]:
    """Ranges for 0 <= b, h, q_idx, kv_idx < index_bound, but for the leaves in `known`."""
    found: dict[Node, Range] = dict(known or {})
    for n in nodes:
        if n.dtype in INTEGERS and n not in found:
            low, high = _range(n, found, index_bound)
            least, most = full_range(n.dtype)
            found[n] = (low, high) if least <= low and high <= most else (least, most)
    return found


def _range(n: Node, found: Mapping[Node, Range], index_bound: int) -> Range:
    if n.op is Op.INPUT:
        return 0, index_bound - 1
    if n.op is Op.CONST:
        return n.attr, n.attr
    if n.op is Op.CAST and n.args[0].dtype is torch.bool:
        return 0, 1
    rule = _RULES.get(n.op)
    known = [found.get(a) for a in n.args if a.dtype is not torch.bool]
    if rule is None or None in known:
        return full_range(n.dtype)
    return rule(*known) or full_range(n.dtype)


def _corners(op: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    def rule(x: Range, y: Range) -> Range:
        ends = [op(i, j) for i in x for j in y]
        return min(ends), max(ends)

    return rule


def _floor_divide(x: Range, y: Range) -> Range | None:
    return _corners(lambda i, j: i // j)(x, y) if y[0] > 0 else None


def _modulo(x: Range, y: Range) -> Range | None:
    if y[0] <= 0:
        return None
    return 0, min(y[1] - 1, x[1]) if x[0] >= 0 else y[1] - 1


def _absolute(x: Range) -> Range:
    ends = abs(x[0]), abs(x[1])
    return 0 if x[0] <= 0 <= x[1] else min(ends), max(ends)


def _hull(x: Range, y: Range) -> Range:
    return min(x[0], y[0]), max(x[1], y[1])


def _and(x: Range, y: Range) -> Range | None:
    tops = [r[1] for r in (x, y) if r[0] >= 0]
    return (0, min(tops)) if tops else None


def _or(x: Range, y: Range) -> Range | None:
    if min(x[0], y[0]) < 0:
        return None
    return 0, (1 << max(x[1], y[1]).bit_length()) - 1


def _shift(op: Callable[[int, int], int]) -> Callable[[Range, Range], Range | None]:
    def rule(x: Range, y: Range) -> Range | None:
        return _corners(op)(x, y) if y[0] >= 0 and y[1] < 31 else None

    return rule


_RULES: dict[Op, Callable[..., Range | None]] = {
    Op.CAST: lambda x: x,
    Op.NEG: lambda x: (-x[1], -x[0]),
    Op.NOT: lambda x: (~x[1], ~x[0]),
    Op.ABS: _absolute,
    Op.SIGN: lambda x: (-1, 1),
    Op.ADD: _corners(lambda i, j: i + j),
    Op.SUB: _corners(lambda i, j: i - j),
    Op.MUL: _corners(lambda i, j: i * j),
    Op.MIN: lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    Op.MAX: lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    Op.FLOORDIV: _floor_divide,
    Op.MOD: _modulo,
    Op.AND: _and,
    Op.OR: _or,
    Op.XOR: _or,
    Op.SHL: _shift(lambda i, j: i << j),
    Op.SHR: _shift(lambda i, j: i >> j),
    Op.WHERE: _hull,
}
