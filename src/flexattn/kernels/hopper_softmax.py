"""The arithmetic of Hopper's consumers: scores, online softmax, rows of the output.

In: a tile of products q.k in registers (the tensor cores' layout: each thread has pairs of columns
of two rows), float32. Everything here stays inside a thread, but for the maximum of a row, which
is exchanged between the four threads that share it.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

_EX2 = gl.constexpr("ex2.approx.ftz.f32 $0, $1;")
_LG2 = gl.constexpr("lg2.approx.ftz.f32 $0, $1;")
_SAME = gl.constexpr("mov.b32 $0, $1;")
_UNPACK = gl.constexpr("mov.b32 {$0, $1}, $2;")


@gluon.jit
def opaque(x):
    """The same 32 bits, of which the compiler knows nothing."""
    return gl.inline_asm_elementwise(_SAME, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)


@constexpr_function
def _pack(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.jit
def packed(p, dtype: gl.constexpr):
    """Pairs of neighbours, rounded to 16 bits, as int32 [M, N / 2]: carried through a loop as 16
    bits each, ptxas would swap the halves of every pair, and swap them back."""
    asm: gl.constexpr = _pack(dtype)
    low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True,
                                     pack=1)


@gluon.jit
def unpacked(words, dtype: gl.constexpr, layout: gl.constexpr):
    """The same as a tile [M, N] in this layout."""
    low, high = gl.inline_asm_elementwise(_UNPACK, "=h,=h,r", [words], dtype=(gl.int16, gl.int16),
                                          is_pure=True, pack=1)
    pairs = gl.join(low, high).to(dtype, bitcast=True)
    return gl.convert_layout(pairs.reshape([words.shape[0], words.shape[1] * 2]), layout)


# Four threads hold a word each of four groups; then each holds a group, as it is numbered.
_EXCHANGE = gl.constexpr("""{
    .reg .pred odd, high; .reg .b32 lane, a, b, c, d, x, y;
    mov.u32 lane, %laneid; and.b32 x, lane, 1; setp.ne.u32 odd, x, 0;
    and.b32 x, lane, 2; setp.ne.u32 high, x, 0;
    selp.b32 x, $4, $5, odd; shfl.sync.bfly.b32 x, x, 1, 31, -1;
    selp.b32 y, $6, $7, odd; shfl.sync.bfly.b32 y, y, 1, 31, -1;
    selp.b32 a, x, $4, odd; selp.b32 b, $5, x, odd;
    selp.b32 c, y, $6, odd; selp.b32 d, $7, y, odd;
    selp.b32 x, a, c, high; shfl.sync.bfly.b32 x, x, 2, 31, -1;
    selp.b32 y, b, d, high; shfl.sync.bfly.b32 y, y, 2, 31, -1;
    selp.b32 $0, x, a, high; selp.b32 $1, y, b, high;
    selp.b32 $2, c, x, high; selp.b32 $3, d, y, high;
}""")


@gluon.jit
def gathered(words):
    """The same words [M, N] in another layout: four neighbours to a thread, which the tensor cores
    give to four. No shared memory is needed."""
    fours: gl.constexpr = words.shape[1] // 16
    x = words.reshape([words.shape[0], fours, 2, 2, 4]).permute((0, 1, 4, 2, 3))
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    y0, y1, y2, y3 = gl.inline_asm_elementwise(
        _EXCHANGE, "=&r,=&r,=&r,=&r,r,r,r,r", [x0, x1, x2, x3], dtype=(gl.int32,) * 4,
        is_pure=False, pack=1)
    y = gl.join(gl.join(y0, y2), gl.join(y1, y3))  # [M, fours, group, word // 2, word % 2]
    return y.reshape(words.shape)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(_EX2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise(_LG2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def column(x, tile):
    """A number of each row, to be combined with this tile."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout)), 1)


@gluon.jit
def _row_max(s, line, LINE: gl.constexpr):
    """First within a thread, in two chains a row."""
    groups: gl.constexpr = s.shape[1] // 8
    if not LINE:
        top = gl.max(gl.max(s.reshape([s.shape[0], groups, 8]), 1), 1)
    else:
        top = gl.max(gl.max(s.reshape([s.shape[0], groups, 4, 2]), 1), 2)
        top = gl.max(top + gl.convert_layout(line, top.type.layout), 1)
    return gl.convert_layout(top, gl.SliceLayout(1, s.type.layout))


@gluon.jit
def add_line(s, slope, first, origin):
    """s + slope * (column - origin of the row), whose columns are counted from `first`, in two
    parts: what is the same for all columns of a thread, [M, 4], and the scores without it."""
    M: gl.constexpr = s.shape[0]
    groups: gl.constexpr = s.shape[1] // 8
    parts = s.reshape([M, groups, 4, 2])
    layout: gl.constexpr = parts.type.layout
    by_thread: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, layout))
    of_group: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    of_pair: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    group = gl.arange(0, groups, layout=of_group).to(gl.float32) * 8.0
    pair = gl.arange(0, 2, layout=of_pair).to(gl.float32)
    group = gl.expand_dims(gl.expand_dims(gl.expand_dims(group, 0), 2), 3)
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 1), 2)
    parts += slope * (group + pair)
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, by_thread)) * 2 + first
    thread = gl.expand_dims(thread.to(gl.float32), 0)
    line = slope * (thread - gl.convert_layout(origin, by_thread))
    return gl.convert_layout(parts.reshape([M, groups * 8]), s.type.layout), line


@gluon.jit
def _row_sums(p):
    """One partial sum per thread: [M, 4]."""
    groups: gl.constexpr = p.shape[1] // 8
    return gl.sum(gl.sum(p.reshape([p.shape[0], groups, 4, 2]), 3), 1)


@gluon.jit
def _powers(s, top, to_base2, line, LINE: gl.constexpr):
    """2 ** (to_base2 * (s - top)); 0 in a row in which nothing is attended."""
    offset = gl.where(top == -float("inf"), 0.0, top * to_base2)
    if not LINE:
        return exp2(s * to_base2 - gl.expand_dims(offset, 1)), offset
    else:
        groups: gl.constexpr = s.shape[1] // 8
        parts = s.reshape([s.shape[0], groups, 4, 2])
        less = column(top, line) - line
        less = gl.where(column(top, line) == -float("inf"), 0.0, less * to_base2)
        less = gl.expand_dims(gl.expand_dims(less, 1), 3)
        parts = exp2(parts * to_base2 - less)
        p = gl.convert_layout(parts.reshape([s.shape[0], groups * 8]), s.type.layout)
        return p, offset


@gluon.jit
def first_softmax(s, to_base2, line, LINE: gl.constexpr):
    """Unnormalised probabilities, maximum and partial sums of the first block of a row. line: with
    LINE, what is to be added to the scores of a thread."""
    top = _row_max(s, line, LINE)
    p, _ = _powers(s, top, to_base2, line, LINE)
    return p, top, _row_sums(p)


@gluon.jit
def next_softmax(s, top, total, to_base2, line, LINE: gl.constexpr):
    """The same for a further block, and the factor for what was accumulated before."""
    new_top = gl.maximum(top, _row_max(s, line, LINE))
    p, offset = _powers(s, new_top, to_base2, line, LINE)
    factor = exp2(top * to_base2 - offset)
    total = total * column(factor, total) + _row_sums(p)
    return p, new_top, total, factor


@gluon.jit
def statistics(top, total, unit):
    """Natural-log lse and the factor that normalises a row (0 where nothing was attended). unit:
    of the scores, as it was given: from a product with log2(e) every lse would be off alike."""
    top = opaque(top)  # or its product is kept in a register through the loop
    row_total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
    empty = top == -float("inf")
    lse = gl.where(empty, top, top * unit + log2(row_total) * LN2)
    return lse, gl.where(empty, 0.0, 1.0 / row_total)
