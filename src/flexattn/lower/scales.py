"""Constant factors of a score mod, taken out of its graph for kernels that multiply by them anyway.

In: the graph of a score mod, its gradient's outputs included. Out: one that is equal but for
rounding, in which constant factors of a product are one number, and the `Scales` that a kernel
applies: it multiplies q.k by `score` (together with attention's own scale), and the result by
`result` (together with log2(e)). `20 * tanh(score / 20)` is left as `tanh(score)` with the scales
1/20 and 20. For 16-bit inputs, whose rounding is coarser than what this changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from flexattn.ir.graph import Graph, Node, const, node
from flexattn.ir.ops import Op

_Factored = tuple[float, Node]  # factor * node


@dataclass(frozen=True)
class Scales:
    """Of a mod's input and of its result."""

    score: float = 1.0
    result: float = 1.0


def take_out(graph: Graph) -> tuple[dict[Node, Node], Graph, Scales]:
    """Every node -> its equal, the graph of the equal outputs, and the scales."""
    equal = _merged(graph.nodes)
    merged = graph.replace_outputs(*((name, equal[n]) for name, n in graph.outputs))
    score = _scale_of_score(merged)
    if score != 1.0:
        bare = _without_scale(merged.nodes)
        equal = {n: bare.get(m, m) for n, m in equal.items()}
        merged = merged.replace_outputs(*((name, bare[n]) for name, n in merged.outputs))
    found, result = list(merged.outputs), 1.0
    for i, (name, n) in enumerate(found):
        if name == "score" and _is_scaled(n) and n.args[1].attr > 0:
            found[i], result = (name, n.args[0]), n.args[1].attr
    return equal, merged.replace_outputs(*found), Scales(score, result)


def _merged(nodes: Iterable[Node]) -> dict[Node, Node]:
    """Each node with one constant factor for each product."""
    parts: dict[Node, _Factored] = {}
    for n in nodes:
        parts[n] = _factored(n, parts)
    return {n: _times(*part) for n, part in parts.items()}


def _factored(n: Node, parts: dict[Node, _Factored]) -> _Factored:
    if n.dtype is torch.float32 and n.op in (Op.MUL, Op.DIV, Op.NEG):
        (factor, x), *rest = (parts[a] for a in n.args)
        if n.op is Op.NEG:
            return -factor, x
        other, y = rest[0]
        if y.is_const and y.attr not in (0.0, 1.0) and math.isfinite(y.attr):
            other, y = other * y.attr, const(1.0, torch.float32)
        product = factor * other if n.op is Op.MUL else factor / other
        if _is_plain(product):
            one = y.is_const and y.attr == 1.0
            return product, x if one else node(n.op, x, y, dtype=n.dtype)
    return 1.0, node(n.op, *(_times(*parts[a]) for a in n.args), dtype=n.dtype, attr=n.attr)


def _is_plain(factor: float) -> bool:
    """A float32 that neither overflows nor loses digits."""
    return 1e-30 < abs(factor) < 1e30


def _times(factor: float, n: Node) -> Node:
    if factor == 1.0:
        return n
    if factor == -1.0:
        return node(Op.NEG, n, dtype=n.dtype)
    return node(Op.MUL, n, const(factor, n.dtype), dtype=n.dtype)


def _is_scaled(n: Node) -> bool:
    return n.op is Op.MUL and n.dtype is torch.float32 and n.args[1].is_const


def _is_score(n: Node) -> bool:
    return n.op is Op.INPUT and n.attr == "score"


def _scale_of_score(graph: Graph) -> float:
    """c where the score is read as score * c and in no other way, otherwise 1."""
    if any(_is_score(n) for _, n in graph.outputs):
        return 1.0
    users = [n for n in graph.nodes if any(map(_is_score, n.args))]
    scales = {n.args[1].attr for n in users if _is_scaled(n)}
    return scales.pop() if len(scales) == 1 and all(map(_is_scaled, users)) else 1.0


def _without_scale(nodes: Iterable[Node]) -> dict[Node, Node]:
    """Every node with score in the place of score * c."""
    bare: dict[Node, Node] = {}
    for n in nodes:
        if _is_scaled(n) and _is_score(n.args[0]):
            bare[n] = n.args[0]
        else:
            bare[n] = node(n.op, *(bare[a] for a in n.args), dtype=n.dtype, attr=n.attr)
    return bare
