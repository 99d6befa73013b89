"""Reads of captured tensors: one address for a row, vectors or gathers for columns.

In: the `Code` of a place (lower.llvm_mod) and a LOAD node. Out: its value; `code.outside` and
`code.row_outside` say which lanes had an index out of range. Such an index is clamped, so nothing
outside of a tensor is ever read. Rejects nothing.

An index that is c * kv_idx plus a scalar (c = 1 or -1, elements one apart, all lanes inside) reads
one vector; other indices do the same where their lanes turn out to be consecutive or equal, and
read lane by lane where not. Strides are run-time values, tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flexattn.ir.graph import Node
from flexattn.lower.llvm_lanes import HALVES, INTEGER_TYPES, Lanes, Value, real_type

if TYPE_CHECKING:
    from flexattn.lower.llvm_mod import Code


def stored_type(dtype: torch.dtype) -> str:
    """LLVM type of an element in memory."""
    if dtype in HALVES or dtype is torch.bool:
        return "i16" if dtype in HALVES else "i8"
    return real_type(dtype) if dtype.is_floating_point else INTEGER_TYPES[dtype]


def from_stored(lanes: Lanes, raw: Value, dtype: torch.dtype) -> Value:
    """An element, or a vector of them, as it is computed with."""
    if dtype in HALVES:
        return lanes.half_to_float(raw, dtype)
    if dtype is torch.bool:
        return lanes.e.compare("ne", raw, lanes.const(raw, 0))
    return raw


class Tensor:
    """A captured tensor's entry in the table of captures, or of their gradients."""

    def __init__(self, code: Code, slot: int, table: str = "captures") -> None:
        captures = code.mod.graph.captures
        self._e, self._table = code.e, getattr(code.place, table)
        self._start = sum(1 + 2 * c.rank for c in captures[:slot])
        self.rank, self.dtype = captures[slot].rank, captures[slot].dtype

    def address(self) -> Value:
        return self._e.load(self._e.at(self._table, self._start, "i64"), "ptr")

    def size(self, dim: int) -> Value:
        return self._e.load(self._table, "i64", self._start + 1 + dim)

    def stride(self, dim: int) -> Value:
        return self._e.load(self._table, "i64", self._start + 1 + self.rank + dim)


def row_load(code: Code, n: Node) -> Value:
    """A read whose indices depend on the row alone."""
    dtype = code.mod.graph.captures[n.attr].dtype
    raw = code.e.load(_row_start(code, n), stored_type(dtype))
    return from_stored(code.scalars, raw, dtype)


def column_load(code: Code, n: Node) -> Value:
    """A read whose indices differ between lanes."""
    read = Read(code, n)
    if not read.moving:
        raw = code.e.splat(code.e.load(read.start, read.type))
    else:
        raw, outside = (_affine_load if read.is_affine else _free_load)(read)
        code.outside.append(outside)
    return from_stored(code.lanes, raw, n.dtype)


# What a row keeps for the reads of its vectors: ROW_VALUES[key] gives it


def element_type(n: Node, table: str) -> str:
    """LLVM type of an element of a tensor, or of its gradient."""
    return stored_type(n.dtype) if table == "captures" else real_type(n.dtype)


def _row_start(code: Code, n: Node, table: str = "captures") -> Value:
    """Address after the dimensions that have one index for all lanes."""
    e, tensor, levels = code.e, Tensor(code, n.attr, table), code.mod.levels
    address, type = tensor.address(), element_type(n, table)
    for dim, index in enumerate(n.args):
        if levels.affine(index) == 0:
            inside, outside = _inside(e, code.scalar(levels.at_column_0(index)), tensor.size(dim))
            code.row_outside.append(outside)
            address = e.at(address, e.mul(inside, tensor.stride(dim)), type)
    return address


def _row_consecutive(code: Code, n: Node, table: str) -> Value:
    """Whether the next lane of an affine read is the next element, in the read's direction."""
    e, tensor = code.e, Tensor(code, n.attr, table)
    total = e.const("i64", 0)
    for dim, index in enumerate(n.args):
        step = e.const("i64", code.mod.levels.affine(index) or 0)
        total = e.add(total, e.mul(tensor.stride(dim), step))
    return e.compare("eq", total, e.const("i64", Read(code, n).direction))


ROW_VALUES: dict[str, Callable[..., Value]] = {
    "start": _row_start,
    "consecutive": _row_consecutive,
    "index": lambda code, n: code.scalar(code.mod.levels.at_column_0(n)),
    "size": lambda code, slot, dim: Tensor(code, slot).size(dim),
    "stride": lambda code, slot, dim, table: Tensor(code, slot, table).stride(dim),
}


class Read:
    """Where the lanes of a LOAD read, or add to its gradient. `moving` are the dimensions whose
    index differs between lanes."""

    def __init__(self, code: Code, n: Node, table: str = "captures") -> None:
        self.code, self.n, self.e, self.table = code, n, code.e, table
        steps = [code.mod.levels.affine(a) for a in n.args]
        self.moving = [dim for dim, step in enumerate(steps) if step != 0]
        self.steps = [step for step in steps if step]
        self.is_affine = len(self.steps) == len(self.moving)
        self.direction = -1 if self.steps and self.steps[-1] < 0 else 1
        self.type = element_type(n, table)

    @cached_property
    def start(self) -> Value:
        return self.code.of_row(("start", self.n, self.table))

    @cached_property
    def sizes(self) -> list[Value]:
        return [self.code.of_row(("size", self.n.attr, dim)) for dim in self.moving]

    @cached_property
    def strides(self) -> list[Value]:
        return [self.code.of_row(("stride", self.n.attr, dim, self.table))
                for dim in self.moving]

    @cached_property
    def lane_0(self) -> list[Value]:
        """Indices of lane 0 of an affine read."""
        e, indices = self.e, []
        for dim, step in zip(self.moving, self.steps, strict=True):
            base = self.code.of_row(("index", self.n.args[dim]))
            kv = self.code.kv_base
            indices.append(e.add(base, kv if step == 1 else e.mul(kv, e.const("i64", step))))
        return indices

    def run(self) -> tuple[Value, Value]:
        """Offset of lane 0 of an affine read, and whether its lanes are one run of elements."""
        e, offset = self.e, self.e.const("i64", 0)
        fine = self.code.of_row(("consecutive", self.n, self.table))
        for index, step, size, stride in zip(self.lane_0, self.steps, self.sizes, self.strides,
                                             strict=True):
            first = _wrapped(e, index, size)
            last = e.add(first, e.const("i64", step * (e.lanes - 1)))
            for end in (first, last):
                fine = e.and_(fine, e.compare("ult", end, size))
            offset = e.add(offset, e.mul(first, stride))
        return offset, fine

    def offsets(self) -> tuple[Value, Value]:
        """Valid offsets of all lanes (<lanes x i64>); a bit for each lane that was outside."""
        e, total, bad = self.e, self.e.const(self.e.vec("i64"), 0), None
        for i, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            index, outside = _inside(e, self._indices(i), e.splat(size))
            total = e.add(total, e.mul(index, e.splat(stride)))
            bad = outside if bad is None else e.or_(bad, outside)
        return total, e.cast("bitcast", bad, f"i{e.lanes}")

    def _indices(self, i: int) -> Value:
        e = self.e
        if not self.is_affine:
            index = self.code.vector(self.n.args[self.moving[i]])
            return self.code.lanes.resize(index, e.vec("i64"))
        ids = e.const_vector("i64", [self.steps[i] * lane for lane in range(e.lanes)])
        return e.add(e.splat(self.lane_0[i]), ids)

    # Elements

    def vector(self, offset: Value, direction: int) -> Value:
        """Consecutive elements, that of lane 0 at `offset`."""
        e = self.e
        if direction < 0:
            offset = e.sub(offset, e.const("i64", e.lanes - 1))
        x = e.load(self.start, f"<{e.lanes} x {self.type}>", offset)
        return x if direction > 0 else e.shuffle(x, x, range(e.lanes - 1, -1, -1))

    def gather(self, offsets: Value) -> Value:
        e = self.e
        x = e.const(f"<{e.lanes} x {self.type}>", 0)
        for lane in range(e.lanes):
            one = e.load(self.start, self.type, e.extract(offsets, lane))
            x = e.insert(x, one, lane)
        return x


def _affine_load(read: Read) -> list[Value]:
    e, start = read.e, read.start
    offset, fine = read.run()

    def lane_by_lane() -> list[Value]:
        offsets, outside = read.offsets()
        return [read.gather(offsets), outside]

    assert start is not None
    return e.if_else(fine, lambda: [read.vector(offset, read.direction),
                                    e.const(f"i{e.lanes}", 0)], lane_by_lane)


def _free_load(read: Read) -> list[Value]:
    e, start = read.e, read.start
    offsets, outside = read.offsets()
    first = e.extract(offsets, 0)
    distance = e.sub(offsets, e.splat(first))

    def choose(patterns: list[tuple[int, Callable[[], Value]]]) -> list[Value]:
        if not patterns:
            return [read.gather(offsets)]
        (step, make), *others = patterns
        line = e.const_vector("i64", [step * lane for lane in range(e.lanes)])
        return e.if_else(e.all(e.compare("eq", distance, line)), lambda: [make()],
                         lambda: choose(others))

    raw, = choose([(0, lambda: e.splat(e.load(start, read.type, first))),
                   (1, lambda: read.vector(first, 1)), (-1, lambda: read.vector(first, -1))])
    return [raw, outside]


# Indices


def _inside(e: Any, index: Value, size: Value) -> tuple[Value, Value]:
    """A valid index, and whether it had to be clamped."""
    zero = e.const(index.type, 0)
    index = _wrapped(e, index, size)
    last = e.max(e.sub(size, e.const(index.type, 1)), zero)
    return e.min(e.max(index, zero), last), e.compare("uge", index, size)


def _wrapped(e: Any, index: Value, size: Value) -> Value:
    """A negative index counts from the end."""
    negative = e.compare("slt", index, e.const(index.type, 0))
    return e.select(negative, e.add(index, size), index)
