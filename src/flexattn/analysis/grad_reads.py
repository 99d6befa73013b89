"""How the gradient of a captured tensor's read can be summed before its index is looked at.

In: the LOAD nodes of a `Gradient`. Out, for each: "row" if its index does not depend on kv_idx
(sum over the keys of a row first), "column" if not on q_idx, "diagonal" if on q_idx - kv_idx only
(relative position biases, clipped or in buckets), "scattered" if on anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexattn.ir.graph import Node
from flexattn.ir.ops import INTEGERS, Op

ROW, COLUMN, DIAGONAL, SCATTERED = "row", "column", "diagonal", "scattered"

# A value is a * q_idx + c * kv_idx + something independent of both (the pair a, c), a function of
# q_idx - kv_idx ("distance"), or anything else (None).
_Form = tuple[int, int] | str | None
_INPUTS: dict[str, _Form] = {"b": (0, 0), "h": (0, 0), "q_idx": (1, 0), "kv_idx": (0, 1)}


def kinds(loads: Sequence[Node]) -> tuple[str, ...]:
    """The kind of each read."""
    found: dict[Node, tuple[_Form, frozenset[str]]] = {}
    for load in loads:
        for index in load.args:
            _visit(index, found)
    return tuple(_kind([found[index] for index in load.args]) for load in loads)


def _kind(indices: list[tuple[_Form, frozenset[str]]]) -> str:
    read = frozenset[str]().union(*(inputs for _, inputs in indices))
    if "score" in read:
        return SCATTERED
    if "kv_idx" not in read:
        return ROW
    if "q_idx" not in read:
        return COLUMN
    return DIAGONAL if all(_along_diagonals(form) for form, _ in indices) else SCATTERED


def _along_diagonals(form: _Form) -> bool:
    """Constant where q_idx - kv_idx is."""
    return form == "distance" or (isinstance(form, tuple) and sum(form) == 0)


def _visit(n: Node, found: dict[Node, tuple[_Form, frozenset[str]]]) -> None:
    if n in found:
        return
    for a in n.args:
        _visit(a, found)
    inputs = frozenset[str]().union(*(found[a][1] for a in n.args))
    if n.op is Op.INPUT:
        inputs = frozenset([n.attr])
    found[n] = _form(n, [found[a][0] for a in n.args]), inputs


def _form(n: Node, args: list[_Form]) -> _Form:
    if n.op is Op.INPUT:
        return _INPUTS.get(n.attr)
    affine = [form for form in args if isinstance(form, tuple)]
    if n.dtype in INTEGERS and len(affine) == len(args):
        if n.op in (Op.ADD, Op.SUB):
            sign = 1 if n.op is Op.ADD else -1
            return affine[0][0] + sign * affine[1][0], affine[0][1] + sign * affine[1][1]
        if n.op is Op.NEG:
            return -affine[0][0], -affine[0][1]
        if n.op is Op.CAST and n.args[0].dtype in INTEGERS:
            return affine[0]
        if n.op is Op.MUL and any(a.is_const for a in n.args):
            constant = 0 if n.args[0].is_const else 1
            factor, (a, c) = n.args[constant].attr, affine[1 - constant]
            return factor * a, factor * c
    if all(form == (0, 0) for form in args):
        return 0, 0
    return "distance" if all(map(_along_diagonals, args)) else None
