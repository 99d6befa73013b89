"""Hopper's pipeline: what producer and consumers share, and the producer itself.

In: TMA descriptors of q, k and v, the problem's sizes and the block mask's table. Out: tiles of q,
k and v in shared memory, in the order in which the consumers use them.

Who waits for whom: data arrives on mbarriers (`*_full`); buffers are given back, and turns passed
on, by the hardware's named barriers, which, unlike an mbarrier's arrive, need no barrier of the
whole partition before them.
"""

from typing import NamedTuple

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flexattn.kernels.gluon_shim import reinterpret, tma_load


class Sizes(NamedTuple):
    """int32. kv_group: query heads per head of k and v; kv_batches: 0 where all batches have the
    same k and v, otherwise 1; row_tiles: tiles of queries per head; section: heads walked
    together, so that their keys and values stay in the second-level cache."""

    q_len: object
    kv_len: object
    batches: object
    heads: object
    kv_group: object
    kv_batches: object
    row_tiles: object
    section: object


class Table(NamedTuple):
    """The block mask in the kernel's tiles: int32 pointers, and whether it has batches and heads
    (0 or 1).

    order [mask rows]: rows of one batch and head, those with most blocks first;
    rows [mask rows, 5]: first block (-1: none), whether it is full, where the row's runs start,
    and how many partial and full blocks there are besides the first;
    runs [runs + 1, 2]: start and end in blocks of keys; a row's partial runs, then its full ones.
    """

    order: object
    rows: object
    runs: object
    batches: object
    heads: object


class Shared(NamedTuple):
    """Shared memory: tiles, the mbarriers that say they are full, and what the producer tells the
    consumers: of a tile (the fields of `Tile`) and of a block (its index)."""

    q: object
    k: object
    v: object
    q_full: object
    k_full: object
    v_full: object
    tile: object
    block: object


class Tile(NamedTuple):
    """A tile of queries of a row of the block mask: batch (-1: no tile is left), head, row, first
    block of keys (-1: none), whether it is full, where the other blocks' runs start, and how many
    of these are partial and full."""

    batch: object
    head: object
    row: object
    first: object
    whole: object
    run: object
    partial: object
    full: object


QUERIES = gl.constexpr(64)  # of a consumer

# Named barriers: 16 exist, of which Triton uses the lowest

_SECOND_Q_EMPTY = gl.constexpr(5)
_TURN = gl.constexpr(6)  # .. 8: consumers take turns
_V_EMPTY = gl.constexpr(9)  # .. 11: one per stage
_K_EMPTY = gl.constexpr(12)  # .. 14
_Q_EMPTY = gl.constexpr(15)


@constexpr_function
def _barrier(operation, threads):
    return f"bar.{operation} $1, {threads}; mov.b32 $0, $1;"


@gluon.jit
def named_barrier(operation: gl.constexpr, which, threads: gl.constexpr):
    """Each thread of this partition arrives at a barrier of `threads` threads ("arrive"), or waits
    there, too ("sync")."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    each = gl.full([32 * gl.num_warps()], which, gl.int32, layout)
    gl.inline_asm_elementwise(_barrier(operation, threads), "=r,r", [each], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def await_turn(part: gl.constexpr, C: gl.constexpr):
    if C.consumers > 1:
        named_barrier("sync", _TURN + part, 256)


@gluon.jit
def end_turn(part: gl.constexpr, C: gl.constexpr):
    """The next consumer may start its products."""
    if C.consumers > 1:
        named_barrier("arrive", _TURN + (part + 1) % C.consumers, 256)


@gluon.jit
def _q_empty(place):
    return _Q_EMPTY - (_Q_EMPTY - _SECOND_Q_EMPTY) * place


@gluon.jit
def release_q(place, C: gl.constexpr):
    named_barrier("arrive", _q_empty(place), C.release_threads)


@gluon.jit
def release_k(stage, C: gl.constexpr):
    named_barrier("arrive", _K_EMPTY + stage, C.release_threads)


@gluon.jit
def release_v(stage, C: gl.constexpr):
    named_barrier("arrive", _V_EMPTY + stage, C.release_threads)


@gluon.jit
def release_all(C: gl.constexpr):
    """All buffers are free at the start."""
    for place in gl.static_range(gl.constexpr(C.q_stages)):
        release_q(place, C)
    for stage in gl.static_range(gl.constexpr(C.stages)):
        release_k(stage, C)
        release_v(stage, C)


@gluon.jit
def allocate(q_desc, k_desc, v_desc, C: gl.constexpr) -> Shared:
    dtype: gl.constexpr = q_desc.dtype
    mbarriers: gl.constexpr = mbarrier.MBarrierLayout()
    words: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(
        dtype, [C.q_stages * C.consumers * C.head_chunks, QUERIES, C.head_chunk],
        gl.NVMMASharedLayout.get_default_for([QUERIES, C.head_chunk], dtype))
    k = gl.allocate_shared_memory(
        dtype, [C.stages * C.head_chunks, C.tile_kv, C.head_chunk],
        gl.NVMMASharedLayout.get_default_for([C.tile_kv, C.head_chunk], dtype))
    v = gl.allocate_shared_memory(
        dtype, [C.stages, C.tile_kv, C.value_dim],
        gl.NVMMASharedLayout.get_default_for([C.tile_kv, C.value_dim], dtype))
    q_full = gl.allocate_shared_memory(gl.int64, [C.q_stages, 1], mbarriers)
    k_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarriers)
    v_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarriers)
    for place in gl.static_range(gl.constexpr(C.q_stages)):
        mbarrier.init(q_full.index(place), count=1)
    for stage in gl.static_range(gl.constexpr(C.stages)):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    tile = gl.allocate_shared_memory(gl.int32, [8 * C.q_stages, 1], words)
    block = gl.allocate_shared_memory(gl.int32, [C.stages, 1], words)
    return Shared(q, k, v, q_full, k_full, v_full, tile, block)


@gluon.jit
def _put(memory, index, value):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    memory.index(index).store(gl.full([1], value, gl.int32, one))


@gluon.jit
def get(memory, index):
    """The number that the producer put there."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return memory.index(index).load(one).item()


@gluon.jit
def next_place(stage, phase, stages: gl.constexpr):
    """Of a ring of so many buffers."""
    stage += 1
    last = stage == stages
    return gl.where(last, 0, stage), phase ^ last.to(gl.int32)


@gluon.jit
def _tile_of(number, sizes, table, C: gl.constexpr) -> Tile:
    """The number-th tile: sections of heads, in which all heads go down their rows together."""
    heads = sizes.batches * sizes.heads
    section = number // (sizes.section * sizes.row_tiles)
    within = number - section * (sizes.section * sizes.row_tiles)
    width = gl.minimum(sizes.section, heads - section * sizes.section)
    line = section * sizes.section + within % width
    batch = line // sizes.heads
    head = line % sizes.heads
    row = within // width
    if table is None:
        last = gl.cdiv(sizes.kv_len, C.tile_kv) - 1
        tile = Tile(batch, head, row, last, 1, 0, 0, last)
    else:
        mask_heads = 1 + table.heads * (sizes.heads - 1)
        mask_line = batch * table.batches * mask_heads + head * table.heads
        row = gl.load(table.order + mask_line * sizes.row_tiles + row)
        entry = table.rows + (mask_line * sizes.row_tiles + row) * 5
        tile = Tile(batch, head, row, gl.load(entry), gl.load(entry + 1), gl.load(entry + 2),
                    gl.load(entry + 3), gl.load(entry + 4))
    return tile


@gluon.jit
def _announce(tile, place, shared):
    at = 8 * place
    _put(shared.tile, at, tile.batch)
    _put(shared.tile, at + 1, tile.head)
    _put(shared.tile, at + 2, tile.row)
    _put(shared.tile, at + 3, tile.first)
    _put(shared.tile, at + 4, tile.whole)
    _put(shared.tile, at + 5, tile.partial)
    _put(shared.tile, at + 6, tile.full)


@gluon.jit
def announced(shared, place) -> Tile:
    """What the producer said of the tile whose queries are there."""
    at = 8 * place
    return Tile(get(shared.tile, at), get(shared.tile, at + 1), get(shared.tile, at + 2),
                get(shared.tile, at + 3), get(shared.tile, at + 4), 0,
                get(shared.tile, at + 5), get(shared.tile, at + 6))


@gluon.jit
def _load(desc, batch, head, row, column, full, memory):
    box: gl.constexpr = desc.block_type.shape
    tma_load(desc, [batch, head, row, column], full, reinterpret(memory, box, desc.layout))


@gluon.jit
def _load_q(desc, tile, place, shared, C: gl.constexpr):
    """All rows and chunks of a tile of queries; consumers may read what was announced."""
    full = shared.q_full.index(place)
    boxes: gl.constexpr = C.consumers * C.head_chunks
    mbarrier.expect(full, boxes * desc.block_type.nbytes)
    for part in gl.static_range(gl.constexpr(C.consumers)):
        for chunk in gl.static_range(gl.constexpr(C.head_chunks)):
            _load(desc, tile.batch, tile.head, tile.row * C.tile_q + part * QUERIES,
                  chunk * C.head_chunk, full,
                  shared.q.index(place * boxes + part * C.head_chunks + chunk))


@gluon.jit
def _load_kv(k_desc, v_desc, batch, head, block, stage, shared, C: gl.constexpr):
    """One block of keys and values, when their buffers are free. Gives the next buffer."""
    named_barrier("sync", _K_EMPTY + stage, C.release_threads)
    full = shared.k_full.index(stage)
    _put(shared.block, stage, block)
    mbarrier.expect(full, C.head_chunks * k_desc.block_type.nbytes)
    for chunk in gl.static_range(gl.constexpr(C.head_chunks)):
        _load(k_desc, batch, head, block * C.tile_kv, chunk * C.head_chunk, full,
              shared.k.index(stage * C.head_chunks + chunk))
    named_barrier("sync", _V_EMPTY + stage, C.release_threads)
    full = shared.v_full.index(stage)
    mbarrier.expect(full, v_desc.block_type.nbytes)
    _load(v_desc, batch, head, block * C.tile_kv, 0, full, shared.v.index(stage))
    return gl.where(stage == C.stages - 1, 0, stage + 1)


@gluon.jit
def _load_runs(k_desc, v_desc, batch, head, tile, table, stage, shared, C: gl.constexpr):
    """The blocks after the first. The next run is read while this one's blocks are awaited."""
    if table is None:
        for block in range(tile.full):
            stage = _load_kv(k_desc, v_desc, batch, head, block, stage, shared, C)
    else:
        run = table.runs + 2 * tile.run
        next_start = gl.load(run)
        next_end = gl.load(run + 1)
        block = 0
        end = 0
        for _ in range(tile.partial + tile.full):
            over = block == end
            block = gl.where(over, next_start, block)
            end = gl.where(over, next_end, end)
            run += 2 * over.to(gl.int32)
            next_start = gl.load(run)
            next_end = gl.load(run + 1)
            stage = _load_kv(k_desc, v_desc, batch, head, block, stage, shared, C)
            block += 1
    return stage


@gluon.jit
def produce(q_desc, k_desc, v_desc, counter, sizes, table, shared, C: gl.constexpr):
    """The producer, one warp. `counter`: tiles taken beyond the first of each CTA, CTAs done."""
    tiles = sizes.batches * sizes.heads * sizes.row_tiles
    number = gl.program_id(0)
    stage = 0
    place = 0
    while number < tiles:
        tile = _tile_of(number, sizes, table, C)
        batch = tile.batch * sizes.kv_batches
        head = tile.head // sizes.kv_group
        named_barrier("sync", _q_empty(place), C.release_threads)
        _announce(tile, place, shared)
        _load_q(q_desc, tile, place, shared, C)
        place = gl.where(place == C.q_stages - 1, 0, place + 1)
        stage = _load_kv(k_desc, v_desc, batch, head, gl.maximum(tile.first, 0), stage, shared, C)
        # Slow, so it comes after the first loads.
        number = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        stage = _load_runs(k_desc, v_desc, batch, head, tile, table, stage, shared, C)
    _finish(place, counter, shared, C)


@gluon.jit
def _finish(place, counter, shared, C: gl.constexpr):
    """Tells the consumers that no tile is left, waits for them, and resets the counter."""
    named_barrier("sync", _q_empty(place), C.release_threads)
    _put(shared.tile, 8 * place, -1)
    mbarrier.arrive(shared.q_full.index(place), count=1)
    for _ in gl.static_range(gl.constexpr(C.q_stages - 1)):
        named_barrier("sync", _q_empty(1 - place), C.release_threads)
    for stage in gl.static_range(gl.constexpr(C.stages)):
        named_barrier("sync", _K_EMPTY + stage, C.release_threads)
        named_barrier("sync", _V_EMPTY + stage, C.release_threads)
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)
