"""The matrix products of one tile of the CPU backward kernel, and moving its lines.

In: a tile's operands in scratch memory (cpu_backward_frame.py). Out: s = q k^T and d p = d_out v^T;
d_v += p^T d_out, d_k += (d s)^T q and d_q += (d s) k. Only rows and columns with an attended score
are computed.
"""

from __future__ import annotations

from flexattn.kernels.cpu_backward_frame import BackwardFrame
from flexattn.kernels.cpu_dsl import Emitter, Function, Module, Value, const, i64
from flexattn.kernels.cpu_pack import interleave
from flexattn.kernels.cpu_product import (
    PAIRS,
    Accumulators,
    Left,
    Right,
    accumulators,
    multiply,
)


def emit_outer(module: Module, frame: BackwardFrame, name: str, dim: int, left: str, panels: str,
               result: str) -> Function:
    """name(scratch, rows, width, factor): result = left panels^T, over columns that a row attends;
    times the factor where pairs are multiplied (otherwise left holds it)."""
    e = module.function(name, ["ptr", "i64", "i64", module.real])
    scratch, rows, width, factor = e.params
    a, b, c, first, last = (frame.array(e, scratch, n)
                            for n in (left, panels, result, "first", "last"))
    line, stride, factors = frame.row_words(dim), frame.score_stride, e.splat(factor)
    with e.loop(0, width, frame.columns) as column:
        panel = e.at(b, e.mul(column.index, i64(frame.depth(dim))), frame.word)

        def product(row: Value, count: int) -> None:
            inside = e.and_(e.compare("sle", e.load(first, "i64", row), column.index),
                            e.compare("slt", column.index, e.load(last, "i64", row)))
            with e.if_(inside):
                acc = multiply(e, accumulators(e, count, frame.tile.vectors),
                               Left(e.at(a, e.mul(row, i64(line)), e.real), line),
                               Right(panel, frame.columns, frame.packed), frame.words(dim))
                if frame.pairs:
                    acc = [[e.fmul(x, factors) for x in xs] for xs in acc]
                at = e.add(e.mul(row, i64(stride)), column.index)
                _store(e, acc, e.at(c, at, e.real), stride)

        frame.row_panels(e, rows, product)
    e.ret()
    return e.function


def emit_by_keys(module: Module, frame: BackwardFrame, name: str, dim: int, left: str, right: str,
                 result: str) -> Function:
    """name(scratch, width): result += left^T right, over rows that attend a column."""
    e = module.function(name, ["ptr", "i64"])
    scratch, width = e.params
    a, b, c, first, last = (frame.array(e, scratch, n)
                            for n in (left, right, result, "row_first", "row_last"))
    line, stride, columns = frame.line(dim), frame.score_stride, frame.columns
    with e.loop(0, width, columns) as column:
        panel = e.op("sdiv", column.index, i64(columns))
        start = frame.in_words(e, e.load(first, "i64", panel))
        depth = e.sub(frame.in_words(e, e.load(last, "i64", panel)), start)
        with e.if_(e.compare("sgt", depth, i64(0))), e.loop(0, dim, columns) as d:
            rights = Right(e.at(b, e.add(e.mul(start, i64(line)), d.index), e.real), line,
                           _stored(e, frame))
            lefts = e.at(a, e.add(e.mul(start, i64(stride)), column.index), e.real)
            results = e.at(c, e.add(e.mul(column.index, i64(line)), d.index), e.real)
            begin = 0
            for count in _even_parts(columns, frame.tile.rows):
                to = e.at(results, begin * line, e.real)
                acc = multiply(e, _load(e, to, line, count, frame.tile.vectors),
                               Left(e.at(lefts, begin, e.real), 1, stride), rights, depth)
                _store(e, acc, to, line)
                begin += count
    e.ret()
    return e.function


def emit_by_queries(module: Module, frame: BackwardFrame) -> Function:
    """d_query(scratch, rows): d_query += slopes keys, over columns that a row attends."""
    e = module.function("d_query", ["ptr", "i64"])
    scratch, rows = e.params
    a, b, c, first, last = (frame.array(e, scratch, n)
                            for n in ("slopes", "keys", "d_query", "first", "last"))
    line, stride = frame.line(frame.head_dim), frame.score_stride
    with e.loop(0, frame.head_dim, frame.columns) as d:

        def product(row: Value, count: int) -> None:
            start, end = (frame.in_words(e, e.load(x, "i64", row)) for x in (first, last))
            depth = e.max(e.sub(end, start), i64(0))
            to = e.at(c, e.add(e.mul(row, i64(line)), d.index), e.real)
            left = Left(e.at(a, e.add(e.mul(row, i64(stride)), start), e.real), stride)
            right = Right(e.at(b, e.add(e.mul(start, i64(line)), d.index), e.real), line,
                          _stored(e, frame))
            acc = _load(e, to, line, count, frame.tile.vectors)
            _store(e, multiply(e, acc, left, right, depth), to, line)

        frame.row_panels(e, rows, product)
    e.ret()
    return e.function


def emit_pairs(module: Module, frame: BackwardFrame) -> Function:
    """pairs(scratch, rows, width): p and d s as words of two rows, and d s of two columns."""
    e = module.function("pairs", ["ptr", "i64", "i64"])
    scratch, rows, width = e.params
    p, d_s, d_s_pairs = (frame.array(e, scratch, n) for n in ("scores", "slopes", "slope_pairs"))
    stride = i64(frame.score_stride)
    with e.loop(0, _padded(e, frame, rows), 2) as row, e.loop(0, width, e.lanes) as column:
        at = [e.add(e.mul(e.add(row.index, i64(i)), stride), column.index) for i in range(2)]
        word = e.add(e.mul(e.op("lshr", row.index, i64(1)), stride), column.index)
        for array, to in ((p, p), (d_s, d_s_pairs)):
            x, y = (e.cast("fptrunc", e.load(array, e.vector, i), e.vec("bfloat")) for i in at)
            e.store(e.cast("bitcast", interleave(e, x, y), e.vector), to, word)
        for i, half in enumerate((x, y)):
            line = e.at(d_s, e.mul(e.add(row.index, i64(i)), stride), e.real)
            e.store(half, line, column.index)
    e.ret()
    return e.function


def _padded(e: Emitter, frame: BackwardFrame, rows: Value) -> Value:
    return e.and_(e.add(rows, i64(frame.multiple - 1)), i64(-frame.multiple))


def _stored(e: Emitter, frame: BackwardFrame) -> str:
    """The storage of lines."""
    if frame.pairs:
        return PAIRS
    return "float64" if e.real == "double" else "float32"


def _even_parts(columns: int, most: int) -> list[int]:
    """A panel's columns in as few and even parts as `most` rows of accumulators allow."""
    parts = -(-columns // most)
    return [columns // parts + (i < columns % parts) for i in range(parts)]


def _load(e: Emitter, at: Value, line: int, rows: int, vectors: int) -> Accumulators:
    return [[e.load(at, e.vector, i * line + j * e.lanes) for j in range(vectors)]
            for i in range(rows)]


def _store(e: Emitter, acc: Accumulators, at: Value, line: int) -> None:
    for i, row in enumerate(acc):
        for j, x in enumerate(row):
            e.store(x, at, i * line + j * e.lanes)


def emit_spans(module: Module, frame: BackwardFrame) -> Function:
    """spans(scratch, rows, width): row_first and row_last from first and last; multiples of
    frame.multiple, since rows up to the next one are zero."""
    e = module.function("spans", ["ptr", "i64", "i64"])
    scratch, rows, width = e.params
    first, last, row_first, row_last = (frame.array(e, scratch, n) for n in
                                        ("first", "last", "row_first", "row_last"))
    with e.loop(0, width, frame.columns) as column:
        with e.loop(0, rows, 1, [rows, i64(0)]) as row:
            inside = e.and_(e.compare("sle", e.load(first, "i64", row.index), column.index),
                            e.compare("slt", column.index, e.load(last, "i64", row.index)))
            start = e.select(inside, e.min(row.values[0], row.index), row.values[0])
            end = e.select(inside, e.add(row.index, i64(1)), row.values[1])
            row.next = [start, end]
        start, end = row.values
        panel = e.op("sdiv", column.index, i64(frame.columns))
        e.store(e.and_(start, i64(-frame.multiple)), row_first, panel)
        e.store(_padded(e, frame, end), row_last, panel)
    e.ret()
    return e.function


# Lines


def emit_load_lines(module: Module, frame: BackwardFrame, name: str, dim: int) -> Function:
    """name(tensor, stride, stride_d, rows, factor, lines): rows times factor, zeros in what rows
    lack to a multiple of frame.multiple and lines to whole panels."""
    e = module.function(name, ["ptr", "i64", "i64", "i64", module.real, "ptr"])
    source, stride, stride_d, rows, factor, lines = e.params
    factors, line = e.splat(factor), frame.line(dim)
    padded = -(-dim // frame.columns) * frame.columns
    vectors = e.select(e.compare("eq", stride_d, i64(1)), i64(dim - dim % e.lanes), i64(0))
    with e.loop(0, rows) as row:
        start = e.at(source, e.mul(row.index, stride), frame.word)
        target = e.at(lines, e.mul(row.index, i64(line)), e.real)
        with e.loop(0, vectors, e.lanes) as d:
            e.store(e.fmul(e.load_as(frame.storage, start, d.index), factors), target, d.index)
        with e.loop(vectors, dim) as d:
            x = e.load_as(frame.storage, start, e.mul(d.index, stride_d), scalar=True)
            e.store(e.fmul(x, factor), target, d.index)
        with e.loop(dim, padded) as d:
            e.store(e.scalar(0.0), target, d.index)
    with e.loop(rows, _padded(e, frame, rows)) as row, e.loop(0, padded, e.lanes) as d:
        e.store(e.number(0.0), lines, e.add(e.mul(row.index, i64(line)), d.index))
    e.ret()
    return e.function


def emit_load_pairs(module: Module, frame: BackwardFrame, name: str, dim: int) -> Function:
    """name(tensor, stride, stride_d, rows, end, lines): words of two rows, zeros in what rows lack
    to `end` (even) and lines to whole panels."""
    e = module.function(name, ["ptr", "i64", "i64", "i64", "i64", "ptr"])
    source, stride, stride_d, rows, end, lines = e.params
    line, padded = frame.line(dim), -(-dim // frame.columns) * frame.columns
    vectors = e.select(e.compare("eq", stride_d, i64(1)), i64(dim - dim % e.lanes), i64(0))
    with e.loop(0, rows, 2) as row:
        both = e.compare("slt", e.add(row.index, i64(1)), rows)
        first = e.at(source, e.mul(row.index, stride), frame.word)
        second = e.at(first, e.select(both, stride, i64(0)), frame.word)
        kept = e.select(both, const("i16", -1), const("i16", 0))
        target = e.at(lines, e.mul(e.op("lshr", row.index, i64(1)), i64(line)), e.real)
        for start, stop, step, lanes in ((i64(0), vectors, e.lanes, e.lanes),
                                         (vectors, i64(dim), 1, 1)):
            type = f"<{lanes} x i16>"
            with e.loop(start, stop, step) as d:
                at = d.index if lanes > 1 else e.mul(d.index, stride_d)
                x, y = (e.load(tensor, type, at) for tensor in (first, second))
                y = e.and_(y, e.splat(kept, lanes))
                word = e.cast("bitcast", interleave(e, x, y), f"<{lanes} x float>")
                e.store(word, target, d.index)
        with e.loop(dim, padded) as d:
            e.store(e.scalar(0.0), target, d.index)
    with e.loop(e.and_(e.add(rows, i64(1)), i64(-2)), end, 2) as row, \
            e.loop(0, padded, e.lanes) as d:
        at = e.mul(e.op("lshr", row.index, i64(1)), i64(line))
        e.store(e.number(0.0), lines, e.add(at, d.index))
    e.ret()
    return e.function


def emit_store_lines(module: Module, frame: BackwardFrame, name: str, dim: int) -> Function:
    """name(lines, line stride, rows, factor, tensor): rows times factor, into contiguous rows."""
    e = module.function(name, ["ptr", "i64", "i64", module.real, "ptr"])
    lines, line, rows, factor, target = e.params
    factors, whole = e.splat(factor), dim - dim % e.lanes
    with e.loop(0, rows) as row:
        source = e.at(lines, e.mul(row.index, line), e.real)
        to = e.at(target, e.mul(row.index, i64(dim)), frame.word)
        with e.loop(0, whole, e.lanes) as d:
            e.store_as(frame.storage, e.fmul(e.load(source, e.vector, d.index), factors), to,
                       d.index)
        with e.loop(whole, dim) as d:
            e.store_as(frame.storage, e.fmul(e.load(source, e.real, d.index), factor), to, d.index)
    e.ret()
    return e.function


def emit_add_lines(module: Module, frame: BackwardFrame, dim: int) -> Function:
    """add_lines(lines, rows, factor, total): rows times factor, into contiguous rows of the type
    computed in."""
    e = module.function("add_lines", ["ptr", "i64", module.real, "ptr"])
    lines, rows, factor, target = e.params
    factors, whole = e.splat(factor), dim - dim % e.lanes
    with e.loop(0, rows) as row:
        source = e.at(lines, e.mul(row.index, i64(frame.line(dim))), e.real)
        to = e.at(target, e.mul(row.index, i64(dim)), e.real)
        for start, end, step, by in ((0, whole, e.lanes, factors), (whole, dim, 1, factor)):
            with e.loop(start, end, step) as d:
                x, total = (e.load(line, by.type, d.index) for line in (source, to))
                e.store(e.fma(x, by, total), to, d.index)
    e.ret()
    return e.function


def emit_clear(module: Module) -> Function:
    """clear(numbers, count): `count` zeros of the type computed in."""
    e = module.function("clear", ["ptr", "i64"])
    numbers, count = e.params
    whole = e.and_(count, i64(-e.lanes))
    with e.loop(0, whole, e.lanes) as at:
        e.store(e.number(0.0), numbers, at.index)
    with e.loop(whole, count) as at:
        e.store(e.scalar(0.0), numbers, at.index)
    e.ret()
    return e.function

