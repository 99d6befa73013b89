"""A mod as the CPU kernels inject it: what is computed per row, per column and per element.

In: a graph (score mod, mask mod, or a score mod joined with its gradient) and a bound of its
index inputs. Out: an `LlvmMod`, the hooks of flexattn.kernels.cpu_sites.KernelMod. Rejects nothing.

A node that depends on neither score nor kv_idx is a scalar, computed once per row; one that
depends on kv_idx alone is a vector, computed once per tile; the rest is computed per vector of
scores. What vectors need from their row and columns is found by emitting one vector and throwing
the text away.

Captured tensors are read through the tables of `argument_words`. An out-of-range index is
clamped; where its position is attended, `FAULT_WORDS` words record the position (and the score, as
indices may depend on it): evaluating the graph there again names tensor and index.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from struct import pack, unpack
from typing import Any

import torch
from torch import Tensor

from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import COMPARISON, Op
from flexattn.lower.integer_ranges import integer_ranges
from flexattn.lower.llvm import compute
from flexattn.lower.llvm_lanes import Lanes, Value, width
from flexattn.lower.llvm_levels import ROW, Levels
from flexattn.lower.llvm_load import ROW_VALUES, column_load, row_load
from flexattn.lower.llvm_stretch import find_stretch

FAULT_WORDS = 8  # claimed, b, h, q_idx, kv_idx, the score's bits as a double; two are unused
OUTSIDE = "outside"  # key of: which of the reads made for the row, or columns, were out of range

_NOTHING = torch.zeros(8, dtype=torch.int64)  # what captured tensors without elements point at


def argument_words(captures: Sequence[Tensor],
                   numbers: Sequence[bool | int | float]) -> tuple[list[int], list[int]]:
    """The table of captured tensors (address, sizes, strides of each) and that of numbers."""
    table: list[int] = []
    for t in captures:
        if t.numel():
            table += [t.data_ptr(), *t.shape, *t.stride()]
        else:
            table += [_NOTHING.data_ptr(), *[0] * (2 * t.dim())]
    return table, [unpack("q", pack("d", x))[0] if isinstance(x, float) else int(x)
                   for x in numbers]


@dataclass(frozen=True)
class Position:
    """Where code is emitted: scalars and tables it may read (q_idx: not for columns)."""

    b: Value
    h: Value
    q_idx: Value | None
    captures: Value
    numbers: Value
    gradients: Value | None

    @classmethod
    def of(cls, site: Any) -> Position:
        return cls(site.b, site.h, getattr(site, "q_idx", None), site.captures, site.numbers,
                   getattr(site, "gradients", None))


class LlvmMod:
    """Implements KernelMod. Equal (graph, index_bound) give equal code."""

    def __init__(self, graph: Graph, index_bound: int) -> None:
        """index_bound: above every b, h, q_idx and kv_idx, padding lanes included. The code
        differs by it: use few values, say 2**15, 2**30 and 2**62."""
        self.graph, self.levels = graph, Levels()
        self.ranges = integer_ranges(graph.nodes, index_bound)
        self._stretch = find_stretch(graph, self.levels, self.ranges)
        self._keys: tuple[list[Hashable], list[Hashable]] | None = None

    def per_row(self, e: Any, site: Any) -> Sequence[Value]:
        rows, _ = self._found(e, site)
        code = Code(self, e, Position.of(site))
        return [code.row_value(key) for key in rows]

    def per_column(self, e: Any, site: Any) -> Sequence[Value]:
        _, columns = self._found(e, site)
        code = Code(self, e, Position.of(site), site.kv_base, in_column=True)
        return [code.column_value(key) for key in columns]

    def per_vector(self, e: Any, site: Any, score: Value | None) -> Value:
        code = self.vector_code(e, site)
        if score is not None:
            code.give("score", score)
        name, _ = self.graph.outputs[0]
        result = code.output(name)
        attended = site.attended if score is not None else e.and_(site.attended, result)
        code.report(attended, site.row.fault, score)
        return result

    @property
    def is_stretch(self) -> bool:
        """Whether row_stretch says all of a mask."""
        return self._stretch is not None

    def row_stretch(self, e: Any, site: Any) -> tuple[Value, Value]:
        assert self._stretch is not None
        code = Code(self, e, Position.of(site))
        return self._stretch.ends(e, lambda n: code.scalars.resize(code.scalar(n), "i64"),
                                  code.scalar)

    def vector_code(self, e: Any, site: Any) -> Code:
        """Code of one vector of scores: to be given inputs, then asked for outputs."""
        rows, columns = self._found(e, site.row)
        code = Code(self, e, Position.of(site.row), site.kv_base)
        code.rows = dict(zip(rows, site.row_values, strict=True))
        code.columns = {key: code.unstore(key, x)
                        for key, x in zip(columns, site.column_values, strict=True)}
        return code

    def _found(self, e: Any, site: Any) -> tuple[list[Hashable], list[Hashable]]:
        """Keys of what vectors need from their row and from their columns."""
        if self._keys is None:
            place = Position(site.b, site.h, site.b, site.captures, site.numbers, site.captures)
            code = Code(self, e.scratch(), place, site.b)
            for name in ("score", "grad"):
                code.give(name, e.number(0.0))
            self._emit_everything(code)
            self._keys = code.needs()
        return self._keys

    def _emit_everything(self, code: Code) -> None:
        """All that is ever emitted for one vector."""
        for name, _ in self.graph.outputs:
            code.output(name)


class Code:
    """Values of nodes at one place, memoised; and which reads made there were out of range.

    rows and columns hold what the row and the columns keep for their vectors, by key: a node, or
    a name of _ROW_VALUES and arguments. What they lack is computed in place.
    """

    def __init__(self, mod: LlvmMod, e: Any, place: Position, kv_base: Value | None = None,
                 in_column: bool = False) -> None:
        self.mod, self.e, self.place, self.kv_base = mod, e, place, kv_base
        self.lanes, self.scalars = Lanes(e, e.lanes, mod.ranges), Lanes(e, 0, mod.ranges)
        self.rows: dict[Hashable, Value] = {}
        self.columns: dict[Hashable, Value] = {}
        self.outside: list[Value] = []  # a bit for each lane
        self.row_outside: list[Value] = []  # i1
        self._in_column = in_column
        self._column_reads = False
        self._vectors: dict[Node, Value] = {}
        self._scalars: dict[Node, Value] = {}

    # Interface

    def give(self, name: str, value: Value) -> None:
        """The value of an input: "score" or "grad"."""
        for n in self.mod.graph.nodes:
            if n.op is Op.INPUT and n.attr == name:
                self._vectors[n] = value

    def output(self, name: str) -> Value:
        return self.vector(self.mod.graph.output(name))

    def needs(self) -> tuple[list[Hashable], list[Hashable]]:
        """Keys of the row's and the columns' values that were asked for."""
        rows, columns = [*self.rows], [*self.columns]
        return (rows + [(OUTSIDE,)] if self.row_outside else rows,
                columns + [OUTSIDE] if self._column_reads else columns)

    # Nodes

    def vector(self, n: Node) -> Value:
        """The node in every lane."""
        if n not in self._vectors:
            self._vectors[n] = self._vector(n)
        return self._vectors[n]

    def scalar(self, n: Node) -> Value:
        """A node that depends on the row alone."""
        if n not in self._scalars:
            self._scalars[n] = self._scalar(n)
        return self._scalars[n]

    def _vector(self, n: Node) -> Value:
        levels = self.mod.levels
        if n.is_const:
            return self.lanes.constant(n)
        if levels.level(n) is ROW:
            return self.of_row(n)
        if levels.is_hoisted(n) and not self._in_column:
            return self._of_column(n)
        if n.op is Op.INPUT:
            return self._column_index(n)
        if n.op is Op.LOAD:
            return column_load(self, n)
        n = levels.cheaper(n)
        return compute(self.lanes, n, *self._arguments(n))

    def _scalar(self, n: Node) -> Value:
        if n.is_const:
            return self.scalars.constant(n)
        if n.op is Op.INPUT:
            return getattr(self.place, n.attr)
        if n.op is Op.NUMBER:
            return self._number(n)
        if n.op is Op.LOAD:
            return row_load(self, n)
        return compute(self.scalars, n, *map(self.scalar, n.args))

    def _number(self, n: Node) -> Value:
        if n.dtype is torch.bool:
            value = self.e.load(self.place.numbers, "i64", n.attr)
            return self.e.compare("ne", value, self.e.const("i64", 0))
        return self.e.load(self.place.numbers, self.scalars.type(n), n.attr)

    def _column_index(self, n: Node) -> Value:
        assert n.attr == "kv_idx" and self.kv_base is not None, n
        e, type = self.e, "i32" if self.lanes.is_narrow(n) else "i64"
        return e.add(e.splat(self.scalars.resize(self.kv_base, type)), e.lane_ids(type))

    def _arguments(self, n: Node) -> list[Value]:
        if n.op in COMPARISON and n.args[0].dtype is torch.int64:
            return [self._compared(x, y) for x, y in (n.args, n.args[::-1])]
        return [self.vector(a) for a in n.args]

    def _compared(self, n: Node, other: Node) -> Value:
        """An int64 to compare with `other`: a wide scalar is clamped to just beyond what `other`
        can be, so that 32-bit lanes do."""
        low, high = self.lanes.range(other)
        fits = low > -(2**31) and high < 2**31 - 1
        scalar = self.mod.levels.level(n) is ROW and not n.is_const
        if not scalar or not fits or self.lanes.is_narrow(n):
            return self.vector(n)
        return self.of_row(("clamped", n, low - 1, high + 1))

    # Values kept by the row

    def of_row(self, key: Hashable) -> Value:
        if key not in self.rows:
            self.rows[key] = self.row_value(key)
        return self.rows[key]

    def row_value(self, key: Hashable) -> Value:
        """Compute what the key of a row names: a node in every lane, or what its method gives."""
        if isinstance(key, Node):
            return self._splat(self.scalar(key), self.lanes.is_narrow(key))
        assert isinstance(key, tuple)
        return _ROW_VALUES[key[0]](self, *key[1:])

    def _splat(self, x: Value, narrow: bool) -> Value:
        return self.e.splat(self.scalars.resize(x, "i32") if narrow else x)

    def clamped(self, n: Node, low: int, high: int) -> Value:
        """A wide scalar in every 32-bit lane, brought into a range that fits."""
        e, x = self.e, self.scalar(n)
        x = e.min(e.max(x, e.const("i64", low)), e.const("i64", high))
        return self._splat(x, narrow=True)

    def any_row_outside(self) -> Value:
        """A bit for each lane: all of them where one of the row's own reads was out of range."""
        e, bits = self.e, f"i{self.e.lanes}"
        total = e.const("i1", False)
        for one in self.row_outside:
            total = e.or_(total, one)
        return e.select(total, e.const(bits, -1), e.const(bits, 0))

    # Values kept by the columns

    def _of_column(self, n: Node) -> Value:
        """What the columns keep; where the keys are being searched for, what they would keep."""
        if n not in self.columns:
            inner = Code(self.mod, self.e, self.place, self.kv_base, in_column=True)
            self.columns[n] = inner.vector(n)
            self._column_reads |= bool(inner.outside or inner.row_outside)
        return self.columns[n]

    def column_value(self, key: Hashable) -> Value:
        """As the kernel's memory holds it: elements of 32 or 64 bits."""
        e = self.e
        if key == OUTSIDE:
            mask = e.cast("bitcast", self._lanes_outside(), e.vec("i1"))
            return e.cast("sext", mask, e.vec("i32"))
        assert isinstance(key, Node)
        x = self.vector(key)
        small = not key.dtype.is_floating_point and width(x.type) < 32
        return e.cast("sext", x, e.vec("i32")) if small else x

    def unstore(self, key: Hashable, stored: Value) -> Value:
        """A column's value as it was computed."""
        e = self.e
        if key == OUTSIDE:
            mask = e.compare("slt", stored, e.const(stored.type, 0))
            return e.cast("bitcast", mask, f"i{e.lanes}")
        assert isinstance(key, Node)
        type = self.lanes.type(key)
        return stored if stored.type == type else e.cast("trunc", stored, type)

    # Reads out of range

    def _lanes_outside(self) -> Value:
        """A bit for each lane, whatever was read for it here or kept for it."""
        total = self.any_row_outside()
        kept = [kept[key] for kept, key in ((self.rows, (OUTSIDE,)), (self.columns, OUTSIDE))
                if key in kept]
        for bits in [*self.outside, *kept]:
            total = self.e.or_(total, bits)
        return total

    def report(self, attended: Value, fault: Value, score: Value | None) -> None:
        """Record the first position that is attended and read out of range."""
        if not (self.outside or self.row_outside or (OUTSIDE,) in self.rows
                or OUTSIDE in self.columns):
            return
        e, bits = self.e, f"i{self.e.lanes}"
        hits = e.and_(self._lanes_outside(), e.cast("bitcast", attended, bits))
        with e.if_(e.compare("ne", hits, e.const(bits, 0))):
            first = e.compare("eq", e.atomic_add(fault), e.const("i64", 0))
            with e.if_(first):
                self._record(hits, fault, score)

    def _record(self, hits: Value, fault: Value, score: Value | None) -> None:
        e, zero = self.e, self.e.const("i1", False)
        wide = hits if e.lanes == 32 else e.cast("zext", hits, "i32")
        lane = e.emit("i32", f"call i32 @llvm.cttz.i32({wide}, {zero})")
        e.module.declare("llvm.cttz.i32", "i32", ["i32", "i1"])
        place = self.place
        words = [place.b, place.h, place.q_idx, e.add(self.kv_base, e.cast("zext", lane, "i64"))]
        if score is not None:
            x = e.emit(e.real, f"extractelement {score}, {lane}")
            x = x if e.real == "double" else e.cast("fpext", x, "double")
            words.append(e.cast("bitcast", x, "i64"))
        for i, word in enumerate(words, start=1):
            e.store(word, fault, i)


_ROW_VALUES: dict[str, Callable[..., Value]] = {
    **ROW_VALUES, "clamped": Code.clamped, OUTSIDE: Code.any_row_outside}
