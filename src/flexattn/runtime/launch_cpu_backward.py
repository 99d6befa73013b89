"""The backward pass of a call on a CPU: choose and compile the kernel, lay out memory, run it.

In: a runtime.call.Call of CPU tensors, its Result with lse, the gradients of out and lse. Out: the
Gradients. Rejects nothing that the forward pass has not rejected.

One pass does all, a key head at a time, where that keeps the threads busy and fits in memory; two
passes (keys, then queries) do a third more arithmetic in pieces of any size.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexattn import compile
from flexattn.analysis.gradient import Gradient, gradient
from flexattn.ir.graph import Graph
from flexattn.kernels.cpu_backward import Backward
from flexattn.kernels.cpu_backward_frame import (
    ARGUMENTS,
    COUNTER_WORDS,
    PHASES,
    PREPARED_ROWS,
    BackwardFrame,
)
from flexattn.kernels.tile_config import cpu_backward_tile
from flexattn.lower.llvm_gradient import LlvmGradient
from flexattn.lower.llvm_mod import LlvmMod
from flexattn.runtime import threads
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.runtime.captured_gradients import CapturedGradients, own_dimensions
from flexattn.runtime.cpu_call import (
    STORAGE,
    Memory,
    Runs,
    Tables,
    describe,
    index_bound,
    one_run,
    runs_of,
    team_size,
)

_THREAD_BUDGET = 16 << 20  # bytes a thread may use beyond what the forward pass needs
_BUSY = 5 / 7  # one pass wins where its threads are busier than this: 5 products against 7
_ARGUMENTS = struct.Struct(f"{len(ARGUMENTS) - 1}qd")


# Plans


@dataclass(frozen=True)
class Plan:
    """A compiled kernel. Holds its graphs, whose identity is the key it is found by."""

    graphs: tuple[Graph | None, Graph | None]
    gradient: Gradient | None
    frame: BackwardFrame
    functions: dict[str, Any]
    scratch_bytes: int


_plans: dict[tuple, Plan] = {}


def _plan(call: Call) -> Plan:
    score, mask = (mod.graph if mod is not None else None for mod in (call.score, call.mask))
    bound = index_bound(call)
    key = (call.query.dtype, call.query.shape[-1], call.value.shape[-1], id(score), id(mask),
           bound)
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _compile(STORAGE[key[0]], key[1], key[2], (score, mask), bound)
    return found


def _compile(storage: str, head_dim: int, value_dim: int,
             graphs: tuple[Graph | None, Graph | None], bound: int) -> Plan:
    host = compile.host()
    tile = cpu_backward_tile(storage, head_dim, value_dim, host.vector_bits, host.pairs)
    frame = BackwardFrame(storage, head_dim, value_dim, tile)
    score, mask = graphs
    derived = None if score is None else gradient(score)

    def build() -> str:
        mod = None
        if score is not None and derived is not None:
            both = Graph((*score.outputs, *derived.graph.outputs), score.captures, score.numbers)
            mod = LlvmGradient(both, derived.loads, bound)
        return Backward(frame, mod, None if mask is None else LlvmMod(mask, bound)).emit()

    key = repr(("backward", frame, bound, *map(describe, graphs)))
    library = compile.library(key, build, (*PHASES, "scratch_bytes"))
    functions = {name: library.function(name, ctypes.c_void_p) for name in PHASES}
    size = library.function("scratch_bytes", result=ctypes.c_int64)()
    return Plan(graphs, derived, frame, functions, size)


# A call


def backward(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """Gradients of query, key, value and the score mod's captured tensors."""
    if not result.out.numel() or not call.key.shape[2]:
        captures = () if call.score is None else call.score.captures
        query, key, value = map(torch.zeros_like, (call.query, call.key, call.value))
        return Gradients(query, key, value, tuple(
            torch.zeros_like(c) if c.requires_grad else None for c in captures))
    return _Backward(call, result, d_out, d_lse).run()


class _Backward:
    def __init__(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> None:
        assert result.lse is not None
        self.call, self.out, self.lse = call, result.out, result.lse.contiguous()
        self.plan, self.team = _plan(call), team_size(call)
        self.real = self.lse.dtype
        self.d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
        self.d_lse = None if d_lse is None else d_lse.to(self.real).contiguous()
        self.frame = self.plan.frame
        self.by_rows, self.by_columns = _runs(call)
        self.shared = call.query.shape[0] // call.key.shape[0]
        self.group = call.query.shape[1] // call.key.shape[1]
        self._choose()

    def _choose(self) -> None:
        """One pass or two, and how the gradients of captured tensors are shared."""
        heads = self.call.key.shape[0] * self.call.key.shape[1]
        busy = heads / (-(-heads // self.team) * self.team)
        self.one_pass = busy >= _BUSY and self._private_bytes() <= self._budget()
        self.heads_a_unit = 1
        loads = () if self.plan.gradient is None else self.plan.gradient.loads
        own = own_dimensions(loads)
        shared = frozenset(slot for slot, names in own.items() if self._separate(names))
        if self._copies_bytes(own.keys() - shared) > _THREAD_BUDGET * self.team:
            by_queries = frozenset(slot for slot, names in own.items() if "q_idx" in names)
            if by_queries == own.keys():
                self.one_pass, shared = False, by_queries
                self.heads_a_unit = self.call.query.shape[0] * self.call.query.shape[1]
            else:
                self.team, shared = 1, frozenset(own)
        self.captured = CapturedGradients(self.call.score, sorted(own), shared, self.team,
                                          self.real)
        self.accumulates = bool(own)

    def _separate(self, names: frozenset[str]) -> bool:
        """Whether units add to different elements of a tensor with dimensions of its own for
        these inputs."""
        batches = self.call.key.shape[0] if self.one_pass else self.call.query.shape[0]
        heads = self.call.key.shape[1] if self.one_pass else self.call.query.shape[1]
        needed = {"b"} if batches > 1 else set()
        needed |= {"h"} if heads > 1 else set()
        return needed | (set() if self.one_pass else {"q_idx"}) <= names

    def _copies_bytes(self, slots: Any) -> int:
        captures = () if self.call.score is None else self.call.score.captures
        return sum(self.team * captures[slot].numel() * self.lse.element_size() for slot in slots)

    def _private_bytes(self) -> int:
        """d_query in the type computed in, where the tensor itself is not."""
        _, _, q_len, head_dim = self.call.query.shape
        if self.call.query.dtype is self.real:
            return 0
        return self.team * self.shared * self.group * q_len * head_dim * self.lse.element_size()

    def _budget(self) -> int:
        forward = sum(t.numel() * t.element_size() for t in (self.call.key, self.call.value))
        return forward + self.team * _THREAD_BUDGET

    def run(self) -> Gradients:
        call, q = self.call, self.call.query
        key, value = (torch.empty(t.shape, dtype=t.dtype) for t in (call.key, call.value))
        in_place = self.one_pass and q.dtype is self.real
        query = (torch.zeros if in_place else torch.empty)(q.shape, dtype=q.dtype)
        counters, lines = 16 * COUNTER_WORDS * len(PHASES), self.lse.numel()
        memory = Memory(counters, self.team * self.plan.scratch_bytes,
                        lines * self.lse.element_size(), lines * self.lse.element_size(),
                        self._private_bytes() if self.one_pass else 0)
        memory.clear(0, counters)
        tables = Tables(call.score, call.mask)
        values = self._addresses(query, key, value, memory, tables)
        values |= self._strides() | self._sizes() | self._units(in_place)
        arguments = _ARGUMENTS.pack(*(values[name] for name in ARGUMENTS))
        for phase in PHASES[:2] if self.one_pass else PHASES:
            threads.run(self.plan.functions[phase], arguments, self.team)
        return Gradients(query, key, value, self.captured.results())

    # The block of arguments

    def _addresses(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory,
                   tables: Tables) -> dict[str, Any]:
        call = self.call
        counters, scratch, lse, delta, total = memory.addresses
        in_place = call.query.dtype is self.real
        names = ("score_captures", "score_numbers", "mask_captures", "mask_numbers",
                 "score_fault", "mask_fault")
        tensors = {"query": call.query, "key": call.key, "value": call.value, "out": self.out,
                   "d_out": self.d_out, "lse": self.lse, "d_query": query, "d_key": key,
                   "d_value": value}
        return {**{name: t.data_ptr() for name, t in tensors.items()},
                "d_lse": 0 if self.d_lse is None else self.d_lse.data_ptr(),
                "row_lse": lse, "row_delta": delta, "scratch": scratch, "counters": counters,
                "total_d_query": (query.data_ptr() if in_place else total) * self.one_pass,
                "gradients": self.captured.address,
                **dict(zip(names, (*tables.addresses, *tables.faults), strict=True)),
                **_table("row", self.by_rows), **_table("column", self.by_columns)}

    def _strides(self) -> dict[str, Any]:
        call = self.call
        found: dict[str, int] = {}
        for name, t in (("query", call.query), ("key", call.key), ("value", call.value),
                        ("out", self.out), ("d_out", self.d_out)):
            found |= {f"{name}_{axis}": t.stride(i) for i, axis in enumerate("bhsd")}
        return found

    def _sizes(self) -> dict[str, Any]:
        q, k = self.call.query.shape, self.call.key.shape
        return {"batches": q[0], "kv_batches": k[0], "kv_heads": k[1], "group": self.group,
                "q_len": q[2], "kv_len": k[2], "scratch_bytes": self.plan.scratch_bytes,
                "gradient_words": self.captured.words if self.captured.copies > 1 else 0,
                "scale": self.call.scale}

    def _units(self, in_place: bool) -> dict[str, Any]:
        batch, q_heads, q_len, head_dim = self.call.query.shape
        tile = self.frame.tile
        columns = _tiling("column", self.by_columns, tile.tile_kv, self.frame.columns)
        rows = _tiling("row", self.by_rows, tile.tile_q, 1)
        blocks = -(-self.call.key.shape[2] // self.by_columns.row_block)
        tiles = blocks * columns["column_tiles"]
        heads = self.call.key.shape[0] * self.call.key.shape[1]
        column_units = heads if self.one_pass else heads * tiles
        row_units = (batch * q_heads // self.heads_a_unit * rows["row_tiles"]
                     * -(-q_len // self.by_rows.row_block))
        private = 0 if in_place or not self.one_pass else (
            self.shared * self.group * q_len * head_dim)
        dealt, one = self.captured.copies > 1, self.one_pass
        per_head = q_len * head_dim
        return {**columns, **rows,
                "total_b": per_head * (self.group if private else q_heads),
                "total_h": per_head, "total_unit": private,
                "column_units": column_units, "columns_a_unit": tiles if one else 1,
                "column_lanes": self.team if dealt and one else column_units,
                "row_units": row_units, "heads_a_unit": self.heads_a_unit,
                "row_lanes": self.team if dealt and not one else row_units,
                "prepare_units": batch * q_heads * -(-q_len // PREPARED_ROWS),
                "accumulate_by_columns": self.accumulates and one,
                "accumulate_by_rows": self.accumulates and not one}


def _runs(call: Call) -> tuple[Runs, Runs]:
    """The block mask by rows and by columns."""
    mask, q_len, kv_len = call.block_mask, call.query.shape[2], call.key.shape[2]
    if mask is None:
        whole = call.mask is None
        return one_run(q_len, kv_len, whole), one_run(kv_len, q_len, whole)
    return runs_of(mask.rows()), runs_of(mask.columns())


def _table(name: str, runs: Runs) -> dict[str, Any]:
    fields = ("offsets", "start", "end", "full")
    return {f"{name}_{field}": at for field, at in zip(fields, runs.addresses, strict=True)}


def _tiling(name: str, runs: Runs, largest: int, multiple: int) -> dict[str, Any]:
    """A block in tiles of even size."""
    tiles, size = _even_tiles(runs.row_block, largest, multiple)
    return {f"{name}s_b": runs.strides[0], f"{name}s_h": runs.strides[1],
            f"{name}_block": runs.row_block, f"{name}_other": runs.col_block,
            f"{name}_tiles": tiles, f"{name}_tile": size}


@cache
def _even_tiles(block: int, largest: int, multiple: int) -> tuple[int, int]:
    """How many tiles a block has, and their size."""
    size = -(-block // -(-block // largest))
    size = -(-size // multiple) * multiple
    return -(-block // size), size
