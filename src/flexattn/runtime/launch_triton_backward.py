"""Backward on any GPU that Triton serves: tiles, buffers and launches of kernels.triton_backward.

In: a runtime.call.Call, its Result (out and lse), and the gradients of both. Out: a `Prepared`
backward, which gives Gradients. Three launches (lse and delta; dk and dv; dq), and one for each
read of a captured tensor whose gradient is summed up before it is looked where it belongs.

Deterministic where torch.use_deterministic_algorithms or the option "deterministic" asks: sums of
unordered reads are made of integers, in units so small that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis import grad_reads
from flexattn.compile_triton import Source, load
from flexattn.kernels.triton_config import (
    BackwardFacts,
    TritonConfig,
    backward_configs,
    chunk_of,
    power_of_two,
)
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.runtime.gpu_driver import multiprocessors, shared_limit, target
from flexattn.runtime.gpu_launch import (
    TYPES,
    Launch,
    PreparedBackward,
    Refusal,
    function,
    stream_of,
)
from flexattn.runtime.gpu_mods import ModCode, argument_values, mod_code
from flexattn.runtime.gpu_tables import tables
from flexattn.runtime.launch_triton import (
    TABLE,
    TENSOR,
    alignment,
    is_aligned,
    precision,
    with_rows,
)

_PREPARE_ROWS, _SCATTER_BLOCK = 32, 256
_LARGEST_TILE = 128
_INTEGER_BITS = 61  # of an exact sum


def prepare(call: Call, result: Result, d_out: Tensor,
            d_lse: Tensor | None) -> PreparedBackward | Refusal:
    """The backward with the first configs that fit."""
    call = with_rows(call)
    where = target(call.query.device.index) if call.query.is_cuda else None
    code = mod_code(call, where.backend if where else "interpreter",  # type: ignore[arg-type]
                    with_gradient=True)
    limit = shared_limit(call.query.device.index) if where else 0
    too_large = []
    for configs in _configs(call, where):
        prepared = _Backward(call, result, d_out, d_lse, code, *configs)
        sizes = [launch.binary.shared for launch in prepared.launches if launch.binary]
        if max(sizes, default=0) <= limit:
            return prepared
        too_large.append(f"{configs}: {max(sizes)} bytes")
    return Refusal("no tile fits the shared memory: " + ", ".join(too_large))


def deterministic(call: Call) -> bool:
    return bool(call.options.get("deterministic",
                                 torch.are_deterministic_algorithms_enabled()))


def _configs(call: Call, where: Any) -> Sequence[tuple[TritonConfig, TritonConfig]]:
    if where is None:
        small = TritonConfig(16, 16, 4, 1)
        return [(small, small)]
    return backward_configs(where.backend, where.arch, call.query.shape[-1],
                            call.value.shape[-1], call.query.element_size(),
                            precision(call.query.dtype) == "ieee",
                            call.block_mask is not None)


@dataclass(frozen=True)
class BackwardPlan:
    """One kernel of the backward, compiled without importing Triton unless it has to be."""

    kernel: str
    facts: BackwardFacts
    code: ModCode
    config: TritonConfig
    dtype: torch.dtype
    out_dtype: torch.dtype
    aligned: bool

    @property
    def key(self) -> str:
        return repr(("triton backward", self.kernel, self.facts, self.code.text, self.code.types,
                     self.config, self.dtype, self.out_dtype, self.aligned))

    def source(self) -> Source:
        from flexattn.kernels import triton_backward

        facts = self.facts
        tensor, out = ((f"*{TYPES[t]}", *TENSOR) for t in (self.dtype, self.out_dtype))
        total = "*i64" if facts.exact else "*fp32"
        table = TABLE if facts.sparse else "constexpr"
        signature: dict[str, Any] = {"q": tensor, "k": tensor, "v": tensor, "d_out": tensor,
                                     "statistics": ("*fp32", "i64")}
        if self.kernel == "key_value_gradient":
            signature |= {"dk_out": out, "dv_out": out,
                          "sums_out": ("*fp32",) * len(facts.col_sums),
                          "peaks_out": "*i32" if facts.exact else "constexpr"}
        else:
            signature |= {"dq_out": out, "sums_out": ("*fp32",) * len(facts.row_sums),
                          "scatter": ((total,) * len(facts.unordered),
                                      "*fp64", "i64", "i64")}
        signature |= {"full": table, "partial": table, "sizes": ("i32",) * 6,
                      "blocks": ("i32",) * 2, "scale": "fp32", "args": self.code.argument_type(),
                      "MODS": "constexpr", "F": "constexpr"}
        constants = {"MODS": load(self.code.text), "F": facts, "full": None, "partial": None,
                     "peaks_out": None}
        constants = {k: v for k, v in constants.items() if signature.get(k) == "constexpr"}
        aligned = alignment(range(4), self.dtype) if self.aligned else {}
        return Source(getattr(triton_backward, self.kernel), signature, constants, aligned,
                      {"num_warps": self.config.warps, "num_stages": self.config.stages})


class _Reads:
    """The reads of captured tensors whose gradients are wanted, by how they are summed."""

    def __init__(self, code: ModCode) -> None:
        self.loads = code.gradient.loads if code.gradient else ()
        kinds = grad_reads.kinds(self.loads)
        self.rows, self.columns, self.diagonals, self.scattered = (
            tuple(i for i, kind in enumerate(kinds) if kind == wanted) for wanted in
            (grad_reads.ROW, grad_reads.COLUMN, grad_reads.DIAGONAL, grad_reads.SCATTERED))
        self.unordered = self.diagonals + self.scattered


@dataclass
class _Buffers:
    """Memory of one backward. totals: the gradient of each read, in the shape of its tensor;
    where exact, they are integers in units of 1 / `units` (unordered reads) or 1 / `sum_units`."""

    statistics: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    sums: dict[int, Tensor]
    totals: dict[int, Tensor]
    peaks: Tensor
    units: Tensor
    sum_units: dict[int, Tensor] = field(default_factory=dict)


class _Backward:
    """A prepared backward."""

    def __init__(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None,
                 code: ModCode, kv_config: TritonConfig, q_config: TritonConfig) -> None:
        q, k, v = call.query, call.key, call.value
        self.code, self.kv_config, self.q_config = code, kv_config, q_config
        self.exact, self.reads = deterministic(call), _Reads(code)
        batch, heads, q_len, _ = q.shape
        self.lines, self.pairs = batch * heads, batch * heads * q_len * k.shape[2]
        self.q_length, self.kv_length = (-(-n // _LARGEST_TILE) * _LARGEST_TILE
                                         for n in (q_len, k.shape[2]))
        self.origin = self.kv_length + q_config.tile_kv
        self.diagonals = self.origin + self.q_length + 2 * q_config.tile_kv
        self.parts = _parts(call, kv_config)
        self.facts = BackwardFacts(
            q.shape[-1], v.shape[-1], chunk_of(q.shape[-1]), chunk_of(v.shape[-1]), 0, 0,
            call.block_mask is not None, precision(q.dtype), self.reads.rows, self.reads.columns,
            self.reads.diagonals, self.reads.scattered,
            self.exact and bool(self.reads.unordered))
        self.aligned = is_aligned(q, k, v, d_out)
        memory = self._buffers(call)
        self._prepare = self._prepare_launch(call, result, d_out, d_lse, memory)
        self._keys = self._kernel("key_value_gradient", kv_config, memory.dk.dtype, call,
                                  (-(-k.shape[2] // kv_config.tile_kv), k.shape[0] * k.shape[1],
                                   self.parts),
                                  self._key_values(call, d_out, memory))
        self._queries = self._kernel("query_gradient", q_config, q.dtype, call,
                                     (-(-q_len // q_config.tile_q), self.lines, 1),
                                     self._query_values(call, d_out, memory))
        self._scatters = {i: self._scatter_launch(call, memory, i)
                          for i in range(len(self.reads.loads)) if i not in self.reads.scattered}

    @property
    def launches(self) -> list[Launch]:
        return [self._prepare, self._keys, self._queries, *self._scatters.values()]

    def run(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
        given, call = call, with_rows(call)
        memory, stream = self._buffers(call), stream_of(call.query)
        self._prepare.fresh(_prepare_values(call, result, d_out, d_lse, memory), stream)
        self._keys.fresh(self._key_values(call, d_out, memory), stream)
        if self.facts.exact:
            memory.units = self._units(memory.peaks.view(torch.float32))
        self._queries.fresh(self._query_values(call, d_out, memory), stream)
        for i, launch in self._scatters.items():
            self._scatter(call, memory, i, launch, stream)
        return self._gradients(given, memory)

    def _units(self, peaks: Tensor) -> Tensor:
        """So that the sum of all pairs fits an integer: units of a sum are 1 / this."""
        return torch.where(peaks > 0, 2.0**_INTEGER_BITS / self.pairs / peaks.double(), 1.0)

    def _buffers(self, call: Call) -> _Buffers:
        q, k, v = call.query, call.key, call.value
        split = self.parts > 1
        shapes = [(self.parts * k.shape[0], *t.shape[1:]) for t in (k, v)]
        dk, dv = (q.new_empty(s, dtype=torch.float32) if split else torch.empty_like(t)
                  for s, t in zip(shapes, (k, v), strict=True))
        sums, totals = self._sums(call)
        return _Buffers(
            q.new_empty(2 * self.lines, self.q_length, dtype=torch.float32), torch.empty_like(q),
            dk, dv, sums, totals,
            q.new_zeros(len(self.reads.unordered), dtype=torch.int32), one(q.device))

    def _sums(self, call: Call) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        q, reads = call.query, self.reads
        exact = torch.int64 if self.exact else torch.float32
        rows, columns = (-(-n // tile) * tile for n, tile in (
            (q.shape[2], self.q_config.tile_q), (call.key.shape[2], self.kv_config.tile_kv)))
        sums = {i: q.new_empty(self.lines, length, dtype=torch.float32) for length, members in
                ((rows, reads.rows), (columns, reads.columns)) for i in members}
        sums |= {i: q.new_zeros(self.lines, self.diagonals, dtype=exact) for i in reads.diagonals}
        totals = {i: q.new_zeros(call.score.captures[n.attr].shape, dtype=exact)
                  for i, n in enumerate(reads.loads) if call.score}
        return sums, totals

    # The kernels' arguments, in their order

    def _key_values(self, call: Call, d_out: Tensor, memory: _Buffers) -> list[Any]:
        values = self._inputs(call, d_out, memory)
        for t in (memory.dk, memory.dv):
            values += [t, *t.stride()[:3]]
        values += [memory.sums[i] for i in self.reads.columns]
        values += [memory.peaks] * self.facts.exact
        return values + self._rest(call, self.kv_config, by_columns=True)

    def _query_values(self, call: Call, d_out: Tensor, memory: _Buffers) -> list[Any]:
        values = self._inputs(call, d_out, memory)
        values += [memory.dq, *memory.dq.stride()[:3]]
        values += [memory.sums[i] for i in self.reads.rows]
        values += [memory.sums[i] for i in self.reads.diagonals]
        values += [memory.totals[i] for i in self.reads.scattered]
        values += [memory.units, self.diagonals, self.origin]
        return values + self._rest(call, self.q_config, by_columns=False)

    def _inputs(self, call: Call, d_out: Tensor, memory: _Buffers) -> list[Any]:
        values: list[Any] = []
        for t in (call.query, call.key, call.value, d_out):
            values += [t, *t.stride()[:3]]
        return [*values, memory.statistics, memory.statistics.stride(0)]

    def _rest(self, call: Call, config: TritonConfig, by_columns: bool) -> list[Any]:
        q, k = call.query, call.key
        found = call.block_mask and tables(call.block_mask, config.tile_q, config.tile_kv,
                                           by_columns)
        return [*(found.tensors if found else ()), *q.shape[:3], k.shape[2], *k.shape[:2],
                *((found.batch, found.heads) if found else (1, 1)), call.scale,
                *argument_values(self.code, call.score, call.mask)]

    # Launches

    def _kernel(self, name: str, config: TritonConfig, out_dtype: torch.dtype, call: Call,
                grid: tuple[int, int, int], values: list[Any]) -> Launch:
        facts = replace(self.facts, tile_q=config.tile_q, tile_kv=config.tile_kv)
        plan = BackwardPlan(name, facts, self.code, config, call.query.dtype, out_dtype,
                            self.aligned)
        return Launch(function(plan.key, call.query.device, plan.source), plan.source, grid,
                      values)

    def _prepare_launch(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None,
                        memory: _Buffers) -> Launch:
        value_dim, dtype = call.value.shape[-1], call.query.dtype
        with_lse = d_lse is not None

        def build() -> Source:
            return _prepare_source(dtype, value_dim, with_lse)

        key = repr(("triton prepare", dtype, value_dim, with_lse))
        return Launch(function(key, call.query.device, build), build,
                      (self.q_length // _PREPARE_ROWS, self.lines, 1),
                      _prepare_values(call, result, d_out, d_lse, memory))

    def _scatter_launch(self, call: Call, memory: _Buffers, read: int) -> Launch:
        kind = ("row" if read in self.reads.rows else
                "column" if read in self.reads.columns else "diagonal")

        def build() -> Source:
            return _scatter_source(self.code, read, kind, self.exact)

        key = repr(("triton scatter", self.code.text, self.code.types, read, kind, self.exact))
        length = memory.sums[read].shape[1]
        return Launch(function(key, call.query.device, build), build,
                      (-(-length // _SCATTER_BLOCK), self.lines, 1),
                      self._scatter_values(call, memory, read, memory.units))

    def _scatter_values(self, call: Call, memory: _Buffers, read: int,
                        units: Tensor) -> list[Any]:
        q, k, sums = call.query, call.key, memory.sums[read]
        return [sums, memory.totals[read], units, q.shape[1], q.shape[2], k.shape[2],
                sums.shape[1], self.origin, *argument_values(self.code, call.score, call.mask)]

    def _scatter(self, call: Call, memory: _Buffers, read: int, launch: Launch,
                 stream: int) -> None:
        sums, units = memory.sums[read], one(call.query.device)
        if self.exact and read not in self.reads.unordered:
            valid = call.query.shape[2] if read in self.reads.rows else call.key.shape[2]
            units = self._units(sums[:, :valid].abs().amax().reshape(1))
            memory.sum_units[read] = units
        launch.fresh(self._scatter_values(call, memory, read, units), stream)

    def _gradients(self, call: Call, memory: _Buffers) -> Gradients:
        dk, dv = memory.dk, memory.dv
        if self.parts > 1:
            dk, dv = (t.view(self.parts, -1, *t.shape[1:]).sum(0).to(call.query.dtype)
                      for t in (dk, dv))
        captures: list[Tensor | None] = []
        for slot, tensor in enumerate(call.score.captures if call.score else ()):
            found = [self._total(memory, i) for i, n in enumerate(self.reads.loads)
                     if n.attr == slot]
            total = sum(found[1:], found[0]).to(tensor.dtype) if found else None
            captures.append(torch.zeros_like(tensor) if total is None and tensor.requires_grad
                            else None if total is None else total.to(tensor.device))
        return Gradients(memory.dq, dk, dv, tuple(captures))

    def _total(self, memory: _Buffers, read: int) -> Tensor:
        total = memory.totals[read]
        if not self.exact:
            return total
        if read in memory.sum_units:
            return total / memory.sum_units[read]
        return total / memory.units[self.reads.unordered.index(read)]


@cache
def one(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.float64, device=device)


def _parts(call: Call, config: TritonConfig) -> int:
    """How many programs share the query heads (and sequences) of a tile of keys."""
    q, k = call.query, call.key
    sharers = q.shape[1] // k.shape[1] * (q.shape[0] // k.shape[0])
    programs = -(-k.shape[2] // config.tile_kv) * k.shape[0] * k.shape[1]
    wanted = 2 * multiprocessors(q.device.index) if q.is_cuda else 1
    return max(1, min(sharers, wanted // programs))


def _prepare_values(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None,
                    memory: _Buffers) -> list[Any]:
    values: list[Any] = []
    for t in (result.out, d_out):
        values += [t, *t.stride()[:3]]
    values += [result.lse, *([d_lse] if d_lse is not None else [])]
    q = call.query.shape
    return [*values, memory.statistics, memory.statistics.stride(0), q[1], q[2], q[0] * q[1]]


def _prepare_source(dtype: torch.dtype, value_dim: int, with_lse: bool) -> Source:
    from flexattn.kernels.triton_backward import prepare as kernel

    tensor = (f"*{TYPES[dtype]}", *TENSOR)
    constants = {"VALUE_DIM": value_dim, "PADDED_DIM": power_of_two(value_dim),
                 "ROWS": _PREPARE_ROWS}
    signature = {"out": tensor, "d_out": tensor, "lse": "*fp32",
                 "d_lse": "*fp32" if with_lse else "constexpr", "statistics": ("*fp32", "i64"),
                 "sizes": ("i32",) * 3, **dict.fromkeys(constants, "constexpr")}
    return Source(kernel, signature, constants if with_lse else {"d_lse": None, **constants})


def _scatter_source(code: ModCode, read: int, kind: str, exact: bool) -> Source:
    from flexattn.kernels.triton_backward import scatter_sums as kernel

    total = "*i64" if exact else "*fp32"
    constants = {"MODS": load(code.text), "LOAD": read, "KIND": kind, "BLOCK": _SCATTER_BLOCK,
                 "EXACT": exact}
    signature = {"sums": total if kind == "diagonal" else "*fp32", "gradient": total,
                 "units": "*fp64", "sizes": ("i32",) * 5, "args": code.argument_type(),
                 **dict.fromkeys(constants, "constexpr")}
    return Source(kernel, signature, constants)
