"""What each node of a mod depends on: the row, the column or the element, and how on kv_idx.

In: nodes of a graph. Out: their level, whether a column's value is worth keeping, and c of the
nodes that are c * kv_idx plus a scalar of the row. Rejects nothing.
"""

from __future__ import annotations

from operator import add, neg, sub

import torch

from flexattn.ir.graph import Node, const, node
from flexattn.ir.ops import Op

ROW, COLUMN, ELEMENT = range(3)
_CHEAP = 3  # operations below which a column's value is recomputed for each row


class Levels:
    """What each node of a graph depends on."""

    def __init__(self) -> None:
        self._inputs: dict[Node, frozenset[str]] = {}
        self._affine: dict[Node, int | None] = {}
        self._cost: dict[Node, int] = {}
        self._at_column_0: dict[Node, Node] = {}

    def _depends(self, n: Node) -> frozenset[str]:
        if n not in self._inputs:
            own = frozenset([n.attr] if n.op is Op.INPUT else [])
            self._inputs[n] = own.union(*map(self._depends, n.args)) - {"b", "h"}
        return self._inputs[n]

    def level(self, n: Node) -> int:
        """ROW: a scalar of the row; COLUMN: depends on kv_idx and no row; or ELEMENT."""
        depends = self._depends(n)
        if depends <= {"q_idx"}:
            return ROW
        return COLUMN if depends == {"kv_idx"} else ELEMENT

    def is_hoisted(self, n: Node) -> bool:
        """A column's value worth keeping in memory for all rows of a tile."""
        return self.level(n) is COLUMN and self._operations(n) >= _CHEAP

    def _operations(self, n: Node) -> int:
        if self.level(n) is ROW or n.op is Op.INPUT:
            return 0
        if n not in self._cost:
            own = _CHEAP if n.op is Op.LOAD else 1
            self._cost[n] = own + sum(map(self._operations, n.args))
        return self._cost[n]

    def cheaper(self, n: Node) -> Node:
        """A score divided by a constant as a product, within an ulp. Not so an index, whose
        quotient may be rounded to an integer."""
        if n.op is not Op.DIV or n.dtype is not torch.float32 or not n.args[1].is_const:
            return n
        x, divisor = n.args[0], n.args[1].attr
        if not self._depends(x) & {"score", "grad"} or not 1e-30 < abs(divisor) < 1e30:
            return n
        return node(Op.MUL, x, const(1 / divisor, n.dtype), dtype=n.dtype)

    def affine(self, n: Node) -> int | None:
        """c of an int64 node that is c * kv_idx plus a scalar of the row; None for others."""
        if n not in self._affine:
            self._affine[n] = self._coefficient(n)
        return self._affine[n]

    def _coefficient(self, n: Node) -> int | None:
        if self.level(n) is ROW:
            return 0
        if n.op is Op.INPUT:
            return 1 if n.attr == "kv_idx" else None
        if n.op not in (Op.NEG, Op.ADD, Op.SUB, Op.MUL) or n.dtype is not torch.int64:
            return None
        parts = [c for c in map(self.affine, n.args) if c is not None]
        if len(parts) < len(n.args):
            return None
        if n.op is Op.MUL:
            scaled = [c * k.attr for c, k in zip(parts, n.args[::-1], strict=True) if k.is_const]
            return scaled[0] if scaled else None
        return neg(*parts) if n.op is Op.NEG else (add if n.op is Op.ADD else sub)(*parts)

    def at_column_0(self, n: Node) -> Node:
        """An affine node with kv_idx = 0: the scalar of the row that it adds."""
        if self.level(n) is ROW:
            return n
        if n.op is Op.INPUT:
            return const(0, torch.int64)
        if n not in self._at_column_0:
            args = map(self.at_column_0, n.args)
            self._at_column_0[n] = node(n.op, *args, dtype=n.dtype, attr=n.attr)
        return self._at_column_0[n]
