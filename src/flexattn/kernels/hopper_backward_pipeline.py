"""The pipeline of Hopper's backward: what its warps share, the producer, and the reducer of dq.

In: TMA descriptors, the problem's sizes and the block mask's tables. Out: the key and value rows of
a CTA and tile after tile of queries in shared memory; dq, added up in global memory.

Who waits for whom: data arrives on mbarriers (`*_full`). Everything else goes by the hardware's
named barriers: the consumers give back a stage, each hands its share of dq to the reducer and gets
the memory back, and in the middle of a step the two meet. Where a CTA takes tile after tile of keys
(C.resident), consumers and reducer give back the keys and values, and dv and dk go through the
reducer as dq does, while the next tile is under way.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexattn.kernels.gluon_shim import reinterpret, tma_add, tma_load, tma_store
from flexattn.kernels.hopper_pipeline import named_barrier
from flexattn.kernels.triton_tiles import ends_ragged, first_block, next_block


class Sizes(NamedTuple):
    """int32. kv_batches: 1, or as many as batches."""

    q_len: object
    kv_len: object
    batches: object
    heads: object
    kv_batches: object
    kv_heads: object


class Blocks(NamedTuple):
    """The block mask by tiles of keys: tables of the runs of full and of partial blocks (see
    runtime/gpu_tables.py), and its batches and heads (int32)."""

    full: object
    partial: object
    batches: object
    heads: object


class Inputs(NamedTuple):
    """TMA descriptors, of [batch, head, row, column]; statistics of [1, batch * head, lse2 and
    delta, row]."""

    q: object
    k: object
    v: object
    d_out: object
    statistics: object


class Shared(NamedTuple):
    """Shared memory. k and v: 64 rows of each consumer. q, d_out, statistics: a tile a stage.
    ds: of each consumer, twice; dq: each one's share. step: of each of twice as many steps as
    there are stages, the line (batch and head) and the first query, for the reducer and the mods.
    tile: if C.resident, of a tile of keys: the number of the one after it, and how many full and
    partial blocks the first head's walk has. never: two mbarriers that nobody
    uses, see `end_block`."""

    q: object
    k: object
    v: object
    d_out: object
    statistics: object
    ds: object
    dq: object
    step: object
    tile: object
    kv_full: object
    q_full: object
    d_out_full: object
    never: object


class Place(NamedTuple):
    """The keys of a CTA: batch and head of k and v, and the tile."""

    batch: object
    head: object
    tile: object


class Walk(NamedTuple):
    """The steps of one batch and query head: a row of the block mask's tables; how many full blocks
    come first, and how many partial ones then. The last block of queries, where it is ragged,
    counts as partial if a mod looks at it."""

    batch: object
    head: object
    row: object
    full: object
    partial: object


ROWS = gl.constexpr(64)  # of a consumer: keys, and queries or columns of dq

# Named barriers: 16 exist, of which Triton uses the lowest, one more than there are partitions.

_DQ_FULL = gl.constexpr(5)  # and 6: one per consumer
_DQ_EMPTY = gl.constexpr(7)  # and 15
_MEET = gl.constexpr(8)
_STAGE_EMPTY = gl.constexpr(9)  # .. 11: one per stage
_KEYS_EMPTY = gl.constexpr(12)


@gluon.jit
def meet():
    """Both consumers come here."""
    named_barrier("sync", _MEET, 256)


@gluon.jit
def release_stage(stage):
    named_barrier("arrive", _STAGE_EMPTY + stage, 256 + 32)


@gluon.jit
def release_keys():
    """By consumers and reducer: they have used the keys and values, and `tile`."""
    named_barrier("arrive", _KEYS_EMPTY, 256 + 64)


@gluon.jit
def await_dq_memory(part: gl.constexpr):
    named_barrier("sync", _DQ_EMPTY + 8 * part, 128 + 32)


@gluon.jit
def hand_over_dq(part: gl.constexpr):
    named_barrier("arrive", _DQ_FULL + part, 128 + 32)


@gluon.jit
def end_block(shared, number: gl.constexpr):
    """Ends a basic block: ptxas moves no wait for tensor cores above it. Each needs its number."""
    mbarrier.wait(shared.never[number].index(0), 1)


@gluon.jit
def allocate(inputs, dq_desc, C: gl.constexpr) -> Shared:
    dtype: gl.constexpr = inputs.q.dtype
    mbarriers: gl.constexpr = mbarrier.MBarrierLayout()
    words: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    of_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.tile_q, C.head_dim], dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, C.head_dim], dtype)
    k = gl.allocate_shared_memory(dtype, [2, ROWS, C.head_dim], of_keys)
    v = gl.allocate_shared_memory(dtype, [2, ROWS, C.head_dim], of_keys)
    q = gl.allocate_shared_memory(dtype, [C.stages, C.tile_q, C.head_dim], of_queries)
    d_out = gl.allocate_shared_memory(dtype, [C.stages, C.tile_q, C.head_dim], of_queries)
    statistics = gl.allocate_shared_memory(
        gl.float32, [C.stages, 2 * C.tile_q],
        gl.NVMMASharedLayout.get_default_for([2 * C.tile_q], gl.float32))
    ds = gl.allocate_shared_memory(
        dtype, [4, ROWS, C.tile_q],
        gl.NVMMASharedLayout.get_default_for([ROWS, C.tile_q], dtype))
    dq = gl.allocate_shared_memory(
        gl.float32, [2, ROWS, 64],
        gl.NVMMASharedLayout.get_default_for([ROWS, 64], gl.float32))
    step = gl.allocate_shared_memory(gl.int32, [4 * C.stages, 1], words)
    tile = gl.allocate_shared_memory(gl.int32, [3, 1], words)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarriers)
    q_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarriers)
    d_out_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarriers)
    # Apart, or Triton would put a barrier between the waits for them.
    never = (gl.allocate_shared_memory(gl.int64, [1, 1], mbarriers),
             gl.allocate_shared_memory(gl.int64, [1, 1], mbarriers))
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(never[i].index(0), count=1)
    for stage in gl.static_range(gl.constexpr(C.stages)):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(d_out_full.index(stage), count=1)
    return Shared(q, k, v, d_out, statistics, ds, dq, step, tile, kv_full, q_full, d_out_full,
                  never)


@gluon.jit
def next_place(stage, phase, C: gl.constexpr):
    """Of the ring of stages."""
    stage += 1
    if stage == C.stages:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _put(memory, value):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    memory.store(gl.full([1], value, gl.int32, one))


@gluon.jit
def _get(memory):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return memory.load(one).item()


@gluon.jit
def put_step(shared, stage, phase, line, first_q, C: gl.constexpr):
    place = 2 * (stage + C.stages * phase)
    _put(shared.step.index(place), line)
    _put(shared.step.index(place + 1), first_q)


@gluon.jit
def first_query(shared, stage, phase, C: gl.constexpr):
    """Of a step."""
    return _get(shared.step.index(2 * (stage + C.stages * phase) + 1))


@gluon.jit
def await_keys(shared, turn):
    """The keys and values of a tile have come. Gives the number of the tile after it."""
    mbarrier.wait(shared.kv_full.index(0), turn)
    mbarrier.wait(shared.kv_full.index(1), turn)
    return _get(shared.tile.index(0))


# The walk


@gluon.jit
def all_tiles(sizes, C: gl.constexpr):
    """Tiles of keys of all heads and batches."""
    return gl.cdiv(sizes.kv_len, C.tile_kv) * sizes.kv_heads * sizes.kv_batches


@gluon.jit
def keys_of(number, sizes, C: gl.constexpr) -> Place:
    """The number-th tile of keys."""
    tiles = gl.cdiv(sizes.kv_len, C.tile_kv)
    line = number // tiles
    return Place(line // sizes.kv_heads, line % sizes.kv_heads, number % tiles)


@gluon.jit
def sharers(sizes):
    """How many query heads (and sequences) have the same keys."""
    return sizes.heads // sizes.kv_heads * (sizes.batches // sizes.kv_batches)


@gluon.jit
def _blocks(table, row):
    run = gl.load(table[0] + row)
    runs = gl.load(table[0] + row + 1)
    return (gl.load(table[3] + runs) - gl.load(table[3] + run)).to(gl.int32)


@gluon.jit
def walk_of(place, sharer, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr) -> Walk:
    group = sizes.heads // sizes.kv_heads
    batch = place.batch + sharer // group
    head = place.head * group + sharer % group
    tiles = gl.cdiv(sizes.q_len, C.tile_q)
    if blocks is None:
        row = place.tile
        full = tiles
        partial = tiles * 0
        ragged = (sizes.q_len % C.tile_q != 0).to(gl.int32)
    else:
        mask_line = (batch % blocks.batches) * blocks.heads + head % blocks.heads
        row = mask_line * gl.cdiv(sizes.kv_len, C.tile_kv) + place.tile
        full = _blocks(blocks.full, row)
        partial = _blocks(blocks.partial, row)
        ragged = ends_ragged(blocks.full, row, tiles, sizes.q_len, C.tile_q)
    if MODS.score_mod is None:  # statistics beyond the end make probabilities 0
        ragged = ragged * 0
    return Walk(batch, head, row, full - ragged, partial + ragged)


@gluon.jit
def announced(shared, place, sharer, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr) -> Walk:
    """A walk, the first of which the producer has looked up."""
    full = _get(shared.tile.index(1))
    partial = _get(shared.tile.index(2))
    walk = walk_of(place, sharer, sizes, None, C, MODS)
    if blocks is not None and sharer > 0:
        found = walk_of(place, sharer, sizes, blocks, C, MODS)
        full = found.full
        partial = found.partial
    return Walk(walk.batch, walk.head, walk.row, full, partial)


# The producer, one warp


@gluon.jit
def _load(desc, batch, head, row, full, memory):
    box: gl.constexpr = desc.block_type.shape
    tma_load(desc, [batch, head, row, 0], full, reinterpret(memory, box, desc.layout))


@gluon.jit
def _load_keys(desc, place, full, memory, C: gl.constexpr):
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for part in gl.static_range(2):
        _load(desc, place.batch, place.head, place.tile * C.tile_kv + part * ROWS, full,
              memory.index(part))


@gluon.jit
def _load_step(inputs, walk, line, block, stage, phase, shared, C: gl.constexpr):
    """One tile of queries, when its stage is free. Gives the next stage."""
    first_q = block * C.tile_q
    named_barrier("sync", _STAGE_EMPTY + stage, 256 + 32)
    put_step(shared, stage, phase, line, first_q, C)
    full = shared.q_full.index(stage)
    mbarrier.expect(full, inputs.q.block_type.nbytes + inputs.statistics.block_type.nbytes)
    _load(inputs.q, walk.batch, walk.head, first_q, full, shared.q.index(stage))
    statistics: gl.constexpr = inputs.statistics.block_type.shape
    tma_load(inputs.statistics, [0, line, 0, first_q], full,
             reinterpret(shared.statistics.index(stage), statistics, inputs.statistics.layout))
    full = shared.d_out_full.index(stage)
    mbarrier.expect(full, inputs.d_out.block_type.nbytes)
    _load(inputs.d_out, walk.batch, walk.head, first_q, full, shared.d_out.index(stage))
    return next_place(stage, phase, C)


@gluon.jit
def _first_blocks(place, sharer, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr):
    """A walk, and where its full and its partial blocks begin."""
    walk = walk_of(place, sharer, sizes, blocks, C, MODS)
    fully = ()
    partly = ()
    if blocks is not None:
        last = gl.cdiv(sizes.q_len, C.tile_q) - 1
        fully = first_block(blocks.full, walk.row, last)[1:]
        partly = first_block(blocks.partial, walk.row, last)[1:]
    return walk, fully, partly


@gluon.jit
def _load_steps(inputs, walk, fully, partly, stage, phase, shared, sizes, blocks,
                C: gl.constexpr):
    """The tiles of queries of one walk."""
    last = gl.cdiv(sizes.q_len, C.tile_q) - 1
    line = walk.batch * sizes.heads + walk.head
    if blocks is None:
        for block in range(walk.full + walk.partial):
            stage, phase = _load_step(inputs, walk, line, block, stage, phase, shared, C)
    else:
        run, runs, block, stop = fully
        for _ in range(walk.full):
            stage, phase = _load_step(inputs, walk, line, block, stage, phase, shared, C)
            run, block, stop = next_block(blocks.full, run, runs, block, stop, last)
        run, runs, block, stop = partly
        for _ in range(walk.partial):
            stage, phase = _load_step(inputs, walk, line, block, stage, phase, shared, C)
            run, block, stop = next_block(blocks.partial, run, runs, block, stop, last)
    return stage, phase


@gluon.jit
def produce(inputs, counter, shared, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr):
    """Loads the keys and values and, when the tables are read, tile after tile of queries, as soon
    as the kernel before this one has written statistics. The one after it may start, and wait.
    counter: tiles taken beyond the first of each CTA, if C.resident."""
    gdc_launch_dependents()
    if C.resident:
        _produce_all(inputs, counter, shared, sizes, blocks, C, MODS)
    else:
        place = keys_of(gl.program_id(0), sizes, C)
        _load_keys(inputs.k, place, shared.kv_full.index(0), shared.k, C)
        _load_keys(inputs.v, place, shared.kv_full.index(1), shared.v, C)
        stage = 0
        phase = 0
        gdc_wait()
        for sharer in range(sharers(sizes)):
            walk, fully, partly = _first_blocks(place, sharer, sizes, blocks, C, MODS)
            stage, phase = _load_steps(inputs, walk, fully, partly, stage, phase, shared, sizes,
                                       blocks, C)


@gluon.jit
def _produce_all(inputs, counter, shared, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr):
    tiles = all_tiles(sizes, C)
    number = gl.program_id(0)
    stage = 0
    phase = 0
    gdc_wait()
    while number < tiles:
        place = keys_of(number, sizes, C)
        number = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        # Read while the consumers are still busy with the tile before.
        walk, fully, partly = _first_blocks(place, 0, sizes, blocks, C, MODS)
        named_barrier("sync", _KEYS_EMPTY, 256 + 64)
        _put(shared.tile.index(0), number)
        _put(shared.tile.index(1), walk.full)
        _put(shared.tile.index(2), walk.partial)
        _load_keys(inputs.k, place, shared.kv_full.index(0), shared.k, C)
        _load_keys(inputs.v, place, shared.kv_full.index(1), shared.v, C)
        stage, phase = _load_steps(inputs, walk, fully, partly, stage, phase, shared, sizes,
                                   blocks, C)
        for sharer in range(1, sharers(sizes)):
            walk, fully, partly = _first_blocks(place, sharer, sizes, blocks, C, MODS)
            stage, phase = _load_steps(inputs, walk, fully, partly, stage, phase, shared, sizes,
                                       blocks, C)


# The reducer, one warp


@gluon.jit
def reduce(outputs, shared, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr):
    """Adds the consumers' shares of dq to global memory, once the kernel before this one has made
    it 0."""
    gdc_wait()
    for part in gl.static_range(2):
        _release_dq_memory(part)
    if C.resident:
        _reduce_all(outputs, shared, sizes, blocks, C, MODS)
    else:
        place = keys_of(gl.program_id(0), sizes, C)
        stage = 0
        phase = 0
        _add_steps(outputs.dq, place, stage, phase, shared, sizes, blocks, C, MODS)


@gluon.jit
def _reduce_all(outputs, shared, sizes, blocks, C: gl.constexpr, MODS: gl.constexpr):
    tiles = all_tiles(sizes, C)
    number = gl.program_id(0)
    stage = 0
    phase = 0
    turn = 0
    release_keys()
    while number < tiles:
        place = keys_of(number, sizes, C)
        number = await_keys(shared, turn)
        release_keys()
        stage, phase = _add_steps(outputs.dq, place, stage, phase, shared, sizes, blocks, C, MODS)
        _store_keys(outputs.dv, place, shared, C)
        _store_keys(outputs.dk, place, shared, C)
        turn ^= 1


@gluon.jit
def _release_dq_memory(part: gl.constexpr):
    named_barrier("arrive", _DQ_EMPTY + 8 * part, 128 + 32)


@gluon.jit
def _release_stored():
    """What was stored last has been read from both consumers' memory."""
    tma.store_wait(1)
    _release_dq_memory(0)
    tma.store_wait(0)
    _release_dq_memory(1)


@gluon.jit
def _add_steps(desc, place, stage, phase, shared, sizes, blocks, C: gl.constexpr,
               MODS: gl.constexpr):
    """Step by step."""
    box: gl.constexpr = desc.block_type.shape
    for sharer in range(sharers(sizes)):
        walk = walk_of(place, sharer, sizes, blocks, C, MODS)
        line = walk.batch * sizes.heads + walk.head
        for _ in range(walk.full + walk.partial):
            for part in gl.static_range(2):
                named_barrier("sync", _DQ_FULL + part, 128 + 32)
                row = first_query(shared, stage, phase, C) + part * C.row_step
                tma_add(desc, [0, line, row, part * C.column_step],
                        reinterpret(shared.dq.index(part), box, desc.layout))
            _release_stored()
            stage, phase = next_place(stage, phase, C)
    return stage, phase


@gluon.jit
def _store_keys(desc, place, shared, C: gl.constexpr):
    """dk or dv of a tile."""
    for part in gl.static_range(2):
        named_barrier("sync", _DQ_FULL + part, 128 + 32)
        tma_store(desc, [place.batch, place.head, place.tile * C.tile_kv + part * ROWS, 0],
                  reinterpret(shared.dq.index(part), desc.block_type.shape, desc.layout,
                              desc.dtype))
    _release_stored()
