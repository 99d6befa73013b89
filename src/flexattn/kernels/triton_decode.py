"""Forward of attention of few queries over many keys (decoding), for every GPU that Triton serves.

In: as triton_forward; `pack` query heads that share a key head are one line, and the rows of its
tiles are its (head, query) pairs, so that keys are read once for all of them (pack is 1 where the
mask differs between these heads). The tiles of keys of a line are dealt out to `splits` programs.
Out: with one split the output, lse and largest scores; otherwise `parts`, which `combine` turns
into them: float32 [rows, splits, value_dim] of outputs, then [rows, splits] each of lse (base 2)
and of largest scores, rows being batch x heads x q_len.

The kernel is bound by the reads of keys and values: a tile has at least 16 rows, but what counts is
how many loads are on their way, so tiles are small and several programs share a multiprocessor.
"""

import triton
import triton.language as tl

from flexattn.kernels.triton_forward import LN2, LOG2E, attend_tile
from flexattn.kernels.triton_tiles import ends_ragged, next_block, scaled, zeros


@triton.jit
def _line_rows(x, b, h, q_idx, DIM: tl.constexpr, CHUNK: tl.constexpr, c: tl.constexpr):
    """Addresses of a chunk of columns of rows x[b, h, q_idx], and which columns exist."""
    column = c * CHUNK + tl.arange(0, CHUNK)[None, :]
    row = x[0] + tl.cast(b, tl.int64) * x[1] + h.to(tl.int64) * x[2] + q_idx.to(tl.int64) * x[3]
    return row + column, column < DIM


@triton.jit
def _block_at(table, row, number, last):
    """The walk's state (see first_block) at block `number` of a row, `last` behind its end."""
    run = tl.load(table[0] + row)
    runs = tl.load(table[0] + row + 1)
    target = tl.load(table[3] + run) + number
    high = runs
    while run < high:
        middle = (run + high) // 2
        behind = tl.load(table[3] + middle + 1) <= target
        run = tl.where(behind, middle + 1, run)
        high = tl.where(behind, high, middle)
    inside = run < runs
    start = tl.load(table[1] + run, mask=inside, other=last)
    stop = tl.load(table[2] + run, mask=inside, other=0)
    skipped = (target - tl.load(table[3] + run)).to(tl.int32)
    return run, runs, tl.where(inside, start + skipped, last), stop


@triton.jit
def _count(table, row):
    run, runs = tl.load(table[0] + row), tl.load(table[0] + row + 1)
    return (tl.load(table[3] + runs) - tl.load(table[3] + run)).to(tl.int32)


@triton.jit
def _share(total, split, splits):
    """First and end of what one split does of `total` tiles."""
    each = tl.cdiv(total, splits)
    return tl.minimum(split * each, total), tl.minimum(split * each + each, total)


@triton.jit
def decode(q, k, v, out, lse, max_scores, parts, full, partial, sizes, blocks, scale, args,
           MODS: tl.constexpr, F: tl.constexpr):
    """sizes: batch, heads, q_len, kv_len, kv_batch, kv_heads, pack, splits. parts: None with one
    split. The mask has one row of blocks, for all queries. F.tile_q: rows of a tile."""
    batch, heads, q_len, kv_len, kv_batch, kv_heads, pack, splits = sizes
    lines, tiles = batch * (heads // pack), tl.cdiv(pack * q_len, F.tile_q)
    program = tl.program_id(0)
    split, line = program // (tiles * lines), program // tiles % lines
    b, head = line // (heads // pack), line % (heads // pack) * pack
    kv_b, kv_h = b % kv_batch, head // (heads // kv_heads)
    pair = program % tiles * F.tile_q + tl.arange(0, F.tile_q)
    exists = pair < pack * q_len
    pair = tl.minimum(pair, pack * q_len - 1)
    h, q_idx = (head + pair // q_len)[:, None], (pair % q_len)[:, None]
    q_rows = ()
    for c in tl.static_range((F.head_dim + F.head_chunk - 1) // F.head_chunk):
        at, inside = _line_rows(q, b, h, q_idx, F.head_dim, F.head_chunk, c)
        q_rows = q_rows + (tl.load(at, mask=inside, other=0.0),)
    head_part = MODS.mod_head(b, h, args)
    row_part = MODS.mod_rows(b, h, q_idx, args, head_part)
    TILE_Q: tl.constexpr = F.tile_q
    state = (zeros(TILE_Q, F.value_chunk, F.value_chunks), tl.zeros([TILE_Q], tl.float32),
             tl.full([TILE_Q], float("-inf"), tl.float32))
    where = (b, kv_b, h, kv_h, q_idx)
    kv_tiles, whole = tl.cdiv(kv_len, F.tile_kv), kv_len // F.tile_kv
    if F.sparse:
        row = (b % blocks[0]) * blocks[1] + head % blocks[1]
        plain = _count(full, row)
        first, end = _share(plain + _count(partial, row), split, splits)
        plain -= ends_ragged(full, row, kv_tiles, kv_len, F.tile_kv)
        run, runs, block, stop = _block_at(full, row, first, kv_tiles - 1)
        for _ in range(first, tl.minimum(end, plain)):
            state = attend_tile(state, q_rows, k, v, where, head_part, row_part,
                                block * F.tile_kv, kv_len, scale, args, MODS, F, False)
            run, block, stop = next_block(full, run, runs, block, stop, kv_tiles - 1)
        first = tl.maximum(first, plain)
        run, runs, block, stop = _block_at(partial, row, first - plain, kv_tiles - 1)
        for _ in range(first, end):
            state = attend_tile(state, q_rows, k, v, where, head_part, row_part,
                                block * F.tile_kv, kv_len, scale, args, MODS, F, True)
            run, block, stop = next_block(partial, run, runs, block, stop, kv_tiles - 1)
    else:
        first, end = _share(kv_tiles, split, splits)
        for tile in range(first, tl.minimum(end, whole)):
            state = attend_tile(state, q_rows, k, v, where, head_part, row_part,
                                tile * F.tile_kv, kv_len, scale, args, MODS, F, False)
        for tile in range(tl.maximum(first, whole), end):
            state = attend_tile(state, q_rows, k, v, where, head_part, row_part,
                                tile * F.tile_kv, kv_len, scale, args, MODS, F, True)
    result, total, peak = state
    result = scaled(result, tl.where(total == 0.0, 0.0, 1.0 / total))
    peak *= scale if F.fold else MODS.result_scale
    row = (tl.cast(b, tl.int64) * heads + head) * q_len + pair
    if parts is None:
        for c in tl.static_range(len(result)):
            at, inside = _line_rows(out, b, h, q_idx, F.value_dim, F.value_chunk, c)
            tl.store(at, result[c].to(out[0].dtype.element_ty), mask=exists[:, None] & inside)
        if lse is not None:
            tl.store(lse + row, peak + tl.math.log2(total) * LN2, mask=exists)
        if max_scores is not None:
            tl.store(max_scores + row, peak, mask=exists)
    else:
        place, size = row * splits + split, tl.cast(batch, tl.int64) * heads * q_len * splits
        for c in tl.static_range(len(result)):
            column = c * F.value_chunk + tl.arange(0, F.value_chunk)[None, :]
            tl.store(parts + place[:, None] * F.value_dim + column, result[c],
                     mask=exists[:, None] & (column < F.value_dim))
        tl.store(parts + size * F.value_dim + place, peak * LOG2E + tl.math.log2(total),
                 mask=exists)
        tl.store(parts + size * F.value_dim + size + place, peak, mask=exists)


@triton.jit
def combine(parts, out, lse, max_scores, sizes, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
            STEP: tl.constexpr):
    """One row of the output from its splits, STEP of them at a time. sizes: rows, heads, q_len,
    splits."""
    rows, heads, q_len, splits = sizes
    row, number = tl.program_id(0), tl.arange(0, STEP)
    size = tl.cast(rows, tl.int64) * splits
    place = tl.cast(row, tl.int64) * splits
    powers = parts + size * VALUE_DIM + place
    most = tl.full([STEP], float("-inf"), tl.float32)
    for first in range(0, splits, STEP):
        most = tl.maximum(most, tl.load(powers + first + number, mask=first + number < splits,
                                        other=float("-inf")))
    top = tl.max(most, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP], tl.float32)
    result = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, splits, STEP):
        kept = first + number < splits
        weight = tl.math.exp2(tl.load(powers + first + number, mask=kept, other=float("-inf"))
                              - base)
        at = parts + (place + first + number)[:, None] * VALUE_DIM + column[None, :]
        part = tl.load(at, mask=kept[:, None] & (column < VALUE_DIM)[None, :], other=0.0)
        result += weight[:, None] * part
        total += weight
    weights = tl.sum(total, 0)
    value = tl.sum(result, 0) * tl.where(weights == 0.0, 0.0, 1.0 / weights)
    b, h, q_idx = row // q_len // heads, row // q_len % heads, row % q_len
    to = out[0] + tl.cast(b, tl.int64) * out[1] + tl.cast(h, tl.int64) * out[2] \
        + tl.cast(q_idx, tl.int64) * out[3]
    tl.store(to + column, value.to(out[0].dtype.element_ty), mask=column < VALUE_DIM)
    if tl.program_id(1) == 0:
        if lse is not None:
            tl.store(lse + row, (top + tl.math.log2(weights)) * LN2)
        if max_scores is not None:
            largest = tl.full([STEP], float("-inf"), tl.float32)
            for first in range(0, splits, STEP):
                largest = tl.maximum(largest, tl.load(
                    powers + size + first + number, mask=first + number < splits,
                    other=float("-inf")))
            tl.store(max_scores + row, tl.max(largest, 0))
