"""Packing of a matrix into the panels that `multiply` reads.

In: element (k, c) of a strided matrix, k along the depth of a product, c along its columns. Out:
one panel [depth][columns] in the tensor's dtype, zeros beyond the valid part; in a line of
bfloat16 each pair of vectors is interleaved (0, lanes, 1, lanes + 1, ...). Keys are packed with
c = key, k = head dimension, values with c = dimension, k = key; whichever axis is contiguous is
copied in vectors, anything else element by element.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexattn.kernels.cpu_dsl import Emitter, Function, Module, Value, const, i64, vector_type

WORD = {"float32": "i32", "bfloat16": "i16", "float16": "i16", "float64": "i64"}


def emit_pack(module: Module, columns: int) -> Function:
    """pack(source, column_stride, depth_stride, valid_columns, valid_depth, depth, panel)."""
    e = module.function("pack", ["ptr", "i64", "i64", "i64", "i64", "i64", "ptr"])
    source, column_stride, depth_stride, valid_columns, valid_depth, depth, panel = e.params
    whole = e.compare("eq", valid_columns, i64(columns))
    along = e.and_(whole, e.compare("eq", column_stride, i64(1)))
    across = e.and_(e.and_(whole, e.compare("eq", depth_stride, i64(1))),
                    e.op("xor", along, const("i1", True)))
    copied = e.select(along, valid_depth, i64(0))
    with e.loop(0, copied) as loop:
        _copy_line(e, source, depth_stride, loop.index, columns, panel)
    turned = e.select(across, e.and_(valid_depth, i64(-e.lanes)), i64(0))
    with e.loop(0, turned, e.lanes) as loop:
        _transpose_lines(e, source, column_stride, loop.index, columns, panel)
    with e.loop(e.max(copied, turned), depth) as line, e.loop(0, columns) as column:
        k, c = line.index, column.index
        inside = e.and_(e.compare("slt", k, valid_depth), e.compare("slt", c, valid_columns))
        at = e.add(e.mul(k, depth_stride), e.mul(c, column_stride))
        x = e.load(source, WORD[module.storage], e.select(inside, at, i64(0)))
        target = e.add(e.mul(k, i64(columns)), _place(e, c))
        e.store(e.select(inside, x, const(x.type, 0)), panel, target)
    e.ret()
    return e.function


def _place(e: Emitter, c: Value) -> Value:
    """Where column c lies in its line."""
    if e.module.storage != "bfloat16":
        return c
    lane, vector = e.and_(c, i64(e.lanes - 1)), e.op("sdiv", c, i64(e.lanes))
    pair = e.mul(e.op("lshr", vector, i64(1)), i64(2 * e.lanes))
    return e.add(pair, e.add(e.mul(lane, i64(2)), e.and_(vector, i64(1))))


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
