"""Rewrite integer arithmetic so that rows and columns are computed apart.

In: graphs and the ranges of their integer nodes. Out: equal graphs in which what depends on q_idx
and what depends on kv_idx meet as late as possible: `q - k <= W` becomes `q - W <= k` and
`float(q - k)` becomes `float(q) - float(k)`, so that kernels compute all but one operation once per
row or column. Rewrites only where ranges prove the same result bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from flexattn.ir.graph import Node, cast, const, node
from flexattn.ir.ops import INTEGERS, LEAVES, Op
from flexattn.lower.integer_ranges import Range, full_range

HEAD, ROWS, COLUMNS, TILE = 0, 1, 2, 3  # what a value depends on, as bits
_INPUT_LEVEL = {"q_idx": ROWS, "kv_idx": COLUMNS, "score": TILE, "grad": TILE}
_EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}  # integers below are exact


def levels(nodes: Iterable[Node]) -> dict[Node, int]:
    """HEAD (b, h and constants only), ROWS (also q_idx), COLUMNS (also kv_idx) or TILE."""
    found: dict[Node, int] = {}
    for n in nodes:
        level = _INPUT_LEVEL.get(n.attr, HEAD) if n.op is Op.INPUT else HEAD
        for a in n.args:
            level |= found[a]
        found[n] = level
    return found


@dataclass
class Separation:
    """Maps nodes to equal ones; `ranges` must know every integer node of the graphs."""

    ranges: Mapping[Node, Range]
    level: Mapping[Node, int]
    done: dict[Node, Node] = field(default_factory=dict)

    def __call__(self, nodes: Iterable[Node]) -> dict[Node, Node]:
        """Every node, arguments before users -> its equal."""
        for n in nodes:
            if n not in self.done:
                self.done[n] = self._rewrite(n)
        return self.done

    def _rewrite(self, n: Node) -> Node:
        if n.op in LEAVES and n.op is not Op.LOAD:
            return n
        if self.level[n] == TILE:
            if Op.LT <= n.op <= Op.NE and n.args[0].dtype in INTEGERS:
                found = self._comparison(n)
            elif n.op is Op.CAST and n.dtype in _EXACT and n.args[0].dtype in INTEGERS:
                found = self._pushed(n.args[0], n.dtype)
            elif n.dtype is torch.int64 and n.op in (Op.ADD, Op.SUB, Op.MUL, Op.NEG):
                found = self._sum(n)
            else:
                found = None
            if found is not None:
                return found
        return node(n.op, *(self.done[a] for a in n.args), dtype=n.dtype, attr=n.attr)

    def _comparison(self, n: Node) -> Node | None:
        """a < b as (rows of a - b) < -(columns of a - b), or with the two sides negated."""
        parts = None
        if any(self.level[a] == TILE for a in n.args):
            parts = self._parts(n.args, (1, -1))
        if parts is None:
            return None
        rows, columns = parts
        if all(factor < 0 for atom, factor in rows.items() if self.level[atom] == ROWS):
            left, right = columns, {atom: -factor for atom, factor in rows.items()}
        else:
            left, right = rows, {atom: -factor for atom, factor in columns.items()}
        return node(n.op, self._total(left), self._total(right), dtype=torch.bool)

    def _sum(self, n: Node) -> Node | None:
        """Rows and columns summed apart, then one addition or subtraction."""
        parts = self._parts((n,), (1,))
        if parts is None:
            return None
        for plus, minus in (parts, parts[::-1]):
            if all(factor < 0 for factor in minus.values()):
                negated = {atom: -factor for atom, factor in minus.items()}
                return node(Op.SUB, self._total(plus), self._total(negated), dtype=n.dtype)
        return node(Op.ADD, *map(self._total, parts), dtype=n.dtype)

    def _pushed(self, n: Node, dtype: torch.dtype) -> Node | None:
        """float(n) from floats of n's operands, where all of them are exact."""
        if max(map(abs, self.ranges[n])) > _EXACT[dtype]:
            return None
        if self.level[n] != TILE:
            return cast(self.done[n], dtype)
        if self.ranges[n] == full_range(n.dtype):  # it may wrap
            return None
        if n.op is Op.CAST and n.args[0].dtype in INTEGERS:
            return self._pushed(n.args[0], dtype)
        if n.op in (Op.ADD, Op.SUB, Op.MIN, Op.MAX, Op.ABS):
            args = [self._pushed(a, dtype) for a in n.args]
            return None if None in args else node(n.op, *args, dtype=dtype)  # type: ignore[arg-type]
        return None

    def _parts(self, nodes: Iterable[Node], factors: Iterable[int]
               ) -> tuple[dict[Node, int], dict[Node, int]] | None:
        """The weighted sum of `nodes` as sums over atoms: (rows, columns), both not empty."""
        terms: dict[Node, int] = {}
        for n, factor in zip(nodes, factors, strict=True):
            self._collect(n, factor, terms)
        if any(self.level[atom] == TILE for atom in terms):
            return None
        columns = {a: f for a, f in terms.items() if f and self.level[a] == COLUMNS}
        rows = {a: f for a, f in terms.items() if f and self.level[a] != COLUMNS}
        if not columns or all(self.level[a] == HEAD for a in rows):
            return None
        bound = sum(abs(f) * max(map(abs, self.ranges[a])) for a, f in terms.items())
        return (rows, columns) if bound < 1 << 62 else None

    def _collect(self, n: Node, factor: int, terms: dict[Node, int]) -> None:
        """Adds factor * n to `terms`, taking sums apart where nothing can have wrapped."""
        exact = self.ranges[n] != full_range(n.dtype) and self.level[n] == TILE
        if exact and n.op in (Op.ADD, Op.SUB):
            self._collect(n.args[0], factor, terms)
            self._collect(n.args[1], factor if n.op is Op.ADD else -factor, terms)
        elif exact and n.op is Op.NEG:
            self._collect(n.args[0], -factor, terms)
        elif exact and n.op is Op.MUL and n.args[1].is_const:
            self._collect(n.args[0], factor * n.args[1].attr, terms)
        elif exact and n.op is Op.CAST and n.args[0].dtype in INTEGERS:
            self._collect(n.args[0], factor, terms)
        else:
            terms[n] = terms.get(n, 0) + factor

    def _total(self, terms: Mapping[Node, int]) -> Node:
        """The sum as one int64 node; positive terms first, the constant last."""
        result: Node | None = None
        constant = sum(f * a.attr for a, f in terms.items() if a.is_const)
        atoms = [(a, f) for a, f in terms.items() if not a.is_const]
        for atom, factor in sorted(atoms, key=lambda item: item[1] < 0):
            value = cast(self.done[atom], torch.int64)
            size = value if abs(factor) == 1 else node(
                Op.MUL, value, const(abs(factor), torch.int64), dtype=torch.int64)
            if result is None:
                result = size if factor > 0 else node(Op.NEG, size, dtype=torch.int64)
            else:
                result = node(Op.ADD if factor > 0 else Op.SUB, result, size, dtype=torch.int64)
        if result is None:
            return const(constant, torch.int64)
        return result if not constant else node(
            Op.ADD, result, const(constant, torch.int64), dtype=torch.int64)
