"""Forward of attention with a score mod and a mask, for every GPU that Triton serves.

In: query, key, value, the runs of blocks of the mask (two tables, of full and of partial blocks,
for the kernel's tile), a mod's functions (lower/triton.py) and their arguments. Out: the output
and, where asked for, lse (natural log) and the largest score of each row.

FlashAttention-2 with exp2: one program owns a tile of queries and walks the tiles of keys that its
rows attend to. Without a score mod the scale is folded into the exponent. Full blocks run without
mask and bounds; partial ones, and the last tile of a length that is no multiple of it, with both.
A row that attends to nothing gives 0 and lse -inf.
"""

import triton
import triton.language as tl

from flexattn.kernels.triton_tiles import (
    add_product,
    ends_ragged,
    first_block,
    indices,
    load_rows,
    next_block,
    operand,
    product,
    scaled,
    store_rows,
    zeros,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(score, total, peak, factor, GUARDED: tl.constexpr, EXACT: tl.constexpr):
    """Probabilities relative to the new peak of each row, the new total and peak, and what the
    accumulated output is to be multiplied with. factor: of scores, to exponents of 2. EXACT: large
    scores lose nothing to the multiplication, which costs an addition."""
    new_peak = tl.maximum(peak, tl.max(score, 1))
    base = new_peak
    if GUARDED:  # a row may have seen no key yet
        base = tl.where(new_peak == float("-inf"), 0.0, base)
    if EXACT:
        p = tl.math.exp2((score - base[:, None]) * factor)
    else:
        p = tl.math.exp2(score * factor - (base * factor)[:, None])
    decay = tl.math.exp2((peak - base) * factor)
    return p, total * decay + tl.sum(p, 1), new_peak, decay


@triton.jit
def attend_tile(state, q, k, v, at, head, rows, first_kv, kv_len, scale, args,
                MODS: tl.constexpr, F: tl.constexpr, MASKED: tl.constexpr):
    """The state after one more tile of keys. at: b, its index in k and v, h, its index in k and v,
    q_idx; h is a tile [rows, 1] where rows are of several heads."""
    out, total, peak = state
    b, kv_b, h, kv_h, q_idx = at
    kv_idx = indices(first_kv, kv_len, F.tile_kv, MASKED)[None, :]
    k_rows = load_rows(k, kv_b, kv_h, first_kv, kv_len, F.head_dim, F.head_chunk, F.tile_kv,
                       MASKED, F.rounded)
    score = product(q, k_rows, F)
    parts = (head, rows, MODS.mod_columns(b, h, kv_idx, args, head))
    kept = True
    if MASKED:
        kept = (first_kv + tl.arange(0, F.tile_kv) < kv_len)[None, :]
        if MODS.mask_mod is not None:
            kept = kept & MODS.mask_mod(b, h, q_idx, kv_idx, args, parts)
    if not F.fold:
        score *= scale * MODS.score_scale
    if MODS.score_mod is not None:
        score = MODS.score_mod(score, b, h, q_idx, kv_idx, kept, args, parts)
    if MASKED:
        score = tl.where(kept, score, float("-inf"))
    factor = LOG2E * (scale if F.fold else MODS.result_scale)
    p, total, peak, decay = softmax_step(score, total, peak, factor,
                                         MASKED or MODS.score_mod is not None,
                                         k_rows[0].dtype == tl.float32)
    v_rows = load_rows(v, kv_b, kv_h, first_kv, kv_len, F.value_dim, F.value_chunk, F.tile_kv,
                       MASKED, F.rounded)
    out = add_product(scaled(out, decay), operand(p, v_rows[0].dtype, F), v_rows, F)
    return out, total, peak


@triton.jit
def _tile_of(program, q_tiles, lines, section):
    """Heads are walked in sections whose keys and values fit the cache; within one, the last tiles
    of all its heads come first (the longest of a causal mask)."""
    start = program // (section * q_tiles) * section
    width = tl.minimum(section, lines - start)
    rest = program % (section * q_tiles)
    return start + rest % width, q_tiles - 1 - rest // width


@triton.jit
def forward(q, k, v, out, lse, max_scores, full, partial, sizes, blocks, scale, args,
            MODS: tl.constexpr, F: tl.constexpr):
    """sizes: batch, heads, q_len, kv_len, kv_batch, kv_heads, section. blocks: batch and heads of
    the mask. lse, max_scores: contiguous, or None."""
    batch, heads, q_len, kv_len, kv_batch, kv_heads, section = sizes
    q_tiles = tl.cdiv(q_len, F.tile_q)
    line, tile = _tile_of(tl.program_id(0), q_tiles, batch * heads, section)
    b, h = line // heads, line % heads
    kv_b, kv_h = b % kv_batch, h // (heads // kv_heads)
    first = tile * F.tile_q
    q_idx = indices(first, q_len, F.tile_q, True)[:, None]
    q_rows = load_rows(q, b, h, first, q_len, F.head_dim, F.head_chunk, F.tile_q, True, F.rounded)
    head = MODS.mod_head(b, h, args)
    rows = MODS.mod_rows(b, h, q_idx, args, head)
    TILE_Q: tl.constexpr = F.tile_q
    state = (zeros(TILE_Q, F.value_chunk, F.value_chunks), tl.zeros([TILE_Q], tl.float32),
             tl.full([TILE_Q], float("-inf"), tl.float32))
    at = (b, kv_b, h, kv_h, q_idx)
    if F.sparse:
        row = ((b % blocks[0]) * blocks[1] + h % blocks[1]) * q_tiles + tile
        kv_tiles = tl.cdiv(kv_len, F.tile_kv)
        count, run, runs, block, stop = first_block(full, row, kv_tiles - 1)
        ragged = ends_ragged(full, row, kv_tiles, kv_len, F.tile_kv)
        partly = first_block(partial, row, kv_tiles - 1)  # read while it can wait
        for _ in range(count - ragged):
            state = attend_tile(state, q_rows, k, v, at, head, rows, block * F.tile_kv, kv_len,
                                scale, args, MODS, F, False)
            run, block, stop = next_block(full, run, runs, block, stop, kv_tiles - 1)
        count, run, runs, block, stop = partly
        for _ in range(count + ragged):
            state = attend_tile(state, q_rows, k, v, at, head, rows, block * F.tile_kv, kv_len,
                                scale, args, MODS, F, True)
            run, block, stop = next_block(partial, run, runs, block, stop, kv_tiles - 1)
    else:
        whole = kv_len // F.tile_kv * F.tile_kv
        for first_kv in range(0, whole, F.tile_kv):
            state = attend_tile(state, q_rows, k, v, at, head, rows, first_kv, kv_len, scale, args,
                                MODS, F, False)
        for first_kv in range(whole, kv_len, F.tile_kv):
            state = attend_tile(state, q_rows, k, v, at, head, rows, first_kv, kv_len, scale, args,
                                MODS, F, True)
    result, total, peak = state
    store_rows(out, scaled(result, tl.where(total == 0.0, 0.0, 1.0 / total)), b, h, first, q_len,
               F.value_dim, F.value_chunk, F.tile_q)
    place = first + tl.arange(0, F.tile_q)
    to = tl.cast(line, tl.int64) * q_len + place
    peak *= scale if F.fold else MODS.result_scale
    if lse is not None:
        tl.store(lse + to, peak + tl.math.log2(total) * LN2, mask=place < q_len)
    if max_scores is not None:
        tl.store(max_scores + to, peak, mask=place < q_len)
