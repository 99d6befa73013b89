"""Mask, score mod and online softmax on one tile of scores.

In: a tile of scores, or for `emit_attend` only its place. Out, in scratch memory: which scores are
attended and in which columns any is; p = 2^(s - m) in place of s, and m, l and the factor that
rescales the output brought up to date.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flexattn.kernels.cpu_dsl import (
    Emitter,
    Function,
    Module,
    Value,
    const,
    const_vector,
    element,
    i64,
    lanes_of,
    vector_type,
)
from flexattn.kernels.cpu_frame import LOG2_E, PLACE, Arguments, Frame, Place
from flexattn.kernels.cpu_sites import ColumnSite, KernelMod, RowSite, VectorSite

_WORDS = 8  # words of bits made at once


class Injected:
    """A mod in one function: its tables, and what is hoisted for columns and for a row."""

    def __init__(self, e: Emitter, mod: KernelMod, kind: str, a: Arguments, place: Place) -> None:
        self._e, self._mod, self._kind, self._place = e, mod, kind, place
        self._tables = (a.address(f"{kind}_captures"), a.address(f"{kind}_numbers"),
                        a.address(f"{kind}_fault"))
        self._columns: list[tuple[Value, str]] = []

    def hoist_columns(self, arrays: Value, size: int) -> int:
        """Keep what per_column gives in consecutive arrays; how many."""
        e, place = self._e, self._place
        with e.loop(0, place.width, e.lanes) as loop:
            site = ColumnSite(place.b, place.h, e.add(place.kv_start, loop.index), *self._tables)
            values = self._mod.per_column(e, site)
            for i, x in enumerate(values):
                e.store(x, e.at(arrays, i * size, "i8"), loop.index)
        self._columns = [(e.at(arrays, i * size, "i8"), x.type) for i, x in enumerate(values)]
        return len(self._columns)

    def hoist_row(self, row: Value) -> Sequence[Value]:
        """What vectors need of a row; rows for which that is the same attend the same."""
        e, place = self._e, self._place
        self._row = RowSite(place.b, place.h, e.add(place.q_start, row), *self._tables)
        self._row_values = self._mod.per_row(e, self._row)
        return self._row_values

    def row_stretch(self, row: Value) -> tuple[Value, Value]:
        """The row's first attended key, and the one after its last."""
        e, place = self._e, self._place
        site = RowSite(place.b, place.h, e.add(place.q_start, row), *self._tables)
        return self._mod.row_stretch(e, site)

    def emit(self, column: Value, attended: Value, score: Value | None) -> Value:
        """The mod on one vector of the row's scores."""
        e = self._e
        columns = [e.load(array, type, column) for array, type in self._columns]
        site = VectorSite(self._row, e.add(self._place.kv_start, column), self._row_values,
                          columns, attended)
        return self._mod.per_vector(e, site, score)


# Which scores are attended


def emit_attend(module: Module, frame: Frame, names: Sequence[str], mask: KernelMod | None,
                grain: int = 0) -> tuple[Function, int]:
    """attend(arguments, scratch, place..., whole): the bits of a tile that needs a mask, because
    the mask mod decides (unless `whole`) or because keys end within it. Ranges of columns are
    multiples of `grain` (whole packed panels unless told). Also gives how many column arrays the
    mask keeps."""
    e = module.function("attend", ["ptr", "ptr", *PLACE, "i1"])
    scratch, place, whole = e.params[1], Place(*e.params[2:-1]), e.params[-1]
    mod, arrays = None, 0
    if mask is not None:
        mod = Injected(e, mask, "mask", Arguments(e, e.params[0], names), place)
        if not mask.is_stretch:
            arrays = mod.hoist_columns(frame.array(e, scratch, "columns"),
                                       frame.column_array_bytes)
    first, last = (frame.array(e, scratch, n) for n in ("first", "last"))
    bits, grain = frame.array(e, scratch, "attended"), grain or frame.columns
    with e.loop(place.rows, frame.tile.tile_q) as row:
        e.store(place.width, first, row.index)
        e.store(i64(0), last, row.index)

    def keep(row: Value, start: Value, end: Value) -> None:
        e.store(e.and_(start, i64(-grain)), first, row)
        e.store(e.and_(e.add(end, i64(grain - 1)), i64(-grain)), last, row)

    if mod is None or mask is None or mask.is_stretch:
        with e.loop(0, place.rows) as row:
            keep(row.index, *_attend_stretch(e, frame, place, bits, row.index, mod, whole))
    else:
        with e.loop(0, place.rows, 1, mod.hoist_row(i64(0))) as row:
            before, row.next = row.values, mod.hoist_row(row.index)
            same = e.compare("sgt", row.index, i64(0))
            for x, y in zip(before, row.next, strict=True):
                same = e.and_(same, _is_same(e, x, y))
            with e.if_(same):
                _repeat_row(e, frame, bits, (first, last), row.index)
            with e.if_(e.op("xor", same, const("i1", True))):
                keep(row.index, *_attend_row(e, frame, place, bits, row.index, mod, whole))
    frame.row_panels(e, place.rows, lambda row, count: _join(e, first, last, row, count))
    e.ret()
    return e.function, arrays


def _attend_stretch(e: Emitter, frame: Frame, place: Place, bits: Value, row: Value,
                    mod: Injected | None, whole: Value) -> tuple[Value, Value]:
    """Bits of one row that attends one stretch of columns; where that begins and ends."""
    start, end = place.skip, place.count
    if mod is not None:
        low, high = (e.sub(key, place.kv_start) for key in mod.row_stretch(row))
        start = e.select(whole, start, e.max(start, low))
        end = e.select(whole, end, e.min(end, high))
    some = e.compare("slt", start, end)
    start, end = e.select(some, start, place.width), e.select(some, end, i64(0))
    first, after = (e.splat(e.cast("trunc", x, "i32"), _WORDS) for x in (start, end))
    after = e.max(after, first)
    zero, lanes, one = (const(first.type, x) for x in (0, e.lanes, 1))
    with e.loop(0, place.width, _WORDS * e.lanes) as loop:
        column = e.add(e.splat(e.cast("trunc", loop.index, "i32"), _WORDS),
                       const_vector("i32", [i * e.lanes for i in range(_WORDS)]))
        ends = [e.op("shl", one, e.min(e.max(e.sub(x, column), zero), lanes))
                for x in (first, after)]
        words = e.cast("trunc", e.sub(ends[1], ends[0]), f"<{_WORDS} x i16>")
        e.store(words, bits_at(e, frame, bits, row, loop.index))
    return start, end


def _is_same(e: Emitter, x: Value, y: Value) -> Value:
    """Whether two scalars, or two vectors, have the same bits."""
    word = {"float": "i32", "double": "i64"}.get(element(x.type))
    if word is not None:
        x, y = (e.cast("bitcast", v, vector_type(lanes_of(x.type), word)) for v in (x, y))
    equal = e.compare("eq", x, y)
    return e.all(equal) if lanes_of(x.type) else equal


def _repeat_row(e: Emitter, frame: Frame, bits: Value, ends: tuple[Value, Value],
                row: Value) -> None:
    """What the row before it attends: rows of one document attend the same keys."""
    before = e.sub(row, i64(1))
    for array in ends:
        e.store(e.load(array, "i64", before), array, row)
    words = vector_type(frame.tile.tile_kv // e.lanes, "i16")
    source, target = (bits_at(e, frame, bits, x, i64(0)) for x in (before, row))
    e.store(e.load(source, words), target)


def _attend_row(e: Emitter, frame: Frame, place: Place, bits: Value, row: Value,
                mod: Injected, whole: Value) -> tuple[Value, Value]:
    """Bits of one row, which is hoisted; the columns from the first to after the last vector with
    one set."""
    ignore = e.splat(whole)
    with e.loop(0, place.width, e.lanes, [place.width, i64(0)]) as loop:
        low, high = (e.splat(e.cast("trunc", e.sub(bound, loop.index), "i32"))
                     for bound in (place.skip, place.count))
        lane = e.lane_ids("i32")
        attended = e.and_(e.compare("sge", lane, low), e.compare("slt", lane, high))
        allowed = mod.emit(loop.index, attended, None)
        attended = e.and_(attended, e.or_(allowed, ignore))
        e.store_bits(attended, bits_at(e, frame, bits, row, loop.index))
        some = e.any(attended)
        start = e.select(some, loop.index, place.width)
        end = e.select(some, e.add(loop.index, i64(e.lanes)), i64(0))
        loop.next = [e.min(start, loop.values[0]), e.max(end, loop.values[1])]
    return loop.values[0], loop.values[1]


def bits_at(e: Emitter, frame: Frame, bits: Value, row: Value, column: Value) -> Value:
    """Two bytes for each vector of scores."""
    at = e.add(e.mul(row, i64(frame.tile.tile_kv)), column)
    return e.at(bits, e.op("lshr", at, i64(e.lanes.bit_length() - 1)), "i16")


def _join(e: Emitter, first: Value, last: Value, row: Value, count: int) -> None:
    """One range of columns for a panel of rows."""
    start, end = e.load(first, "i64", row), e.load(last, "i64", row)
    first, last = e.at(first, row, "i64"), e.at(last, row, "i64")
    for i in range(1, count):
        start = e.min(e.load(first, "i64", i), start)
        end = e.max(e.load(last, "i64", i), end)
    for i in range(count):
        e.store(start, first, i)
        e.store(end, last, i)


def emit_attend_all(module: Module, frame: Frame) -> Function:
    """attend_all(scratch, width): every row has all columns; needs no bits."""
    e = module.function("attend_all", ["ptr", "i64"])
    scratch, width = e.params
    first, last = (frame.array(e, scratch, n) for n in ("first", "last"))
    with e.loop(0, frame.tile.tile_q) as row:
        e.store(i64(0), first, row.index)
        e.store(width, last, row.index)
    e.ret()
    return e.function


# Scores to probabilities


def emit_softmax(module: Module, frame: Frame, names: Sequence[str], score: KernelMod | None,
                 masked: bool) -> tuple[Function, int]:
    """softmax_*(arguments, scratch, place...). Also gives how many column arrays it keeps."""
    e = module.function("softmax_partial" if masked else "softmax_full", ["ptr", "ptr", *PLACE])
    scratch, place = e.params[1], Place(*e.params[2:])
    mod, arrays = None, 0
    if score is not None:
        mod = Injected(e, score, "score", Arguments(e, e.params[0], names), place)
        arrays = mod.hoist_columns(frame.array(e, scratch, "columns"), frame.column_array_bytes)
    with e.loop(0, place.rows, e.lanes) as group:
        last = e.min(e.add(group.index, i64(e.lanes)), place.rows)

        def maximum(row: Value, s: Value, span: tuple[Value, Value]) -> Value:
            bits = frame.array(e, scratch, "attended") if masked else None
            if mod is None and bits is None:
                return _maximum(e, frame, s, span)
            return _apply(e, frame, mod, s, row, span, bits)

        def exponentiate(row: Value, s: Value, span: tuple[Value, Value]) -> Value:
            base = e.load(frame.array(e, scratch, "base"), e.real, row)
            return _exponentiate(e, frame, s, e.splat(base), span)

        _each_row(e, frame, scratch, group.index, last, "tile_maximum", maximum)
        rescale = _rescale(e, frame, scratch, group.index)
        _each_row(e, frame, scratch, group.index, last, "tile_total", exponentiate)
        total = frame.array(e, scratch, "total")
        e.store(e.fma(e.load(total, e.vector, group.index), rescale,
                      e.load(frame.array(e, scratch, "tile_total"), e.vector, group.index)),
                total, group.index)
    e.ret()
    return e.function, arrays


def _each_row(e: Emitter, frame: Frame, scratch: Value, start: Value, end: Value, result: str,
              body: Callable[[Value, Value, tuple[Value, Value]], Value]) -> None:
    """result[row] = body(row, its scores, the range of its columns in whole panels)."""
    with e.loop(start, end) as row:
        s = e.at(frame.array(e, scratch, "scores"), e.mul(row.index, i64(frame.score_stride)),
                 e.real)
        first, last = (e.load(frame.array(e, scratch, n), "i64", row.index)
                       for n in ("first", "last"))
        span = (e.and_(first, i64(-frame.columns)),
                e.and_(e.add(last, i64(frame.columns - 1)), i64(-frame.columns)))
        e.store(body(row.index, s, span), frame.array(e, scratch, result), row.index)


def _maximum(e: Emitter, frame: Frame, s: Value, span: tuple[Value, Value]) -> Value:
    empty = [e.number(-math.inf)] * frame.tile.vectors
    with e.loop(*span, frame.columns, empty) as loop:
        at = e.at(s, loop.index, e.real)
        loop.next = [e.max(e.load(at, e.vector, j * e.lanes), m)
                     for j, m in enumerate(loop.values)]
    return _fold(e, loop.values, e.max)


def _apply(e: Emitter, frame: Frame, mod: Injected | None, s: Value, row: Value,
           span: tuple[Value, Value], bits: Value | None) -> Value:
    """Score mod and mask on one row, in place; its maximum."""
    if mod is not None:
        mod.hoist_row(row)
    with e.loop(*span, e.lanes, [e.number(-math.inf)]) as loop:
        score = e.load_to_change(s, e.vector, loop.index)
        attended = const(e.vec("i1"), True)
        if bits is not None:
            attended = e.load_bits(bits_at(e, frame, bits, row, loop.index))
        if mod is not None:
            score = e.fmul(mod.emit(loop.index, attended, score), e.number(LOG2_E))
        if bits is not None:
            score = e.select(attended, score, e.number(-math.inf))
        e.store(score, s, loop.index)
        loop.next = [e.max(score, loop.values[0])]
    return e.reduce(loop.values[0], e.max)


def _rescale(e: Emitter, frame: Frame, scratch: Value, group: Value) -> Value:
    """The new maximum of a vector of rows, and what it does to earlier sums. A row with nothing
    attended so far subtracts 0 instead of -inf."""
    maximum = frame.array(e, scratch, "maximum")
    old = e.load_to_change(maximum, e.vector, group)
    new = e.max(e.load(frame.array(e, scratch, "tile_maximum"), e.vector, group), old)
    base = e.select(e.compare("oeq", new, e.number(-math.inf)), e.number(0.0), new)
    rescale = e.exp2(e.fsub(old, base))
    e.store(new, maximum, group)
    e.store(base, frame.array(e, scratch, "base"), group)
    e.store(rescale, frame.array(e, scratch, "rescale"), group)
    return rescale


def _exponentiate(e: Emitter, frame: Frame, s: Value, base: Value,
                  span: tuple[Value, Value]) -> Value:
    """s = 2^(s - base) in place (as bfloat16, closer together, where pairs are multiplied); the
    sum."""
    with e.loop(*span, frame.columns, [e.number(0.0)] * frame.tile.vectors) as loop:
        at, totals = e.at(s, loop.index, e.real), []
        for j, total in enumerate(loop.values):
            p = e.exp2(e.fsub(e.load(at, e.vector, j * e.lanes), base))
            if frame.pairs:
                e.store(e.cast("fptrunc", p, e.vec("bfloat")), s,
                        e.add(loop.index, i64(j * e.lanes)))
            else:
                e.store(p, at, j * e.lanes)
            totals.append(e.fadd(total, p))
        loop.next = totals
    return _fold(e, loop.values, e.fadd)


def _fold(e: Emitter, vectors: Sequence[Value], combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes of some vectors as one scalar."""
    total = vectors[0]
    for x in vectors[1:]:
        total = combine(total, x)
    return e.reduce(total, combine)
