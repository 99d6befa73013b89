"""Kinds of the blocks of a mask, and their runs: three kernels that need no word from the host.

In: TILES, the functions of the mask's interval form, and MODS, those of the mask itself (generated
by lower/triton.py, with the arguments `tile_args` and `args`). Out: `found`, one byte a block:
0 empty, 1 partial, 2 full; then the number of runs in each line (a row of blocks), and the runs.

A block that its interval leaves open is looked at in 16 points; where these are alike, at all of
its elements, by the program that found it.
"""

import triton
import triton.language as tl


@triton.jit
def _third(number):
    """0, 3, 1, 2: ends first."""
    return tl.where(number < 2, number * 3, number - 1)


@triton.jit
def _attended(b, h, q_idx, kv_idx, args, head, MODS: tl.constexpr):
    """The mask at q_idx and kv_idx, in the shape of both together."""
    parts = (head, MODS.mod_rows(b, h, q_idx, args, head),
             MODS.mod_columns(b, h, kv_idx, args, head))
    attended = MODS.mask_mod(b, h, q_idx, kv_idx, args, parts)
    return attended & ((q_idx >= 0) & (kv_idx >= 0))


@triton.jit
def _at_points(open_, b, h, q, q_last, kv, kv_last, args, head, MODS: tl.constexpr):
    """Where blocks are still open after 16 points of each."""
    seen = tl.zeros_like(kv)
    point = 0
    while (point < 16) & (tl.max(open_.to(tl.int32), 0) > 0):
        q_idx = q + (q_last - q) * _third(point % 4) // 3
        kv_idx = kv + (kv_last - kv) * _third(point // 4) // 3
        attended = _attended(b, h, q_idx, kv_idx, args, head, MODS)
        seen = seen | tl.where(attended, 1, 2)
        open_ = open_ & (seen != 3)
        point += 1
    return open_


@triton.jit
def _of_elements(b, h, q, q_last, kv, kv_last, args, head, MODS: tl.constexpr, F: tl.constexpr):
    """The kind of one block, by all of its elements."""
    PART_Q: tl.constexpr = F.part_q
    PART_KV: tl.constexpr = F.part_kv
    rows, columns = tl.arange(0, PART_Q)[:, None], tl.arange(0, PART_KV)[None, :]
    seen = tl.zeros([PART_Q, PART_KV], tl.int32)
    top = q
    while top <= q_last:
        q_idx = tl.minimum(top + rows, q_last)
        left = kv
        while left <= kv_last:
            kv_idx = tl.minimum(left + columns, kv_last)
            attended = _attended(b, h, q_idx, kv_idx, args, head, MODS)
            seen = seen | tl.where(attended, 1, 2)
            left += PART_KV
        top += PART_Q
    some = tl.max(tl.max(seen & 1, 1), 0)
    lacking = tl.max(tl.max(seen >> 1, 1), 0)
    return tl.where(lacking == 0, 2, some)


@triton.jit
def block_kinds(found, sizes, tile_args, args, TILES: tl.constexpr, MODS: tl.constexpr,
                F: tl.constexpr):
    """sizes: heads, rows, columns, the first line, the last query and key, and the most that a kind
    may be (1: full blocks are called partial). One program does F.chunk blocks of a line."""
    heads, rows, columns, first, last_q, last_kv, most = sizes
    chunks = tl.cdiv(columns, F.chunk)
    program = tl.program_id(0)
    line = program // chunks
    image = (first + line) // rows
    b, h = image // heads, image % heads
    column = program % chunks * F.chunk + tl.arange(0, F.chunk)
    q = ((first + line) % rows) * F.q_block
    kv = tl.minimum(column, columns - 1) * F.kv_block
    head = TILES.mod_head(b, h, tile_args)
    parts = (head, TILES.mod_rows(b, h, q, tile_args, head),
             TILES.mod_columns(b, h, kv, tile_args, head))
    kind = TILES.mask_mod(b, h, q, kv, tile_args, parts).to(tl.int32) + tl.zeros_like(column)
    kind = tl.where(column < columns, kind, 0)
    open_ = kind == 1
    if tl.max(open_.to(tl.int32), 0) > 0:
        mod_head = MODS.mod_head(b, h, args)
        q_last = tl.minimum(q + (F.q_block - 1), last_q)
        kv_last = tl.minimum(kv + (F.kv_block - 1), last_kv)
        open_ = _at_points(open_, b, h, q, q_last, kv, kv_last, args, mod_head, MODS)
        number = tl.min(tl.where(open_, column, columns), 0)
        while number < columns:
            left = number * F.kv_block
            right = tl.minimum(left + (F.kv_block - 1), last_kv)
            exact = _of_elements(b, h, q, q_last, left, right, args, mod_head, MODS, F)
            kind = tl.where(column == number, exact, kind)
            open_ = open_ & (column != number)
            number = tl.min(tl.where(open_, column, columns), 0)
    kind = tl.minimum(kind, most)
    tl.store(found + line * columns + column, kind.to(tl.int8), mask=column < columns)


@triton.jit
def _ends(found, line, column, layout):
    """The kind of blocks, and where runs of them start and end. layout: blocks in a line, lines of
    an image, bytes from line to line and from block to block."""
    columns, lines, line_stride, stride = layout
    at = (found + (line // lines) * (lines * columns) + (line % lines) * line_stride
          + column * stride)
    kind = tl.load(at, mask=column < columns, other=0)
    before = tl.load(at - stride, mask=(column > 0) & (column < columns), other=0)
    after = tl.load(at + stride, mask=column + 1 < columns, other=0)
    return kind, (kind != 0) & (kind != before), (kind != 0) & (kind != after)


@triton.jit
def paint(found, offsets, start, end, full, columns, first, CHUNK: tl.constexpr):
    """The kinds of lines first, first + 1, ... of a table of runs; `found` is 0 before."""
    line = tl.program_id(0)
    for run in range(tl.load(offsets + first + line), tl.load(offsets + first + line + 1)):
        kind = tl.load(full + run) + 1
        last = tl.load(end + run)
        for left in range(tl.load(start + run), last, CHUNK):
            column = left + tl.arange(0, CHUNK)
            tl.store(found + line * columns + column, kind, mask=column < last)


@triton.jit
def count_runs(found, counts, layout, first, CHUNK: tl.constexpr):
    """counts[first + line + 1] is the number of runs of a line; counts[0] is 0."""
    line = tl.program_id(0)
    total = tl.zeros([CHUNK], tl.int32)
    for left in range(0, layout[0], CHUNK):
        _, starts, _ = _ends(found, line, left + tl.arange(0, CHUNK), layout)
        total += starts.to(tl.int32)
    tl.store(counts + first + line + 1, tl.sum(total, 0))
    if first + line == 0:
        tl.store(counts, 0)


@triton.jit
def write_runs(found, offsets, start, end, full, bounded, report, layout, first, lines, room,
               CHUNK: tl.constexpr):
    """The runs of each line, from offsets[first + line] on, as many as there is room for.

    bounded: None, or offsets that stop at `room`; report: then (runs, room) where it is too little.
    """
    line = tl.program_id(0)
    at_start = tl.load(offsets + first + line)
    at_end = at_start
    if bounded is not None:
        tl.store(bounded + first + line, tl.minimum(at_start, room))
        if first + line == lines - 1:
            total = tl.load(offsets + lines)
            tl.store(bounded + lines, tl.minimum(total, room))
            if total > room:
                tl.store(report, total)
                tl.store(report + 1, room)
    for left in range(0, layout[0], CHUNK):
        column = left + tl.arange(0, CHUNK)
        kind, starts, ends = _ends(found, line, column, layout)
        place = at_start + tl.cumsum(starts.to(tl.int32), 0) - 1
        tl.store(start + place, column, mask=starts & (place < room))
        tl.store(full + place, (kind == 2).to(tl.int8), mask=starts & (place < room))
        place = at_end + tl.cumsum(ends.to(tl.int32), 0) - 1
        tl.store(end + place, column + 1, mask=ends & (place < room))
        at_start += tl.sum(starts.to(tl.int32), 0)
        at_end += tl.sum(ends.to(tl.int32), 0)
