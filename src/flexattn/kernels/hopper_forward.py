"""Forward of attention with a score mod and a mask on Hopper: TMA, asynchronous tensor cores.

In: TMA descriptors of 16-bit q, k and v, the problem's sizes, the block mask's `Table` or None,
and the mod's functions (see lower/triton.py) with their arguments. Out: `Results`.

One warp, the producer, walks the tiles of queries and for each the blocks of keys, and keeps a
ring of key and value tiles full. Two or three warpgroups, the consumers, own 64 queries each. In
one step a consumer starts Q K^T of the next block and P V of the one before, and computes the
softmax while the tensor cores run (FlashAttention-3). The consumers take turns at starting
products, so that the softmax of one lies under the products of another.

A CTA that is free takes the next tile. The first block of a row of the mask is the only one that
may stick out of the keys, so only there positions are compared with kv_len; then come the partial
blocks, and then the full ones, whose steps have no mask code.
"""

from typing import NamedTuple

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flexattn.kernels.hopper_pipeline import (
    QUERIES,
    allocate,
    announced,
    await_turn,
    end_turn,
    get,
    next_place,
    produce,
    release_all,
    release_k,
    release_q,
    release_v,
)
from flexattn.kernels.hopper_softmax import (
    LOG2E,
    add_line,
    column,
    first_softmax,
    gathered,
    next_softmax,
    opaque,
    packed,
    statistics,
    unpacked,
)


class Results(NamedTuple):
    """Pointers; strides in elements (int64). lse and max_scores are contiguous, or None."""

    out: object
    batch_stride: object
    head_stride: object
    row_stride: object
    value_dim: object
    lse: object
    max_scores: object


class Mod(NamedTuple):
    """The mod's arguments, and what it needs of a tile of queries."""

    args: object
    parts: object
    batch: object
    head: object
    q_idx: object


FIRST = gl.constexpr(0)
PARTIAL = gl.constexpr(1)
FULL = gl.constexpr(2)


@constexpr_function
def _scores_layout(C):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.tile_kv, 16])


@constexpr_function
def _out_layout(C):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.value_dim, 16])


@constexpr_function
def _store_layout(C):
    """Of the output: as the tensor cores leave it, but 8 consecutive columns to a thread."""
    wide = [[0, 1 << i] for i in range(5, C.value_dim.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], *wide], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [QUERIES, C.value_dim])


@constexpr_function
def _has_line(C, MODS):
    """Whether the score mod is a line over the keys, whose scores are as the products are."""
    return C.fold_scale and MODS.score_mod is not None


@gluon.jit
def _mod_of_tile(tile, first_row, sizes, args, C: gl.constexpr, MODS: gl.constexpr) -> Mod:
    rows: gl.constexpr = gl.SliceLayout(1, _scores_layout(C))
    q_idx = first_row + gl.arange(0, QUERIES, layout=rows)
    q_idx = gl.expand_dims(gl.minimum(q_idx, sizes.q_len - 1), 1)
    head = MODS.mod_head(tile.batch, tile.head, args)
    parts = (head, MODS.mod_rows(tile.batch, tile.head, q_idx, args, head))
    return Mod(args, parts, tile.batch, tile.head, q_idx)


@gluon.jit
def _columns(mod, block, kv_len, KIND: gl.constexpr, C: gl.constexpr, MODS: gl.constexpr):
    """Keys of a block, which of them there are, and what the mod needs of them: all that can be
    had before the products are."""
    layout: gl.constexpr = gl.SliceLayout(0, _scores_layout(C))
    kv_idx = block * C.tile_kv + gl.arange(0, C.tile_kv, layout=layout)
    kv_idx = gl.expand_dims(kv_idx, 0)
    inside = True
    if KIND == FIRST:
        inside = kv_idx < kv_len
        kv_idx = gl.minimum(kv_idx, gl.maximum(kv_len - 1, 0))
    return kv_idx, inside, MODS.mod_columns(mod.batch, mod.head, kv_idx, mod.args, mod.parts[0])


@gluon.jit
def _scores(s, mod, block, columns, whole, scale, KIND: gl.constexpr, C: gl.constexpr,
            MODS: gl.constexpr):
    """Products -> scores, -inf where not attended, and what is still to be added to those of a
    thread (0 without a line)."""
    kv_idx, inside, column_parts = columns
    parts = (mod.parts[0], mod.parts[1], column_parts)
    mask = True
    line = 0.0
    if MODS.mask_mod is not None and KIND != FULL:
        # LLVM would compare many columns as one vector of bits, which a GPU does not have.
        mask = MODS.mask_mod(mod.batch, mod.head, mod.q_idx, opaque(kv_idx), mod.args, parts)
    if not C.fold_scale:
        s = s * (scale * MODS.score_scale)
    if MODS.score_mod is not None and not C.fold_scale:
        attended = inside & (mask | (whole != 0))
        s = MODS.score_mod(s, mod.batch, mod.head, mod.q_idx, kv_idx, attended, mod.args, parts)
    if _has_line(C, MODS):
        slope, origin = MODS.score_line(mod.batch, mod.head, mod.q_idx, mod.args, parts)
        s, line = add_line(s, slope / scale, block * C.tile_kv, origin)
    if KIND == PARTIAL:
        s = gl.where(mask, s, -float("inf"))
    if KIND == FIRST:
        masked = (whole == 0) if MODS.mask_mod is not None else False
        if masked:
            s = gl.where(mask, s, -float("inf"))
        s = gl.where(inside, s, -float("inf"))
    return s, line


@gluon.jit
def _queries(part: gl.constexpr, place, shared, C: gl.constexpr):
    """A consumer's chunks of queries, in registers where there is room."""
    layout: gl.constexpr = gl.DotOperandLayout(0, _scores_layout(C), 2)
    chunks = ()
    for chunk in gl.static_range(gl.constexpr(C.head_chunks)):
        q = shared.q.index((place * C.consumers + part) * C.head_chunks + chunk)
        chunks = chunks + (q.load(layout) if C.q_registers else q,)
    return chunks


@gluon.jit
def _start_scores(q, stage, shared, C: gl.constexpr):
    """Q K^T of the block of keys in this buffer."""
    s = gl.full([QUERIES, C.tile_kv], 0.0, gl.float32, _scores_layout(C))
    for chunk in gl.static_range(gl.constexpr(C.head_chunks)):
        k = shared.k.index(stage * C.head_chunks + chunk).permute((1, 0))
        s = warpgroup_mma(q[chunk], k, s, use_acc=chunk > 0, is_async=True)
    return s


@gluon.jit
def _step(part: gl.constexpr, KIND: gl.constexpr, shared, q, stage, phase, o, words, top, total,
          mod, kv_len, scale, to_base2, C: gl.constexpr, MODS: gl.constexpr):
    """One more block: its scores and softmax, and the product of the block before."""
    before = stage
    stage, phase = next_place(stage, phase, C.stages)
    mbarrier.wait(shared.k_full.index(stage), phase)
    await_turn(part, C)
    s = _start_scores(q, stage, shared, C)
    p = unpacked(words, shared.v.dtype, gl.DotOperandLayout(0, _out_layout(C), 2))
    o = warpgroup_mma(p, shared.v.index(before), o, is_async=True)
    end_turn(part, C)
    block = get(shared.block, stage)
    columns = _columns(mod, block, kv_len, KIND, C, MODS)
    s = warpgroup_mma_wait(1, deps=(s,))
    release_k(stage, C)
    s, line = _scores(s, mod, block, columns, 0, scale, KIND, C, MODS)
    probabilities, top, total, factor = next_softmax(s, top, total, to_base2, line,
                                                     _has_line(C, MODS))
    # This wait also ends a basic block: without it ptxas moves the wait for P V above the softmax.
    mbarrier.wait(shared.v_full.index(stage), phase)
    o, p = warpgroup_mma_wait(0, deps=(o, p))
    release_v(before, C)
    o = o * column(factor, o)
    return stage, phase, o, packed(probabilities, p.dtype), top, total


@gluon.jit
def _attend(part: gl.constexpr, tile, shared, place, stage, phase, sizes, args, scale,
            to_base2, C: gl.constexpr, MODS: gl.constexpr):
    """All blocks of a tile of queries: output (not normalised), maxima and partial sums."""
    layout: gl.constexpr = _out_layout(C)
    first_row = tile.row * C.tile_q + part * QUERIES
    mod = _mod_of_tile(tile, first_row, sizes, args, C, MODS)

    q = _queries(part, place, shared, C)
    mbarrier.wait(shared.k_full.index(stage), phase)
    s = _start_scores(q, stage, shared, C)
    kv_len = gl.where(tile.first < 0, 0, sizes.kv_len)
    block = gl.maximum(tile.first, 0)
    columns = _columns(mod, block, kv_len, FIRST, C, MODS)
    s = warpgroup_mma_wait(0, deps=(s,))
    release_k(stage, C)
    if C.q_registers:
        release_q(place, C)
    s, line = _scores(s, mod, block, columns, tile.whole, scale, FIRST, C, MODS)
    probabilities, top, total = first_softmax(s, to_base2, line, _has_line(C, MODS))
    words = packed(probabilities, shared.v.dtype)
    o = gl.full([QUERIES, C.value_dim], 0.0, gl.float32, layout)
    mbarrier.wait(shared.v_full.index(stage), phase)

    if MODS.mask_mod is not None:
        for _ in range(tile.partial):
            stage, phase, o, words, top, total = _step(
                part, PARTIAL, shared, q, stage, phase, o, words, top, total, mod, kv_len,
                scale, to_base2, C, MODS)
    for _ in range(tile.full):
        stage, phase, o, words, top, total = _step(
            part, FULL, shared, q, stage, phase, o, words, top, total, mod, kv_len, scale,
            to_base2, C, MODS)
    if not C.q_registers:
        release_q(place, C)

    p = unpacked(words, shared.v.dtype, gl.DotOperandLayout(0, layout, 2))
    o = warpgroup_mma(p, shared.v.index(stage), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    release_v(stage, C)
    stage, phase = next_place(stage, phase, C.stages)
    return stage, phase, o, top, total


@gluon.jit
def _store(part: gl.constexpr, tile, o, top, total, results, sizes, unit, C: gl.constexpr):
    """Normalised rows, and their statistics where wanted; scores are in multiples of `unit`."""
    lse, factor = statistics(top, total, unit)
    layout: gl.constexpr = _store_layout(C)
    empty = column(factor, o) == 0.0
    o = gl.where(empty, 0.0, o * column(factor, o))
    kind: gl.constexpr = results.out.dtype.element_ty
    if C.ctas > 1:
        o = unpacked(gathered(packed(o, kind)), kind, layout)
    else:  # through shared memory, which is faster but leaves room for one CTA
        o = gl.convert_layout(o.to(kind), layout)
    first_row = tile.row * C.tile_q + part * QUERIES
    row = first_row + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, C.value_dim, layout=gl.SliceLayout(0, layout))
    base = results.out + tile.batch.to(gl.int64) * results.batch_stride \
        + tile.head.to(gl.int64) * results.head_stride
    at = gl.expand_dims(row.to(gl.int64) * results.row_stride, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(row < sizes.q_len, 1) & gl.expand_dims(columns < results.value_dim, 0)
    gl.store(base + at, o, mask=inside)
    line = (tile.batch.to(gl.int64) * sizes.heads + tile.head) * sizes.q_len
    row = first_row + gl.arange(0, QUERIES, layout=top.type.layout)
    if results.lse is not None:
        gl.store(results.lse + line + row, lse, mask=row < sizes.q_len)
    if results.max_scores is not None:
        gl.store(results.max_scores + line + row, top * unit, mask=row < sizes.q_len)


@gluon.jit
def _consume(part: gl.constexpr, shared, results, sizes, args, scale, C: gl.constexpr,
             MODS: gl.constexpr):
    unit = scale
    to_base2 = scale * LOG2E
    if not C.fold_scale:
        unit = scale * 0.0 + MODS.result_scale
        to_base2 = scale * 0.0 + LOG2E * MODS.result_scale
    release_all(C)
    if part == C.consumers - 1:
        end_turn(part, C)
    stage = 0
    phase = 0
    place = 0
    tile_phase = 0
    mbarrier.wait(shared.q_full.index(0), 0)
    tile = announced(shared, place)
    while tile.batch >= 0:
        stage, phase, o, top, total = _attend(part, tile, shared, place, stage, phase, sizes, args,
                                              scale, to_base2, C, MODS)
        _store(part, tile, o, top, total, results, sizes, unit, C)
        place, tile_phase = next_place(place, tile_phase, C.q_stages)
        mbarrier.wait(shared.q_full.index(place), tile_phase)
        tile = announced(shared, place)


@gluon.jit
def hopper_forward(q_desc, k_desc, v_desc, results, sizes, table, args, counter, scale,
                   C: gl.constexpr, MODS: gl.constexpr):
    """Persistent CTAs, C.ctas per multiprocessor; four warps at the start."""
    shared = allocate(q_desc, k_desc, v_desc, C)
    if C.consumers == 1:
        gl.warp_specialize([
            (_consume, (0, shared, results, sizes, args, scale, C, MODS)),
            (produce, (q_desc, k_desc, v_desc, counter, sizes, table, shared, C)),
        ], [1], [C.producer_registers])
    elif C.consumers == 2:
        gl.warp_specialize([
            (_consume, (0, shared, results, sizes, args, scale, C, MODS)),
            (_consume, (1, shared, results, sizes, args, scale, C, MODS)),
            (produce, (q_desc, k_desc, v_desc, counter, sizes, table, shared, C)),
        ], [4, 1], [C.consumer_registers, C.producer_registers])
    else:
        gl.warp_specialize([
            (_consume, (0, shared, results, sizes, args, scale, C, MODS)),
            (_consume, (1, shared, results, sizes, args, scale, C, MODS)),
            (_consume, (2, shared, results, sizes, args, scale, C, MODS)),
            (produce, (q_desc, k_desc, v_desc, counter, sizes, table, shared, C)),
        ], [4, 4, 1], [C.consumer_registers, C.consumer_registers, C.producer_registers])
