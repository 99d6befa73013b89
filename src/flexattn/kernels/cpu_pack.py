"""Packing of a matrix into the panels that `multiply` reads.

In: element (k, c) of a strided matrix, k along the depth of a product, c along its columns. Out:
one panel [depth][columns] in the tensor's dtype, zeros beyond the valid part; in a line of
bfloat16 each pair of vectors is interleaved (0, lanes, 1, lanes + 1, ...). Keys are packed with
c = key, k = head dimension, values with c = dimension, k = key; whichever axis is contiguous is
copied in vectors, anything else element by element. Where bfloat16 is multiplied in pairs, two
elements that follow each other along the depth, which is even then, share a word.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexattn.kernels.cpu_dsl import (
    Emitter,
    Function,
    Module,
    Value,
    const,
    i64,
    lanes_of,
    vector_type,
)

WORD = {"float32": "i32", "bfloat16": "i16", "float16": "i16", "float64": "i64"}


def emit_pack(module: Module, columns: int, pairs: bool = False) -> Function:
    """pack(source, column_stride, depth_stride, valid_columns, valid_depth, depth, panel)."""
    copy, turn, place = ((_copy_pair, _transpose_pairs, _place_of_pair) if pairs else
                         (_copy_line, _transpose_lines, _place))
    step = 2 if pairs else 1
    e = module.function("pack", ["ptr", "i64", "i64", "i64", "i64", "i64", "ptr"])
    source, column_stride, depth_stride, valid_columns, valid_depth, depth, panel = e.params
    whole = e.compare("eq", valid_columns, i64(columns))
    along = e.and_(whole, e.compare("eq", column_stride, i64(1)))
    across = e.and_(e.and_(whole, e.compare("eq", depth_stride, i64(1))),
                    e.op("xor", along, const("i1", True)))
    copied = e.select(along, e.and_(valid_depth, i64(-step)), i64(0))
    with e.loop(0, copied, step) as loop:
        copy(e, source, depth_stride, loop.index, columns, panel)
    turned = e.select(across, e.and_(valid_depth, i64(-step * e.lanes)), i64(0))
    with e.loop(0, turned, step * e.lanes) as loop:
        turn(e, source, column_stride, loop.index, columns, panel)
    with e.loop(e.max(copied, turned), depth) as line, e.loop(0, columns) as column:
        k, c = line.index, column.index
        inside = e.and_(e.compare("slt", k, valid_depth), e.compare("slt", c, valid_columns))
        at = e.add(e.mul(k, depth_stride), e.mul(c, column_stride))
        x = e.load(source, WORD[module.storage], e.select(inside, at, i64(0)))
        target = place(e, k, c, columns)
        e.store(e.select(inside, x, const(x.type, 0)), panel, target)
    e.ret()
    return e.function


def _place(e: Emitter, k: Value, c: Value, columns: int) -> Value:
    """Where element (k, c) lies in a panel."""
    line = e.mul(k, i64(columns))
    if e.module.storage != "bfloat16":
        return e.add(line, c)
    lane, vector = e.and_(c, i64(e.lanes - 1)), e.op("sdiv", c, i64(e.lanes))
    pair = e.mul(e.op("lshr", vector, i64(1)), i64(2 * e.lanes))
    return e.add(e.add(line, pair), e.add(e.mul(lane, i64(2)), e.and_(vector, i64(1))))


def _place_of_pair(e: Emitter, k: Value, c: Value, columns: int) -> Value:
    first = e.mul(e.and_(k, i64(-2)), i64(columns))
    return e.add(first, e.add(e.mul(c, i64(2)), e.and_(k, i64(1))))


def _interleaving(lanes: int, columns: int) -> list[int]:
    """The columns of a line of bfloat16, in the order they are packed in."""
    return [pair + i // 2 + lanes * (i % 2)
            for pair in range(0, columns, 2 * lanes) for i in range(2 * lanes)]


def _copy_line(e: Emitter, source: Value, stride: Value, k: Value, columns: int,
               panel: Value) -> None:
    """One line whose elements are contiguous."""
    x = e.load(source, vector_type(columns, WORD[e.module.storage]), e.mul(k, stride))
    if e.module.storage == "bfloat16":
        x = e.shuffle(x, x, _interleaving(e.lanes, columns))
    e.store(x, panel, e.mul(k, i64(columns)))


def _transpose_lines(e: Emitter, source: Value, stride: Value, k: Value, columns: int,
                     panel: Value) -> None:
    """e.lanes lines of columns that are contiguous along the depth."""
    paired = e.module.storage == "bfloat16"
    for group in range(0, columns, e.lanes * (2 if paired else 1)):

        def column(c: int) -> Value:
            return e.load(source, e.vec(WORD[e.module.storage]), e.add(e.mul(i64(c), stride), k))

        if paired:
            picks = _interleaving(e.lanes, 2 * e.lanes)
            block = [e.cast("bitcast", e.shuffle(column(c), column(c + e.lanes), picks),
                            e.vec("i32")) for c in range(group, group + e.lanes)]
        else:
            block = [column(c) for c in range(group, group + e.lanes)]
        for i, x in enumerate(transpose(e, block)):
            if paired:
                x = e.cast("bitcast", x, f"<{2 * e.lanes} x i16>")
            e.store(x, panel, e.add(e.mul(e.add(k, i64(i)), i64(columns)), i64(group)))


def _copy_pair(e: Emitter, source: Value, stride: Value, k: Value, columns: int,
               panel: Value) -> None:
    """Two lines whose elements are contiguous."""
    x, y = (e.load(source, vector_type(columns, "i16"), e.mul(e.add(k, i64(i)), stride))
            for i in range(2))
    e.store(interleave(e, x, y), panel, e.mul(k, i64(columns)))


def _transpose_pairs(e: Emitter, source: Value, stride: Value, k: Value, columns: int,
                     panel: Value) -> None:
    """e.lanes lines of pairs of columns that are contiguous along the depth."""
    for group in range(0, columns, e.lanes):
        block = [e.cast("bitcast", e.load(source, f"<{2 * e.lanes} x i16>",
                                          e.add(e.mul(i64(c), stride), k)), e.vec("i32"))
                 for c in range(group, group + e.lanes)]
        for i, x in enumerate(transpose(e, block)):
            at = e.add(e.mul(e.add(k, i64(2 * i)), i64(columns)), i64(2 * group))
            e.store(e.cast("bitcast", x, f"<{2 * e.lanes} x i16>"), panel, at)


def interleave(e: Emitter, x: Value, y: Value) -> Value:
    """x[0], y[0], x[1], y[1], ..."""
    n = lanes_of(x.type)
    return e.shuffle(x, y, [i // 2 + n * (i % 2) for i in range(2 * n)])


def emit_copy_rows(module: Module, name: str, dim: int, line: int) -> Function:
    """name(source, stride, stride_d, rows, total, lines): rows of bfloat16, as they are, `line`
    apart; zeros after an odd `dim` and in rows up to `total`."""
    e = module.function(name, ["ptr", "i64", "i64", "i64", "i64", "ptr"])
    source, stride, stride_d, rows, total, lines = e.params
    vectors = e.select(e.compare("eq", stride_d, i64(1)), i64(dim - dim % e.lanes), i64(0))
    with e.loop(0, rows) as row:
        start = e.at(source, e.mul(row.index, stride), "i16")
        target = e.at(lines, e.mul(row.index, i64(line)), "i16")
        with e.loop(0, vectors, e.lanes) as d:
            e.store(e.load(start, e.vec("i16"), d.index), target, d.index)
        with e.loop(vectors, dim) as d:
            e.store(e.load(start, "i16", e.mul(d.index, stride_d)), target, d.index)
        if dim % 2:
            e.store(const("i16", 0), target, dim)
    with e.loop(rows, total) as row, e.loop(0, dim + dim % 2) as d:
        e.store(const("i16", 0), lines, e.add(e.mul(row.index, i64(line)), d.index))
    e.ret()
    return e.function


def transpose(e: Emitter, block: Sequence[Value]) -> list[Value]:
    """A square of vectors turned, by swapping ever larger off-diagonal blocks."""
    out, n, size = list(block), len(block), 1
    while size < n:
        low = [i if not i & size else i - size + n for i in range(n)]
        high = [i + size if not i & size else i + n for i in range(n)]
        for i in (i for i in range(n) if not i & size):
            x, y = out[i], out[i + size]
            out[i], out[i + size] = e.shuffle(x, y, low), e.shuffle(x, y, high)
        size *= 2
    return out
