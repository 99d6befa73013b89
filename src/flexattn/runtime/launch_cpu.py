"""A validated call on a CPU: choose and compile the kernel, lay out memory, run it on the team.

In: a runtime.call.Call of CPU tensors. Out: its Result. Rejects: a mod's out-of-range read at an
attended position (IndexOutOfRangeError). Everything that depends on the mods and dtypes alone is
done once, in a `Plan`; a call then only packs one block of arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from flexattn import compile
from flexattn.kernels import cpu_decode, cpu_forward
from flexattn.kernels.cpu_frame import Frame
from flexattn.kernels.cpu_sites import KernelMod
from flexattn.kernels.tile_config import cpu_tile, decode_tile
from flexattn.runtime import threads
from flexattn.runtime.call import Call, Result, like_query
from flexattn.runtime.cpu_call import Memory, Runs, Tables, one_run, plan, runs_of, team_size

_SMALLEST_TILE = 16
_DECODE_QUERIES = 8  # up to so many the decoding kernel is the faster one
_UNITS_A_THREAD = 4
_KEYS_WORTH_SPLITTING = 512


def forward(call: Call) -> Result:
    """out, and lse and max_scores where wanted."""
    q, k, v = call.query, call.key, call.value
    out = like_query(q, v.shape[-1])
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    lse, max_scores = (q.new_empty(q.shape[:3], dtype=statistics) if wanted else None
                       for wanted in (call.want_lse, call.want_max_scores))
    if not out.numel() or not k.shape[2]:  # no key: what every fully masked row gets
        out.zero_()
        for rows in (lse, max_scores):
            if rows is not None:
                rows.fill_(float("-inf"))
    elif _decodes(call):
        _run_decode(call, out, lse, max_scores)
    else:
        _run_forward(call, out, lse, max_scores)
    return Result(out, lse, max_scores)


def kernel(call: Call) -> str:
    """Which kernel takes it: "decode" or "forward"."""
    return "decode" if _decodes(call) else "forward"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# Many queries

_FORWARD = struct.Struct(f"{len(cpu_forward.ARGUMENTS) - 1}qd")


def _emit_forward(storage: str, head_dim: int, value_dim: int, score: KernelMod | None,
                  mask: KernelMod | None) -> tuple[Frame, Callable[[], str]]:
    host = compile.host()
    tile = cpu_tile(storage, head_dim, value_dim, host.vector_bits, host.pairs)
    frame = Frame(storage, head_dim, value_dim, tile)
    return frame, lambda: cpu_forward.Forward(frame, score, mask).emit()


def _run_forward(call: Call, out: Tensor, lse: Tensor | None, max_scores: Tensor | None) -> None:
    q, k, v = call.query, call.key, call.value
    batch, q_heads, q_len, head_dim = q.shape
    kv_batch, kv_heads, kv_len, _ = v.shape
    chosen, team = plan("forward", call, _emit_forward, ("scratch_bytes",)), team_size(call)
    frame, scratch = chosen.frame, chosen.sizes["scratch_bytes"]
    runs = _runs(call)
    row_block = min(runs.row_block, q_len)
    rows = -(-q_len // row_block)
    parts, tile_rows = _tiling(row_block, frame.tile.tile_q, batch * q_heads * rows, team)
    panels = -(-kv_len // frame.columns)
    ring = _ring(kv_batch * kv_heads, rows * parts * batch * q_heads // (kv_batch * kv_heads), team)
    line = ring * panels * frame.columns * q.element_size()
    counters = 8 * (cpu_forward.COUNTER_WORDS + cpu_forward.FLAG_WORDS * kv_batch * kv_heads)
    memory = Memory(counters, team * scratch, line * frame.depth(head_dim),
                    line * frame.value_panels * frame.columns)
    memory.clear(0, counters)
    tables = Tables(call.score, call.mask)
    count, working, packed_key, packed_value = memory.addresses
    threads.run(chosen.function, _FORWARD.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _address(lse),
        _address(max_scores), packed_key, packed_value, working, count,
        *tables.addresses, *tables.faults, *runs.addresses,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
        batch, kv_batch, kv_heads, q_heads // kv_heads, q_len, kv_len, tile_rows, rows * parts,
        -(-panels // cpu_forward.PACK_PANELS), ring, scratch,
        *runs.strides, row_block, runs.col_block, parts,
        call.block_mask is None or call.block_mask.is_proved,
        call.scale), team)
    tables.check()


def _runs(call: Call) -> Runs:
    if call.block_mask is None:
        return one_run(call.query.shape[2], call.key.shape[2], call.mask is None)
    return runs_of(call.block_mask.rows())


@cache
def _tiling(row_block: int, tile_q: int, rows: int, team: int) -> tuple[int, int]:
    """Into how many tiles a row of the block mask is divided, of how many queries: even parts of
    at most tile_q, smaller where the team lacks tiles. `rows` counts the rows of all heads."""
    parts = -(-row_block // tile_q)
    while rows * parts < 2 * team and row_block // (2 * parts) >= _SMALLEST_TILE:
        parts *= 2
    return parts, -(-row_block // parts)


def _ring(heads: int, tiles: int, team: int) -> int:
    """How many heads are packed at once: the one attended to, the next one, and those whose last
    tiles may still be under way. `tiles` counts those of a head."""
    return min(heads, 2 + -(-2 * team // max(tiles, 1)))


# Few queries

_DECODE = struct.Struct(f"{len(cpu_decode.ARGUMENTS) - 1}qd")


def _decodes(call: Call) -> bool:
    """Whether the decoding kernel takes it: few queries in one row of the block mask, head
    dimensions contiguous and whole vectors."""
    q, k, v = call.query, call.key, call.value
    lanes = compile.host().vector_bits // (64 if q.dtype is torch.float64 else 32)
    if q.shape[2] > _DECODE_QUERIES or k.stride(3) != 1 or v.stride(3) != 1:
        return False
    if q.shape[3] % lanes or v.shape[3] % lanes:
        return False
    return call.block_mask is None or call.block_mask.rows().row_block >= q.shape[2]


def _emit_decode(storage: str, head_dim: int, value_dim: int, score: KernelMod | None,
                 mask: KernelMod | None) -> tuple[Frame, Callable[[], str]]:
    frame = Frame(storage, head_dim, value_dim, decode_tile(compile.host().vector_bits))
    return frame, lambda: cpu_decode.Decode(frame, score, mask).emit()


def _run_decode(call: Call, out: Tensor, lse: Tensor | None, max_scores: Tensor | None) -> None:
    q, k, v = call.query, call.key, call.value
    batch, q_heads, q_len, _ = q.shape
    kv_batch, kv_heads, kv_len, _ = v.shape
    chosen = plan("decode", call, _emit_decode, ("scratch_bytes", "partial_bytes"))
    team, scratch = team_size(call), chosen.sizes["scratch_bytes"]
    runs, group = _runs(call), q_heads // kv_heads
    per_unit = 1 if runs.strides[1] else group  # heads with runs of their own go alone
    stacks = batch * q_heads // per_unit
    splits, keys = _splits(stacks, kv_len, team)
    counters = 8 * (cpu_decode.COUNTER_WORDS + cpu_decode.FLAG_WORDS * stacks)
    partials = stacks * splits * per_unit * chosen.sizes["partial_bytes"] if splits > 1 else 0
    memory = Memory(counters, team * per_unit * scratch, partials)
    memory.clear(0, counters)
    tables = Tables(call.score, call.mask)
    count, working, parts = memory.addresses
    threads.run(chosen.function, _DECODE.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _address(lse),
        _address(max_scores), parts, working, count,
        *tables.addresses, *tables.faults, *runs.addresses,
        *q.stride(), *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        batch, kv_batch, kv_heads, group, q_len, kv_len,
        per_unit, splits, keys, scratch,
        *runs.strides[:2], runs.col_block,
        call.scale), team)
    tables.check()


def _splits(stacks: int, kv_len: int, team: int) -> tuple[int, int]:
    """Into how many stretches the keys of a head are split, and of how many keys."""
    wanted = -(-_UNITS_A_THREAD * team // stacks) if team > 1 else 1
    splits = max(1, min(wanted, kv_len // _KEYS_WORTH_SPLITTING))
    keys = -(-kv_len // splits)
    keys = -(-keys // 64) * 64
    return -(-kv_len // keys), keys
