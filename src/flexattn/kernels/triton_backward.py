"""Backward of attention with a score mod and a mask, for every GPU that Triton serves.

In: query, key, value, the gradient of the output, and of each row lse * log2(e) and
delta = sum(d_out * out) - d_lse. Out: dq, dk, dv, and what captured tensors' gradients are made of.
The probabilities are recomputed, p = exp2(score * log2(e) - lse2); the score is recomputed from
q k^T, and its gradient graph is evaluated there. That graph is linear in the gradient it is given,
so it is given p before dp = d_out v^T is known, and ds = score_mod_grad(p) * (dp - delta).

Tiles hold chunks of the head dimension: 96 is three of 32. Runs of full blocks need no mask;
partial blocks, and a block that sticks out of the sequence, take the masked step.

MODS holds the functions that `lower/triton.py` generates; its docstring says how they are called.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexattn.kernels.triton_tiles import (
    add_product,
    ends_ragged,
    first_block,
    indices,
    load_rows,
    next_block,
    operand,
    product,
    store_rows,
    times,
    zeros,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_statistics(x, line, first, ROWS: tl.constexpr):
    """Rows first .. first + ROWS of one line of lse2 or delta."""
    return tl.load(x[0] + tl.cast(line, tl.int64) * x[1] + first + tl.arange(0, ROWS))


@triton.jit
def _zero_vectors(SIZE: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.zeros([SIZE], DTYPE),)
    return vectors


# One tile of scores


@triton.jit
def _probabilities(raw, lse2, b, h, q_idx, kv_idx, inside, scale, args, parts,
                   MODS: tl.constexpr, MASKED: tl.constexpr):
    """p, and the factors of (dp - delta) in d_score and in the gradient of each read."""
    if MODS.score_mod is None:
        exponent = raw * (scale * LOG2E)
    else:  # the forward has reported what the mod reads out of range
        score = raw * (scale * MODS.score_scale)
        exponent = MODS.score_mod(score, b, h, q_idx, kv_idx, False, args, parts) \
            * (LOG2E * MODS.result_scale)
    if MASKED:
        kept = inside
        if MODS.mask_mod is not None:
            kept = kept & MODS.mask_mod(b, h, q_idx, kv_idx, args, parts)
        exponent = tl.where(kept, exponent, float("-inf"))
    p = tl.math.exp2(exponent - lse2)
    factors = (p,)
    if MODS.score_mod is not None:
        factors = MODS.score_mod_grad(score, p, b, h, q_idx, kv_idx, False, args, parts)
        if MASKED:  # a masked position's derivative may be infinite
            factors = _where_all(kept, factors)
    return p, factors


@triton.jit
def _where_all(kept, values):
    inside = ()
    for i in tl.static_range(len(values)):
        inside = inside + (tl.where(kept, values[i], 0.0),)
    return inside


# Kernels


@triton.jit
def _tile_and_line(tiles):
    """Of this program; the tiles of a line (a batch and head) follow each other. The grid's other
    dimensions would hold 65535 lines at most."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def prepare(out, d_out, lse, d_lse, statistics, total, sizes, VALUE_DIM: tl.constexpr,
            PADDED_DIM: tl.constexpr, ROWS: tl.constexpr):
    """lse2 = lse * log2(e), +inf for rows without any key and beyond the last one (so that their p
    is 0), and delta = sum(d_out * out) - d_lse. total: None, or the float32 of as many rows and of
    VALUE_DIM columns in which dq will be summed up, made 0; for Hopper, whose next kernel may start
    early and waits for this one. It finds a 0 behind the statistics."""
    if total is not None:
        gdc_launch_dependents()
        tl.store(statistics[0] + 2 * sizes[2] * statistics[1], 0.0, mask=tl.program_id(0) == 0)
    heads, q_len, lines = sizes
    tile, line = _tile_and_line(tl.cast(statistics[1], tl.int32) // ROWS)
    b, h = line // heads, line % heads
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    at = tl.cast(line, tl.int64) * q_len + row
    o = load_rows(out, b, h, first, q_len, VALUE_DIM, PADDED_DIM, ROWS, True)[0]
    do = load_rows(d_out, b, h, first, q_len, VALUE_DIM, PADDED_DIM, ROWS, True)[0]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if d_lse is not None:
        delta -= tl.load(d_lse + at, mask=row < q_len, other=0.0)
    lse2 = tl.load(lse + at, mask=row < q_len, other=float("-inf")) * LOG2E
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    to = statistics[0] + tl.cast(line, tl.int64) * statistics[1] + row
    tl.store(to, lse2)
    tl.store(to + lines * statistics[1], delta)
    if total is not None:
        start = total + (tl.cast(line, tl.int64) * statistics[1] + first) * VALUE_DIM
        at = tl.arange(0, ROWS)[:, None] * VALUE_DIM + tl.arange(0, VALUE_DIM)[None, :]
        tl.store(start + at, tl.zeros([ROWS, VALUE_DIM], tl.float32))


@triton.jit
def round_query_gradient(total, dq_out, sizes, scale, DIM: tl.constexpr, ROWS: tl.constexpr,
                         WAITS: tl.constexpr = False):
    """dq = scale * total, which is float32 [line, length, DIM] with length >= q_len. WAITS: it
    may be launched early, while `total` is added up."""
    if WAITS:
        gdc_wait()
    heads, q_len, length = sizes
    tile, line = _tile_and_line(length // ROWS)
    first = tile * ROWS
    row = tl.cast(line, tl.int64) * length + first + tl.arange(0, ROWS)
    found = tl.load(total + row[:, None] * DIM + tl.arange(0, DIM)[None, :])
    store_rows(dq_out, (found * scale,), line // heads, line % heads, first, q_len, DIM, DIM, ROWS)


@triton.jit
def _key_value_step(sums, k, v, q, d_out, statistics, at, head, columns, first_q, sizes, scale,
                    args, MODS: tl.constexpr, F: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the queries of one tile contribute. Scores are transposed: [kv, q]."""
    dk, dv, col_sums, peaks = sums
    b, h, kv_idx = at
    batch, heads, q_len = sizes
    q_idx = indices(first_q, q_len, F.tile_q, MASKED)[None, :]
    inside = (first_q + tl.arange(0, F.tile_q) < q_len)[None, :]
    rows = MODS.mod_rows(b, h, q_idx, args, head)
    q_rows = load_rows(q, b, h, first_q, q_len, F.head_dim, F.head_chunk, F.tile_q, MASKED,
                       F.rounded)
    raw = product(k, q_rows, F)
    line = b * heads + h
    lse2 = _load_statistics(statistics, line, first_q, F.tile_q)[None, :]
    delta = _load_statistics(statistics, batch * heads + line, first_q, F.tile_q)[None, :]
    p, factors = _probabilities(raw, lse2, b, h, q_idx, kv_idx, inside, scale, args,
                                (head, rows, columns), MODS, MASKED)
    do_rows = load_rows(d_out, b, h, first_q, q_len, F.value_dim, F.value_chunk, F.tile_q, MASKED,
                        F.rounded)
    dp = product(v, do_rows, F)
    dv = add_product(dv, operand(p, do_rows[0].dtype, F), do_rows, F)
    ds = factors[0] * (dp - delta)
    dk = add_product(dk, operand(ds, q_rows[0].dtype, F), q_rows, F)
    added = ()
    for i in tl.static_range(len(F.col_sums)):
        added = added + (col_sums[i] + tl.sum(factors[F.col_sums[i] + 1] * (dp - delta), 1),)
    raised = ()
    if F.exact:
        for i in tl.static_range(len(F.unordered)):
            size = tl.abs(factors[F.unordered[i] + 1] * (dp - delta)).to(tl.float32)
            size = size.to(tl.int32, bitcast=True)
            raised = raised + (tl.maximum(peaks[i], tl.max(size, 1)),)
    return dk, dv, added, raised


@triton.jit
def key_value_gradient(q, k, v, d_out, statistics, dk_out, dv_out, sums_out, peaks_out, full,
                       partial, sizes, blocks, scale, args, MODS: tl.constexpr, F: tl.constexpr):
    """dk and dv of one tile of keys, summed over the query heads (and sequences) that share them.

    The second grid dimension splits those sharers, each part with an output of its own. peaks_out:
    the bits of the largest size of each unordered read's gradient.
    """
    batch, heads, q_len, kv_len, kv_batch, kv_heads = sizes
    tiles = tl.cdiv(kv_len, F.tile_kv)
    tile, kv_line = _tile_and_line(tiles)
    part, parts = tl.program_id(1), tl.num_programs(1)
    kv_b, kv_h = kv_line // kv_heads, kv_line % kv_heads
    first = tile * F.tile_kv
    kv_idx = indices(first, kv_len, F.tile_kv, True)[:, None]
    k_rows = load_rows(k, kv_b, kv_h, first, kv_len, F.head_dim, F.head_chunk, F.tile_kv, True,
                       F.rounded)
    v_rows = load_rows(v, kv_b, kv_h, first, kv_len, F.value_dim, F.value_chunk, F.tile_kv, True,
                       F.rounded)
    dk = zeros(F.tile_kv, F.head_chunk, F.head_chunks)
    dv = zeros(F.tile_kv, F.value_chunk, F.value_chunks)
    peaks = _zero_vectors(F.tile_kv, len(F.unordered) if F.exact else 0, tl.int32)
    group = heads // kv_heads
    sharers = group * (batch // kv_batch)
    shape = (batch, heads, q_len)
    q_tiles = tl.cdiv(q_len, F.tile_q)
    for sharer in range(sharers * part // parts, sharers * (part + 1) // parts):
        b, h = kv_b + sharer // group, kv_h * group + sharer % group
        at = (b, h, kv_idx)
        head = MODS.mod_head(b, h, args)
        columns = MODS.mod_columns(b, h, kv_idx, args, head)
        col_sums = _zero_vectors(F.tile_kv, len(F.col_sums), tl.float32)
        sums = (dk, dv, col_sums, peaks)
        if F.sparse:
            row = ((b % blocks[0]) * blocks[1] + h % blocks[1]) * tiles + tile
            count, run, runs, block, stop = first_block(full, row, q_tiles - 1)
            ragged = ends_ragged(full, row, q_tiles, q_len, F.tile_q)
            partly = first_block(partial, row, q_tiles - 1)  # read while it can wait
            for _ in range(count - ragged):
                sums = _key_value_step(sums, k_rows, v_rows, q, d_out, statistics, at, head,
                                       columns, block * F.tile_q, shape, scale, args, MODS, F,
                                       False)
                run, block, stop = next_block(full, run, runs, block, stop, q_tiles - 1)
            count, run, runs, block, stop = partly
            for _ in range(count + ragged):
                sums = _key_value_step(sums, k_rows, v_rows, q, d_out, statistics, at, head,
                                       columns, block * F.tile_q, shape, scale, args, MODS, F,
                                       True)
                run, block, stop = next_block(partial, run, runs, block, stop, q_tiles - 1)
        else:
            whole = q_len // F.tile_q * F.tile_q
            for first_q in range(0, whole, F.tile_q):
                sums = _key_value_step(sums, k_rows, v_rows, q, d_out, statistics, at, head,
                                       columns, first_q, shape, scale, args, MODS, F, False)
            for first_q in range(whole, q_len, F.tile_q):
                sums = _key_value_step(sums, k_rows, v_rows, q, d_out, statistics, at, head,
                                       columns, first_q, shape, scale, args, MODS, F, True)
        dk, dv, col_sums, peaks = sums
        line = tl.cast(b * heads + h, tl.int64) * (tiles * F.tile_kv)
        for i in tl.static_range(len(F.col_sums)):
            tl.store(sums_out[i] + line + first + tl.arange(0, F.tile_kv), col_sums[i])
    to = part * kv_batch + kv_b
    store_rows(dk_out, times(dk, scale), to, kv_h, first, kv_len, F.head_dim, F.head_chunk,
               F.tile_kv)
    store_rows(dv_out, dv, to, kv_h, first, kv_len, F.value_dim, F.value_chunk, F.tile_kv)
    if F.exact:
        for i in tl.static_range(len(F.unordered)):
            real = tl.where(first + tl.arange(0, F.tile_kv) < kv_len, peaks[i], 0)
            tl.atomic_max(peaks_out + i, tl.max(real, 0), sem="relaxed")


@triton.jit
def _query_step(sums, q, d_out, lse2, delta, k, v, at, head, rows, first_kv, lengths, scale, args,
                scatter, MODS: tl.constexpr, F: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the keys of one tile contribute to dq and to the gradients of captured tensors."""
    dq, row_sums = sums
    b, kv_b, h, kv_h, line, first_q, q_idx = at
    q_len, kv_len = lengths
    kv_idx = indices(first_kv, kv_len, F.tile_kv, MASKED)[None, :]
    inside = (first_kv + tl.arange(0, F.tile_kv) < kv_len)[None, :]
    columns = MODS.mod_columns(b, h, kv_idx, args, head)
    parts = (head, rows, columns)
    k_rows = load_rows(k, kv_b, kv_h, first_kv, kv_len, F.head_dim, F.head_chunk, F.tile_kv,
                        MASKED, F.rounded)
    raw = product(q, k_rows, F)
    p, factors = _probabilities(raw, lse2[:, None], b, h, q_idx, kv_idx, inside, scale, args,
                                parts, MODS, MASKED)
    v_rows = load_rows(v, kv_b, kv_h, first_kv, kv_len, F.value_dim, F.value_chunk, F.tile_kv,
                        MASKED, F.rounded)
    dp = product(d_out, v_rows, F)
    ds = factors[0] * (dp - delta[:, None])
    dq = add_product(dq, operand(ds, k_rows[0].dtype, F), k_rows, F)
    added = ()
    for i in tl.static_range(len(F.row_sums)):
        added = added + (row_sums[i]
                         + tl.sum(factors[F.row_sums[i] + 1] * (dp - delta[:, None]), 1),)
    for i in tl.static_range(len(F.unordered)):
        here = (first_q + tl.arange(0, F.tile_q) < q_len)[:, None]
        d_load = tl.where(here, factors[F.unordered[i] + 1] * (dp - delta[:, None]), 0.0)
        if i < len(F.diagonals):
            _add_diagonals(scatter, i, d_load, first_q - first_kv, line, F)
        else:
            score = raw * (scale * MODS.score_scale)
            offsets = MODS.grad_offsets(score, b, h, q_idx, kv_idx, args, parts)
            _add_atomically(scatter[0][i] + offsets[F.unordered[i]], d_load, here & inside,
                            scatter[1] + i, F.exact)
    return dq, added


@triton.jit
def _add_diagonals(scatter, i: tl.constexpr, d_load, distance, line, F: tl.constexpr):
    """Adds up what lies on diagonals of the tile: with each row r rotated left by r, a column c
    holds the diagonals row - column = turn * tile_kv - c, one for each turn of the rotation."""
    source = tl.arange(0, F.tile_q)[:, None] + tl.arange(0, F.tile_kv)[None, :]
    sheared = tl.gather(d_load, source % F.tile_kv, 1)
    column = tl.arange(0, F.tile_kv)
    to = scatter[0][i] + tl.cast(line, tl.int64) * scatter[2] + scatter[3] + distance - column
    for turn in tl.static_range((F.tile_q + F.tile_kv - 2) // F.tile_kv + 1):
        total = tl.sum(tl.where(source // F.tile_kv == turn, sheared, 0.0), 0)
        _add_atomically(to + turn * F.tile_kv, total, column >= 0, scatter[1] + i, F.exact)


@triton.jit
def _add_atomically(to, value, inside, units, EXACT: tl.constexpr):
    """EXACT: integers of size 1 / units, whose sum does not depend on the order."""
    if EXACT:
        value = tl.floor(value * tl.load(units) + 0.5).to(tl.int64)
    tl.atomic_add(to, value, mask=inside, sem="relaxed")


@triton.jit
def query_gradient(q, k, v, d_out, statistics, dq_out, sums_out, scatter, full, partial, sizes,
                   blocks, scale, args, MODS: tl.constexpr, F: tl.constexpr):
    """dq of one tile of queries. The last tiles, the longest ones of a causal mask, come first.

    scatter: where the gradients of unordered reads are added, their units, and of a diagonals'
    buffer the length of a line and the place of q_idx = kv_idx in it.
    """
    batch, heads, q_len, kv_len, kv_batch, kv_heads = sizes
    tiles = tl.cdiv(q_len, F.tile_q)
    number, line = _tile_and_line(tiles)
    tile = tiles - 1 - number
    b, h = line // heads, line % heads
    kv_b, kv_h = b % kv_batch, h // (heads // kv_heads)
    first = tile * F.tile_q
    q_idx = indices(first, q_len, F.tile_q, True)[:, None]
    q_rows = load_rows(q, b, h, first, q_len, F.head_dim, F.head_chunk, F.tile_q, True, F.rounded)
    do_rows = load_rows(d_out, b, h, first, q_len, F.value_dim, F.value_chunk, F.tile_q, True,
                        F.rounded)
    lse2 = _load_statistics(statistics, line, first, F.tile_q)
    delta = _load_statistics(statistics, batch * heads + line, first, F.tile_q)
    head = MODS.mod_head(b, h, args)
    rows = MODS.mod_rows(b, h, q_idx, args, head)
    row_sums = _zero_vectors(F.tile_q, len(F.row_sums), tl.float32)
    sums = (zeros(F.tile_q, F.head_chunk, F.head_chunks), row_sums)
    at = (b, kv_b, h, kv_h, line, first, q_idx)
    lengths = (q_len, kv_len)
    if F.sparse:
        row = ((b % blocks[0]) * blocks[1] + h % blocks[1]) * tiles + tile
        kv_tiles = tl.cdiv(kv_len, F.tile_kv)
        count, run, runs, block, stop = first_block(full, row, kv_tiles - 1)
        ragged = ends_ragged(full, row, kv_tiles, kv_len, F.tile_kv)
        partly = first_block(partial, row, kv_tiles - 1)  # read while it can wait
        for _ in range(count - ragged):
            sums = _query_step(sums, q_rows, do_rows, lse2, delta, k, v, at, head, rows,
                               block * F.tile_kv, lengths, scale, args, scatter, MODS, F, False)
            run, block, stop = next_block(full, run, runs, block, stop, kv_tiles - 1)
        count, run, runs, block, stop = partly
        for _ in range(count + ragged):
            sums = _query_step(sums, q_rows, do_rows, lse2, delta, k, v, at, head, rows,
                               block * F.tile_kv, lengths, scale, args, scatter, MODS, F, True)
            run, block, stop = next_block(partial, run, runs, block, stop, kv_tiles - 1)
    else:
        whole = kv_len // F.tile_kv * F.tile_kv
        for first_kv in range(0, whole, F.tile_kv):
            sums = _query_step(sums, q_rows, do_rows, lse2, delta, k, v, at, head, rows, first_kv,
                               lengths, scale, args, scatter, MODS, F, False)
        for first_kv in range(whole, kv_len, F.tile_kv):
            sums = _query_step(sums, q_rows, do_rows, lse2, delta, k, v, at, head, rows, first_kv,
                               lengths, scale, args, scatter, MODS, F, True)
    dq, row_sums = sums
    store_rows(dq_out, times(dq, scale), b, h, first, q_len, F.head_dim, F.head_chunk, F.tile_q)
    to = tl.cast(line, tl.int64) * (tiles * F.tile_q) + first + tl.arange(0, F.tile_q)
    for i in tl.static_range(len(F.row_sums)):
        tl.store(sums_out[i] + to, row_sums[i])


@triton.jit
def scatter_sums(sums, gradient, units, sizes, args, MODS: tl.constexpr, LOAD: tl.constexpr,
                 KIND: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """Adds sums over rows, columns or diagonals (a line for each b, h) where their read was."""
    heads, q_len, kv_len, length, origin = sizes
    tile, line = _tile_and_line(tl.cdiv(length, BLOCK))
    b, h = line // heads, line % heads
    place = tile * BLOCK + tl.arange(0, BLOCK)
    if KIND == "row":
        distance, inside = place, place < q_len
    elif KIND == "column":
        distance, inside = -place, place < kv_len
    else:
        distance = place - origin
        inside = (distance < q_len) & (-distance < kv_len)
    q_idx = tl.minimum(tl.maximum(distance, 0), q_len - 1)
    kv_idx = tl.minimum(tl.maximum(-distance, 0), kv_len - 1)
    head = MODS.mod_head(b, h, args)
    rows = MODS.mod_rows(b, h, q_idx, args, head)
    columns = MODS.mod_columns(b, h, kv_idx, args, head)
    value = tl.load(sums + tl.cast(line, tl.int64) * length + place, mask=inside, other=0.0)
    offsets = MODS.grad_offsets(value, b, h, q_idx, kv_idx, args, (head, rows, columns))
    offset = offsets[LOAD] + tl.zeros([BLOCK], tl.int64)
    least = tl.min(tl.where(inside, offset, 2**62), 0)
    if least == tl.max(tl.where(inside, offset, -1), 0):
        _add_atomically(gradient + least, tl.sum(value, 0), least >= 0, units, EXACT)
    else:
        _add_atomically(gradient + offset, value, inside, units, EXACT)
