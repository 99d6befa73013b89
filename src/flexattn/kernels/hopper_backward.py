"""Backward of attention with a score mod and a mask on Hopper, in one kernel.

In: TMA descriptors of 16-bit q, k, v and the gradient of the output, and of statistics (of each row
lse * log2(e) and delta = sum(d_out * out) - d_lse, with rows beyond the last such that p is 0); the
problem's sizes, the block mask's tables or None, and the mod's functions (see lower/triton.py) with
their arguments. Out: dk, dv, and what is to be multiplied by the scale to be dq, in float32.

A CTA owns 128 keys of one head, 64 for each of two consumers, and goes through the queries of all
heads that share them. Scores are transposed, S^T = K Q^T, so that P^T and dS^T are operands in
registers of dV += P^T dO and dK += dS^T Q. Only dS passes through shared memory, to be read
transposed for dQ = dS K, of which each consumer computes a share, and a warp of its own, the
reducer, adds it to dq in global memory: the sums' order differs from call to call.

Full blocks come first, and their steps have no mask code; then partial ones. Where the tile of keys
sticks out of them, all blocks count as partial. Nothing is in flight from one step to the next, or
ptxas would serialise the tensor cores.
"""

from typing import NamedTuple

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flexattn.kernels.gluon_shim import reinterpret, tma_store
from flexattn.kernels.hopper_backward_pipeline import (
    ROWS,
    all_tiles,
    allocate,
    announced,
    await_dq_memory,
    await_keys,
    end_block,
    first_query,
    hand_over_dq,
    keys_of,
    meet,
    next_place,
    produce,
    reduce,
    release_keys,
    release_stage,
    sharers,
    walk_of,
)
from flexattn.kernels.hopper_softmax import LOG2E, exp2, opaque


class Outputs(NamedTuple):
    """TMA descriptors: dk and dv of [batch, head, row, column], dq of [1, line, row, column]."""

    dk: object
    dv: object
    dq: object


class Mod(NamedTuple):
    """The mod's arguments, and what it needs of a tile of keys."""

    args: object
    batch: object
    head: object
    of_head: object
    of_keys: object
    kv_idx: object


@constexpr_function
def _layout(columns):
    """Of a product of the tensor cores with so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _mod_of(part: gl.constexpr, place, walk, sizes, args, C: gl.constexpr,
            MODS: gl.constexpr) -> Mod:
    rows: gl.constexpr = gl.SliceLayout(1, _layout(C.tile_q))
    kv_idx = place.tile * C.tile_kv + part * ROWS + gl.arange(0, ROWS, layout=rows)
    kv_idx = gl.expand_dims(gl.minimum(kv_idx, sizes.kv_len - 1), 1)
    head = MODS.mod_head(walk.batch, walk.head, args)
    keys = MODS.mod_columns(walk.batch, walk.head, kv_idx, args, head)
    return Mod(args, walk.batch, walk.head, head, keys, kv_idx)


@gluon.jit
def _queries_read(mod, first_q, sizes, C: gl.constexpr, MODS: gl.constexpr):
    """What the mod needs of the queries of a step, where that is read from memory: each thread
    reads for one query, and the reads are under way while the tensor cores compute the scores."""
    line: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    q_idx = first_q + gl.arange(0, C.tile_q, layout=gl.SliceLayout(0, line))
    q_idx = gl.expand_dims(gl.minimum(q_idx, sizes.q_len - 1), 0)
    return MODS.mod_rows(mod.batch, mod.head, q_idx, mod.args, mod.of_head)


@gluon.jit
def _for_scores(values, s):
    """The same values as the scores' threads need them."""
    spread = ()
    for i in gl.static_range(len(values)):
        spread = spread + (gl.convert_layout(values[i], s.type.layout),)
    return spread


@gluon.jit
def _probabilities(part: gl.constexpr, s, lse2, mod, read, first_q, place, sizes, scale,
                   MASKED: gl.constexpr, C: gl.constexpr, MODS: gl.constexpr):
    """p, and the factor of (dp - delta) in the score's gradient. read: by `_queries_read`."""
    q_idx = first_q + gl.arange(0, C.tile_q, layout=gl.SliceLayout(0, s.type.layout))
    q_idx = gl.expand_dims(q_idx, 0)
    kept = True
    if MASKED:
        first = place.tile * C.tile_kv + part * ROWS
        row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
        kept = gl.expand_dims(row < sizes.kv_len, 1)
        if MODS.score_mod is not None:  # otherwise lse2 makes p 0
            kept = kept & (opaque(q_idx) < sizes.q_len)
        q_idx = gl.minimum(q_idx, sizes.q_len - 1)
    if C.reads_queries:
        queries = _for_scores(read, s)
    else:
        queries = MODS.mod_rows(mod.batch, mod.head, q_idx, mod.args, mod.of_head)
    parts = (mod.of_head, queries, mod.of_keys)
    if MASKED and MODS.mask_mod is not None:
        # LLVM would compare many columns as one vector of bits, which a GPU does not have.
        kept = kept & MODS.mask_mod(mod.batch, mod.head, opaque(q_idx), mod.kv_idx, mod.args,
                                    parts)
    if MODS.score_mod is None:
        exponent = s * (scale * LOG2E)
    else:  # the forward has reported what the mod reads out of range
        score = s * (scale * MODS.score_scale)
        exponent = MODS.score_mod(score, mod.batch, mod.head, q_idx, mod.kv_idx, False, mod.args,
                                  parts) * (LOG2E * MODS.result_scale)
    p = exp2(exponent - lse2)
    if MASKED:
        p = gl.where(kept, p, 0.0)
    factor = p
    if MODS.score_mod is not None:
        factors = MODS.score_mod_grad(score, p, mod.batch, mod.head, q_idx, mod.kv_idx, False,
                                      mod.args, parts)
        factor = factors[0]
        if MASKED:  # a masked position's derivative may be infinite
            factor = gl.where(kept, factor, 0.0)
    return p, factor


@gluon.jit
def _start_product(part: gl.constexpr, keys, queries, C: gl.constexpr):
    """A consumer's keys (or values) times the queries (or gradients) of a stage: [64, tile_q]."""
    zeros = gl.full([ROWS, C.tile_q], 0.0, gl.float32, _layout(C.tile_q))
    return warpgroup_mma(keys.index(part), queries.permute((1, 0)), zeros, use_acc=False,
                         is_async=True)


@gluon.jit
def _start_dq(part: gl.constexpr, of: gl.constexpr, dq, parity, shared, use_acc: gl.constexpr,
              C: gl.constexpr):
    """Adds what one consumer's keys contribute to this consumer's share of dq."""
    ds = shared.ds.index(2 * parity + of).slice(part * C.row_step, ROWS, dim=1)
    k = shared.k.index(of).slice(part * C.column_step, 64, dim=1)
    return warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=use_acc, is_async=True)


@gluon.jit
def _step(part: gl.constexpr, MASKED: gl.constexpr, shared, stage, phase, parity, dk, dv, mod,
          place, sizes, scale, C: gl.constexpr, MODS: gl.constexpr):
    """One tile of queries."""
    by_queries: gl.constexpr = gl.SliceLayout(0, _layout(C.tile_q))
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    dtype: gl.constexpr = shared.q.dtype
    mbarrier.wait(shared.q_full.index(stage), phase)
    s = _start_product(part, shared.k, shared.q.index(stage), C)
    read = ()
    if C.reads_queries:
        read = _queries_read(mod, first_query(shared, stage, phase, C), sizes, C, MODS)
    statistics = shared.statistics.index(stage)
    lse2 = gl.expand_dims(statistics.slice(0, C.tile_q).load(by_queries), 0)
    mbarrier.wait(shared.d_out_full.index(stage), phase)
    dp = _start_product(part, shared.v, shared.d_out.index(stage), C)
    s = warpgroup_mma_wait(1, deps=(s,))
    first_q = 0
    if MASKED or MODS.score_mod is not None:  # no sooner, or ptxas would keep masks in registers
        first_q = first_query(shared, stage, phase, C)
    p, factor = _probabilities(part, s, lse2, mod, read, first_q, place, sizes, scale, MASKED, C,
                               MODS)
    p = gl.convert_layout(p.to(dtype), operand)
    delta = gl.expand_dims(statistics.slice(C.tile_q, C.tile_q).load(by_queries), 0)
    end_block(shared, 0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (factor * (dp - delta)).to(dtype)
    ds_operand = gl.convert_layout(ds, operand)
    dv = warpgroup_mma(p, shared.d_out.index(stage), dv, is_async=True)
    shared.ds.index(2 * parity + part).store(ds)
    fence_async_shared()
    dq = gl.full([ROWS, 64], 0.0, gl.float32, _layout(64))
    dq = _start_dq(part, part, dq, parity, shared, False, C)
    if C.halves != "keys":
        meet()
        dq = _start_dq(part, 1 - part, dq, parity, shared, True, C)
    dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
    dq, dv, p = warpgroup_mma_wait(1, deps=(dq, dv, p))
    await_dq_memory(part)
    shared.dq.index(part).store(dq)
    fence_async_shared()
    hand_over_dq(part)
    end_block(shared, 1)
    dk, ds_operand = warpgroup_mma_wait(0, deps=(dk, ds_operand))
    release_stage(stage)
    stage, phase = next_place(stage, phase, C)
    return stage, phase, parity ^ 1, dk, dv


@gluon.jit
def _store(part: gl.constexpr, desc, x, place, memory, C: gl.constexpr):
    """A consumer's rows, through shared memory that it alone still uses."""
    box: gl.constexpr = desc.block_type.shape
    rows = memory.index(part)
    rows.store(x.to(memory.dtype))
    fence_async_shared()
    tma_store(desc, [place.batch, place.head, place.tile * C.tile_kv + part * ROWS, 0],
              reinterpret(rows, box, desc.layout))


@gluon.jit
def _consume(part: gl.constexpr, outputs, shared, sizes, blocks, args, scale, C: gl.constexpr,
             MODS: gl.constexpr):
    for free in gl.static_range(gl.constexpr(C.stages)):
        release_stage(free)
    if C.resident:
        _consume_all(part, outputs, shared, sizes, blocks, args, scale, C, MODS)
    else:
        place = keys_of(gl.program_id(0), sizes, C)
        dk, dv = _zeros(C)
        stage = 0
        phase = 0
        parity = 0
        for sharer in range(sharers(sizes)):
            walk = walk_of(place, sharer, sizes, blocks, C, MODS)
            mod = _mod_of(part, place, walk, sizes, args, C, MODS)
            mbarrier.wait(shared.kv_full.index(0), 0)  # while the tables were read, they came
            mbarrier.wait(shared.kv_full.index(1), 0)
            stage, phase, parity, dk, dv = _walk(part, shared, stage, phase, parity, dk, dv, walk,
                                                 mod, place, sizes, scale, C, MODS)
        _store(part, outputs.dv, dv, place, shared.v, C)
        meet()  # the other one's dq has read these keys
        _store(part, outputs.dk, dk * scale, place, shared.k, C)
        tma.store_wait(0)


@gluon.jit
def _zeros(C: gl.constexpr):
    """dk and dv at first."""
    return (gl.full([ROWS, C.head_dim], 0.0, gl.float32, _layout(C.head_dim)),
            gl.full([ROWS, C.head_dim], 0.0, gl.float32, _layout(C.head_dim)))


@gluon.jit
def _walk(part: gl.constexpr, shared, stage, phase, parity, dk, dv, walk, mod, place, sizes, scale,
          C: gl.constexpr, MODS: gl.constexpr):
    """All steps of a batch and query head."""
    bounded = (place.tile + 1) * C.tile_kv > sizes.kv_len
    full = gl.where(bounded, 0, walk.full)
    for _ in range(full):
        stage, phase, parity, dk, dv = _step(part, False, shared, stage, phase, parity, dk, dv,
                                             mod, place, sizes, scale, C, MODS)
    for _ in range(walk.full + walk.partial - full):
        stage, phase, parity, dk, dv = _step(part, True, shared, stage, phase, parity, dk, dv,
                                             mod, place, sizes, scale, C, MODS)
    return stage, phase, parity, dk, dv


@gluon.jit
def _consume_all(part: gl.constexpr, outputs, shared, sizes, blocks, args, scale, C: gl.constexpr,
                 MODS: gl.constexpr):
    """Tile after tile of keys."""
    tiles = all_tiles(sizes, C)
    number = gl.program_id(0)
    stage = 0
    phase = 0
    parity = 0
    turn = 0
    release_keys()
    while number < tiles:
        place = keys_of(number, sizes, C)
        dk, dv = _zeros(C)
        number = await_keys(shared, turn)
        for sharer in range(sharers(sizes)):
            walk = announced(shared, place, sharer, sizes, blocks, C, MODS)
            mod = _mod_of(part, place, walk, sizes, args, C, MODS)
            stage, phase, parity, dk, dv = _walk(part, shared, stage, phase, parity, dk, dv, walk,
                                                 mod, place, sizes, scale, C, MODS)
        release_keys()
        _hand_over(part, outputs.dv, dv, shared)
        _hand_over(part, outputs.dk, dk * scale, shared)
        turn ^= 1


@gluon.jit
def _hand_over(part: gl.constexpr, desc, x, shared):
    """A consumer's rows of dk or dv, for the reducer to store."""
    await_dq_memory(part)
    memory = shared.dq.index(part)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(x.shape, desc.dtype)
    reinterpret(memory, x.shape, layout, desc.dtype).store(x.to(desc.dtype))
    fence_async_shared()
    hand_over_dq(part)


@gluon.jit
def hopper_backward(inputs, outputs, sizes, blocks, args, counter, scale, C: gl.constexpr,
                    MODS: gl.constexpr):
    """A CTA takes 128 keys of a head at a time; four warps at the start."""
    shared = allocate(inputs, outputs.dq, C)
    gl.warp_specialize([
        (_consume, (0, outputs, shared, sizes, blocks, args, scale, C, MODS)),
        (_consume, (1, outputs, shared, sizes, blocks, args, scale, C, MODS)),
        (produce, (inputs, counter, shared, sizes, blocks, C, MODS)),
        (reduce, (outputs, shared, sizes, blocks, C, MODS)),
    ], [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers])
