"""The ends of a tile of queries: loading it scaled, and writing its normalised rows.

In: a tile's place, a thread's scratch memory. Out: the query and empty statistics in scratch
memory; at the end out, lse and max_scores in theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexattn.kernels.cpu_dsl import NULL, Emitter, Function, Module, Value, const, i64
from flexattn.kernels.cpu_frame import LN_2, LOG2_E, Arguments, Frame
from flexattn.kernels.cpu_pack import emit_copy_rows

ROWS = ("ptr", "ptr", "i64", "i64", "i64", "i64")  # arguments, scratch, b, h, q_start, rows


def emit_start(module: Module, frame: Frame, names: Sequence[str], modded: bool) -> Function:
    """start(ROWS): the queries times scale, times log2(e) too where no score mod comes between
    (as they are where the scores are scaled instead); zeros below; empty statistics and output."""
    if frame.pairs:
        load_query = emit_copy_rows(module, "load_query", frame.head_dim,
                                    frame.depth(frame.head_dim))
    else:
        load_query = _emit_load_query(module, frame)
    e = module.function("start", ROWS)
    a, (scratch, b, h, q_start, rows) = Arguments(e, e.params[0], names), e.params[1:]
    last = i64(frame.tile.tile_q) if frame.pairs else score_factor(e, a, modded)
    query = e.at(a.address("query"), a.offset("query", b=b, h=h, s=q_start), frame.word)
    e.call(load_query, query, a.get("query_s"), a.get("query_d"), rows, last,
           frame.array(e, scratch, "query"))
    tile_q = frame.tile.tile_q
    for name, count, value in (("maximum", tile_q, -math.inf), ("total", tile_q, 0.0),
                               ("out", frame.value_panels * frame.out_panel, 0.0)):
        array = frame.array(e, scratch, name)
        with e.loop(0, count, e.lanes) as at:
            e.store(e.number(value), array, at.index)
    e.ret()
    return e.function


def score_factor(e: Emitter, a: Arguments, modded: bool) -> Value:
    """scale, times log2(e) where no score mod comes between."""
    factor = a.get("scale", "double")
    if not modded:
        factor = e.fmul(factor, const("double", LOG2_E))
    return factor if e.real == "double" else e.cast("fptrunc", factor, e.real)


def _emit_load_query(module: Module, frame: Frame) -> Function:
    """load_query(query, stride, stride_d, rows, factor, q): rows times factor, zeros below."""
    e = module.function("load_query", ["ptr", "i64", "i64", "i64", module.real, "ptr"])
    query, stride, stride_d, rows, factor, q = e.params
    depth, factors = frame.head_dim, e.splat(factor)
    whole = frame.head_dim - frame.head_dim % e.lanes
    vectors = e.select(e.compare("eq", stride_d, i64(1)), i64(whole), i64(0))
    with e.loop(0, rows) as row:
        source = e.at(query, e.mul(row.index, stride), frame.word)
        target = e.at(q, e.mul(row.index, i64(depth)), e.real)
        with e.loop(0, vectors, e.lanes) as d:
            x = e.load_as(frame.storage, source, d.index)
            e.store(e.fmul(x, factors), target, d.index)
        with e.loop(vectors, frame.head_dim) as d:
            x = e.load_as(frame.storage, source, e.mul(d.index, stride_d), scalar=True)
            e.store(e.fmul(x, factor), target, d.index)
    with e.loop(e.mul(rows, i64(depth)), frame.tile.tile_q * depth) as at:
        e.store(e.scalar(0.0), q, at.index)
    e.ret()
    return e.function


def emit_store(module: Module, frame: Frame, names: Sequence[str]) -> Function:
    """store_rows(ROWS): normalise and write the results."""
    e = module.function("store_rows", ROWS)
    a, (scratch, b, h, q_start, rows) = Arguments(e, e.params[0], names), e.params[1:]
    arrays = {n: frame.array(e, scratch, n)
              for n in ("total", "maximum", "base", "tile_total", "tile_maximum")}
    with e.loop(0, rows, e.lanes) as group:
        total = e.load(arrays["total"], e.vector, group.index)
        maximum = e.load(arrays["maximum"], e.vector, group.index)
        _statistics(e, arrays, group.index, maximum, total)
    line = e.add(e.mul(e.add(e.mul(b, e.mul(a.get("kv_heads"), a.get("group"))), h),
                       a.get("q_len")), q_start)
    for name, array in (("lse", "tile_total"), ("max_scores", "tile_maximum")):
        target = a.address(name)
        with e.if_(e.compare("ne", target, NULL)), e.loop(0, rows) as row:
            e.store(e.load(arrays[array], e.real, row.index), target, e.add(line, row.index))
    out = e.at(a.address("out"), a.offset("out", b=b, h=h, s=q_start), frame.word)
    stride, o = a.get("out_s"), frame.array(e, scratch, "out")
    with e.loop(0, rows) as row:
        _store_row(e, frame, e.at(o, e.mul(row.index, i64(frame.columns)), e.real),
                        e.load(arrays["base"], e.real, row.index),
                        e.at(out, e.mul(row.index, stride), frame.word))
    e.ret()
    return e.function


def _statistics(e: Emitter, arrays: dict[str, Value], at: Value, maximum: Value,
                total: Value) -> None:
    """lse, the largest score and 1 / total (0 for a row with nothing attended)."""
    ln2, zero = e.number(LN_2), e.number(0.0)
    infinite = e.compare("oeq", maximum, e.number(math.inf))
    lse = e.fmul(e.fadd(maximum, e.log2(total)), ln2)
    e.store(e.select(infinite, maximum, lse), arrays["tile_total"], at)
    spoilt = e.select(infinite, maximum, total)  # NaN scores do not enter the maximum
    largest = e.select(e.compare("uno", total, total), spoilt, maximum)
    e.store(e.fmul(largest, ln2), arrays["tile_maximum"], at)
    inverse = e.fdiv(e.number(1.0), total)
    e.store(e.select(e.compare("oeq", total, zero), zero, inverse), arrays["base"], at)


def _store_row(e: Emitter, frame: Frame, o: Value, inverse: Value, out: Value) -> None:
    """One row of the output: whole vectors, then what is left of value_dim."""
    whole, panel = frame.value_dim - frame.value_dim % e.lanes, frame.out_panel
    nothing = e.compare("oeq", inverse, e.scalar(0.0))

    def scaled(x: Value, factor: Value, empty: Value) -> Value:
        return e.select(empty, const(x.type, 0.0), e.fmul(x, factor))

    def place(d: Value) -> Value:
        size = i64(frame.columns)
        return e.add(e.mul(e.op("sdiv", d, size), i64(panel)), e.op("srem", d, size))

    factors, empties = e.splat(inverse), e.splat(nothing)
    with e.loop(0, whole, e.lanes) as d:
        x = scaled(e.load(o, e.vector, place(d.index)), factors, empties)
        e.store_as(frame.storage, x, out, d.index)
    with e.loop(whole, frame.value_dim) as d:
        x = scaled(e.load(o, e.real, place(d.index)), inverse, nothing)
        e.store_as(frame.storage, x, out, d.index)
