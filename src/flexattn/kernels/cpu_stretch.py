"""Rows of scores that attend one stretch of keys each: causal masks, windows, keys that end.

In: a mask that is a stretch (or none). Out, in scratch memory: the stretch of each row of a tile
of queries, once; for each tile of keys which of its columns that leaves, and where every row of a
panel attends. Scores beside the stretch become -inf as they are stored, so that nothing else reads
the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexattn.kernels.cpu_dsl import Emitter, Function, Module, Value, const_vector, i64
from flexattn.kernels.cpu_frame import Arguments, Frame
from flexattn.kernels.cpu_rows import ROWS
from flexattn.kernels.cpu_sites import KernelMod, RowSite

STEP = ("ptr", *("i64",) * 5, "i1")  # scratch, rows, kv_start, skip, count, width, whole


def emit_stretches(module: Module, frame: Frame, names: Sequence[str],
                   mask: KernelMod | None) -> Function:
    """stretches(ROWS): each row's stretch of keys, and the hull of all."""
    e = module.function("stretches", ROWS)
    a, (scratch, b, h, q_start, rows) = Arguments(e, e.params[0], names), e.params[1:]
    tables = [a.address(f"mask_{n}") for n in ("captures", "numbers", "fault")]
    low, high, hull = (frame.array(e, scratch, n) for n in ("low", "high", "hull"))
    kv_len = a.get("kv_len")
    with e.loop(0, rows, 1, [kv_len, i64(0)]) as row:
        start, end = i64(0), kv_len
        if mask is not None:
            site = RowSite(b, h, e.add(q_start, row.index), *tables)
            start, end = (e.min(x, kv_len) for x in mask.row_stretch(e, site))
        e.store(start, low, row.index)
        e.store(end, high, row.index)
        some = e.compare("slt", start, end)
        row.next = [e.min(e.select(some, start, kv_len), row.values[0]),
                    e.max(e.select(some, end, i64(0)), row.values[1])]
    for i, x in enumerate(row.values):
        e.store(x, hull, i)
    e.ret()
    return e.function


def within_hull(e: Emitter, frame: Frame, scratch: Value, begin: Value, end: Value,
                whole: Value) -> tuple[Value, Value]:
    """What of a run of keys any row attends; all of it where the run is whole."""
    hull = frame.array(e, scratch, "hull")
    low, high = (e.load(hull, "i64", i) for i in range(2))
    return (e.select(whole, begin, e.max(begin, low)), e.select(whole, end, e.min(end, high)))


def emit_clip(module: Module, frame: Frame, grain: int) -> Function:
    """clip(STEP): the columns of a tile of keys that each row attends; for panels of rows those
    that any of them does, in multiples of `grain`, and those that all do."""
    e = module.function("clip", STEP)
    scratch, rows, kv_start, skip, count, width, whole = e.params
    low, high, start, end, first, last, inner_first, inner_last = (
        frame.array(e, scratch, n) for n in
        ("low", "high", "start", "end", "first", "last", "inner_first", "inner_last"))
    with e.loop(rows, frame.tile.tile_q) as row:
        for array, value in ((start, width), (end, i64(0))):
            e.store(e.cast("trunc", value, "i32"), array, row.index)
        for array, value in ((first, width), (last, i64(0)), (inner_first, width),
                             (inner_last, i64(0))):
            e.store(value, array, row.index)
    with e.loop(0, rows) as row:
        own = [e.sub(e.load(array, "i64", row.index), kv_start) for array in (low, high)]
        begin = e.select(whole, skip, e.max(skip, own[0]))
        after = e.select(whole, count, e.min(count, own[1]))
        some = e.compare("slt", begin, after)
        begin, after = e.select(some, begin, width), e.select(some, after, i64(0))
        for array, value in ((start, begin), (end, after)):
            e.store(e.cast("trunc", value, "i32"), array, row.index)
        e.store(begin, inner_first, row.index)
        e.store(after, inner_last, row.index)
        e.store(e.and_(begin, i64(-grain)), first, row.index)
        e.store(e.and_(e.add(after, i64(grain - 1)), i64(-grain)), last, row.index)

    def join(row: Value, rows: int) -> None:
        for array, combine in ((first, e.min), (last, e.max), (inner_first, e.max),
                               (inner_last, e.min)):
            values = e.at(array, row, "i64")
            total = e.load(values, "i64", 0)
            for i in range(1, rows):
                total = combine(e.load(values, "i64", i), total)
            for i in range(rows):
                e.store(total, values, i)

    frame.row_panels(e, rows, join)
    e.ret()
    return e.function


def cut_edges(e: Emitter, frame: Frame, scratch: Value, rows: tuple[Value, int], column: Value,
              scores: Value) -> None:
    """-inf for what rows (the first one, how many) do not attend in one panel of scores."""
    start, end, inner_first, inner_last = (
        e.at(frame.array(e, scratch, name), rows[0], type) for name, type in
        (("start", "i32"), ("end", "i32"), ("inner_first", "i64"), ("inner_last", "i64")))
    begins = e.compare("slt", column, e.load(inner_first, "i64"))
    ends = e.compare("slt", e.load(inner_last, "i64"), e.add(column, i64(frame.columns)))
    with e.if_(e.or_(begins, ends)), e.loop(0, rows[1]) as row:
        line = e.at(scores, e.mul(row.index, i64(frame.score_stride)), e.real)
        low, high = (e.splat(e.sub(e.load(array, "i32", row.index), e.cast("trunc", column, "i32")))
                     for array in (start, end))
        for at in range(0, frame.columns, e.lanes):
            ids = const_vector("i32", range(at, at + e.lanes))
            attended = e.and_(e.compare("sge", ids, low), e.compare("slt", ids, high))
            x = e.load_to_change(line, e.vector, at)
            e.store(e.select(attended, x, e.number(-math.inf)), line, at)
