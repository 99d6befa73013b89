"""Graph: hash-consed nodes, so that structural equality is identity; verifier and printer.

In: operations made by `node` (or the shorthands `const`, `cast`). Out: a `Graph`, the immutable
unit every pass takes and gives. Rejects: ill-typed nodes, with an AssertionError, since only our
own passes build graphs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch

from flexattn.ir.ops import (
    ARITHMETIC,
    BITWISE,
    COMPARISON,
    DTYPES,
    FLOAT_UNARY,
    FLOATS,
    INDEX_INPUTS,
    INTEGERS,
    UNARY,
    Op,
    dtype_name,
)


class Node:
    """One operation. Never built directly: `node()` returns the existing one where there is one."""

    __slots__ = ("op", "args", "dtype", "attr", "__weakref__")

    def __init__(self, op: Op, args: tuple[Node, ...], dtype: torch.dtype, attr: Any) -> None:
        self.op, self.args, self.dtype, self.attr = op, args, dtype, attr

    @property
    def is_const(self) -> bool:
        return self.op is Op.CONST

    def __repr__(self) -> str:
        inner = ", ".join([*map(str, [self.attr] if self.attr is not None else []),
                           *(f"%{id(a):x}" for a in self.args)])
        return f"{self.op.name.lower()}.{dtype_name(self.dtype)}({inner})"


_interned: WeakValueDictionary[tuple, Node] = WeakValueDictionary()
_lock = Lock()


def _attr_key(attr: Any) -> Any:
    """Distinguishes 0.0 from -0.0, 1 from True, and makes NaN equal itself."""
    return struct.pack("d", attr) if type(attr) is float else (type(attr), attr)


def node(op: Op, *args: Node, dtype: torch.dtype, attr: Any = None) -> Node:
    """The one node with this operation, type, attribute and arguments."""
    key = (op, dtype, _attr_key(attr), *map(id, args))
    with _lock:
        found = _interned.get(key)
        if found is None:
            found = _interned[key] = Node(op, args, dtype, attr)
            _verify(found)
        return found


def const(value: bool | int | float, dtype: torch.dtype) -> Node:
    """A constant, converted to the Python type that its dtype holds."""
    kind = bool if dtype is torch.bool else int if dtype in INTEGERS else float
    return node(Op.CONST, dtype=dtype, attr=kind(value))


def cast(value: Node, dtype: torch.dtype) -> Node:
    """`value` as `dtype`; itself where it already is."""
    return value if value.dtype is dtype else node(Op.CAST, value, dtype=dtype)


def index_input(name: str) -> Node:
    """One of b, h, q_idx, kv_idx."""
    assert name in INDEX_INPUTS, name
    return node(Op.INPUT, dtype=torch.int64, attr=name)


@dataclass(frozen=True)
class Capture:
    """What is known of a captured tensor before a call: sizes and strides are run-time values."""

    rank: int
    dtype: torch.dtype
    requires_grad: bool = False


@dataclass(frozen=True)
class Graph:
    """A mod, its mask or its gradient.

    outputs: named results; a score mod has ("score",), a mask mod ("mask",), a gradient
    "d_score" and one "d_load<i>" for each differentiable read (see analysis.gradient).
    captures: the captured tensors LOAD's slots point at.
    numbers: dtype of each run-time number NUMBER's slots point at.
    """

    outputs: tuple[tuple[str, Node], ...]
    captures: tuple[Capture, ...] = ()
    numbers: tuple[torch.dtype, ...] = ()
    _order: tuple[Node, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", tuple(_topological(n for _, n in self.outputs)))
        for n in self._order:
            assert n.op is not Op.LOAD or len(n.args) == self.captures[n.attr].rank, n
            assert n.op is not Op.LOAD or n.dtype is self.captures[n.attr].dtype, n
            assert n.op is not Op.NUMBER or n.dtype is self.numbers[n.attr], n

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every reachable node, arguments before users."""
        return self._order

    def output(self, name: str) -> Node:
        return dict(self.outputs)[name]

    def inputs(self) -> frozenset[str]:
        """Names of the inputs that are read: {"score", "q_idx"} ..."""
        return frozenset(n.attr for n in self._order if n.op is Op.INPUT)

    def replace_outputs(self, *outputs: tuple[str, Node]) -> Graph:
        return Graph(outputs, self.captures, self.numbers)

    def __str__(self) -> str:
        names = {n: f"%{i}" for i, n in enumerate(self._order)}
        lines = [f"{names[n]} = {_text(n, names)}" for n in self._order]
        return "\n".join([*lines, *(f"return {k}: {names[n]}" for k, n in self.outputs)])


def _text(n: Node, names: dict[Node, str]) -> str:
    head = f"{n.op.name.lower()} {dtype_name(n.dtype)}"
    attr = "" if n.attr is None else f" {n.attr}"
    if n.op is Op.LOAD:
        return f"{head} capture{n.attr}[{', '.join(names[a] for a in n.args)}]"
    return head + attr + "".join(f" {names[a]}" for a in n.args)


def _topological(roots: Iterator[Node]) -> list[Node]:
    order: dict[Node, None] = {}
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        n, done = stack.pop()
        if n in order:
            continue
        if done:
            order[n] = None
        else:
            stack.append((n, True))
            stack.extend((a, False) for a in reversed(n.args))
    return list(order)


def _verify(n: Node) -> None:
    """The typing rules, one line per family."""
    dtypes = [a.dtype for a in n.args]
    assert n.dtype in DTYPES, n
    if n.op in FLOAT_UNARY:
        assert dtypes == [n.dtype] and n.dtype in FLOATS, n
    elif n.op in UNARY:
        assert dtypes == [n.dtype], n
        assert (n.dtype not in FLOATS) if n.op is Op.NOT else (n.dtype is not torch.bool), n
    elif n.op in ARITHMETIC:
        assert dtypes == [n.dtype] * 2 and n.dtype is not torch.bool, n
        assert n.op is not Op.DIV or n.dtype in FLOATS, n
    elif n.op in BITWISE:
        assert dtypes == [n.dtype] * 2 and n.dtype not in FLOATS, n
        assert n.op not in (Op.SHL, Op.SHR) or n.dtype is not torch.bool, n
    elif n.op in COMPARISON:
        assert len(dtypes) == 2 and dtypes[0] is dtypes[1] and n.dtype is torch.bool, n
    elif n.op is Op.WHERE:
        assert dtypes == [torch.bool, n.dtype, n.dtype], n
    elif n.op is Op.LOAD:
        assert all(d is torch.int64 for d in dtypes) and isinstance(n.attr, int), n
    elif n.op is Op.CAST:
        assert len(dtypes) == 1, n
    else:
        assert not dtypes and n.attr is not None, n
