"""Backward on any GPU that Triton serves: tiles, buffers and launches of kernels.triton_backward.

In: a runtime.call.Call, its Result (out and lse), and the gradients of both. Out: a `Prepared`
backward, which gives Gradients. Three launches (lse and delta; dk and dv; dq), and one for each
read of a captured tensor whose gradient is summed up before it is looked where it belongs.

Deterministic where torch.use_deterministic_algorithms or the option "deterministic" asks: sums of
unordered reads are made of integers, in units so small that nothing is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexattn.compile_triton import Source, load
from flexattn.kernels.triton_config import (
    TritonConfig,
    backward_configs,
    power_of_two,
)
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.runtime.gpu_driver import Function, shared_limit, target
from flexattn.runtime.gpu_launch import (
    TYPES,
    Launch,
    PreparedBackward,
    Refusal,
    function,
    stream_of,
    tensor_values,
    tensors_of,
)
from flexattn.runtime.gpu_mods import ModCode, argument_values, mod_code
from flexattn.runtime.gpu_tables import tables
from flexattn.runtime.launch_triton import (
    TENSOR,
    alignment,
    is_aligned,
    precision,
    with_rows,
)
from flexattn.runtime.triton_backward_plan import Shape, parts, tiles_of

PREPARE_ROWS, _SCATTER_BLOCK = 32, 256
_LARGEST_TILE = 128
_INTEGER_BITS = 61  # of an exact sum
_MOST_SPILLED = 128  # bytes of local memory a thread
_INTERPRETED = TritonConfig(16, 16, 4, 1)
_KERNELS = ("key_value_gradient", "query_gradient")


def prepare(call: Call, result: Result, d_out: Tensor,
            d_lse: Tensor | None) -> PreparedBackward | Refusal:
    """The backward with, for each kernel, the first config that fits and hardly spills."""
    call = with_rows(call)
    shape = _shape(call, d_out)
    picked = [_picked(name, configs, call, shape)
              for name, configs in zip(_KERNELS, _configs(call, shape), strict=True)]
    for name, config in zip(_KERNELS, picked, strict=True):
        if config is None:
            return Refusal(f"no tile of {name} fits the shared memory")
    return _Backward(call, result, d_out, d_lse, shape, *picked)  # type: ignore[arg-type]


def candidates(call: Call, result: Result, d_out: Tensor,
               d_lse: Tensor | None) -> Iterator[PreparedBackward]:
    """The backward with each pair of configs that fit."""
    call = with_rows(call)
    shape = _shape(call, d_out)
    fitting = [[config for config, _ in _fitting(name, configs, call, shape)]
               for name, configs in zip(_KERNELS, _configs(call, shape), strict=True)]
    for pair in itertools.product(*fitting):
        yield _Backward(call, result, d_out, d_lse, shape, *pair)


def _shape(call: Call, d_out: Tensor) -> Shape:
    where = target(call.query.device.index).backend if call.query.is_cuda else "interpreter"
    return Shape(call, mod_code(call, where, with_gradient=True), d_out)  # type: ignore[arg-type]


def _configs(call: Call, shape: Shape) -> tuple[Sequence[TritonConfig], Sequence[TritonConfig]]:
    q, v = call.query, call.value
    if not q.is_cuda:
        return (_INTERPRETED,), (_INTERPRETED,)
    return backward_configs(q.shape[-1], v.shape[-1], q.element_size(),
                            precision(q.dtype) == "ieee", shape.boxed)


def _fitting(name: str, configs: Sequence[TritonConfig], call: Call,
             shape: Shape) -> Iterator[tuple[TritonConfig, int]]:
    """Configs, and how many bytes of a thread each spills."""
    device = call.query.device
    for config in configs:
        plan = shape.plan(name, config, call)
        found = function(plan.key, device, plan.source)
        if found is None:
            yield config, 0
        elif found.binary.shared <= shared_limit(device.index):
            yield config, found.spilled_bytes


def _picked(name: str, configs: Sequence[TritonConfig], call: Call,
            shape: Shape) -> TritonConfig | None:
    fitting = []
    for config, spilled in _fitting(name, configs, call, shape):
        if spilled <= _MOST_SPILLED or not shape.boxed:
            return config
        fitting.append((spilled, config))
    return min(fitting, key=lambda item: item[0])[1] if fitting else None


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
                 shape: Shape, kv_config: TritonConfig, q_config: TritonConfig) -> None:
        q, k = call.query, call.key
        self.shape, self.kv_config, self.q_config = shape, kv_config, q_config
        self.code, self.exact, self.reads = shape.code, shape.exact, shape.reads
        batch, heads, q_len, _ = q.shape
        self.lines, self.pairs = batch * heads, batch * heads * q_len * k.shape[2]
        self.q_length, self.kv_length = (-(-n // _LARGEST_TILE) * _LARGEST_TILE
                                         for n in (q_len, k.shape[2]))
        self.origin = self.kv_length + q_config.tile_kv
        self.diagonals = self.origin + self.q_length + 2 * q_config.tile_kv
        self.parts = parts(call, kv_config)
        memory = self._buffers(call)
        self._prepare = self._prepare_launch(call, result, d_out, d_lse, memory)
        self._keys = self._kernel(_KERNELS[0], kv_config, call,
                                  (-(-k.shape[2] // kv_config.tile_kv) * k.shape[0] * k.shape[1],
                                   self.parts, 1),
                                  self._key_values(call, d_out, memory),
                                  self._key_tensors(call, d_out, memory))
        self._queries = self._kernel(_KERNELS[1], q_config, call,
                                     (-(-q_len // q_config.tile_q) * self.lines, 1, 1),
                                     self._query_values(call, d_out, memory),
                                     self._query_tensors(call, d_out, memory))
        self._scatters = {i: self._scatter_launch(call, memory, i)
                          for i in range(len(self.reads.loads)) if i not in self.reads.scattered}

    @property
    def tile(self) -> dict[str, int]:
        return {f"{of}_{part}": size for of, config in (("dkv", self.kv_config),
                                                        ("dq", self.q_config))
                for part, size in asdict(config).items()}

    @property
    def functions(self) -> list[Function]:
        return self._keys.functions + self._queries.functions

    @property
    def exact_sums(self) -> bool:
        return self.exact and bool(self.reads.unordered)

    @property
    def launches(self) -> list[Launch]:
        return [self._prepare, self._keys, self._queries, *self._scatters.values()]

    def run(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
        given, call = call, with_rows(call)
        memory, stream = self._buffers(call), stream_of(call.query)
        rows = (result.out, d_out, result.lse, *(() if d_lse is None else (d_lse,)))
        self._prepare((*rows, memory.statistics), stream)
        self._keys(self._key_tensors(call, d_out, memory), stream)
        if self.exact_sums:
            memory.units = self._units(memory.peaks.view(torch.float32))
        self._queries(self._query_tensors(call, d_out, memory), stream)
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
            q.new_zeros(len(self.reads.unordered), dtype=torch.int32), self._whole(q))

    def _whole(self, like: Tensor) -> Tensor:
        """Units of sums of whole numbers; where no sum is exact, nobody reads them."""
        return (like.new_ones if self.exact else like.new_empty)(1, dtype=torch.float64)

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
        values = self._inputs(call, d_out, memory, self.kv_config)
        for t in (memory.dk, memory.dv):
            values += [t, *t.stride()[:3]]
        values += [memory.sums[i] for i in self.reads.columns]
        values += [memory.peaks] * self.exact_sums
        return values + self._rest(call, self.kv_config, by_columns=True)

    def _query_values(self, call: Call, d_out: Tensor, memory: _Buffers) -> list[Any]:
        values = self._inputs(call, d_out, memory, self.q_config)
        values += [memory.dq, *memory.dq.stride()[:3]]
        values += [memory.sums[i] for i in self.reads.rows]
        values += [memory.sums[i] for i in self.reads.diagonals]
        values += [memory.totals[i] for i in self.reads.scattered]
        values += [memory.units, self.diagonals, self.origin]
        return values + self._rest(call, self.q_config, by_columns=False)

    def _inputs(self, call: Call, d_out: Tensor, memory: _Buffers,
                config: TritonConfig) -> list[Any]:
        tensors = (call.query, call.key, call.value, d_out)
        values: list[Any] = []
        for t, tile in zip(tensors, tiles_of(self.shape.facts(config)), strict=True):
            values += tensor_values(t, *tile, self.shape.boxed)
        return [*values, memory.statistics, memory.statistics.stride(0)]

    def _rest(self, call: Call, config: TritonConfig, by_columns: bool) -> list[Any]:
        q, k = call.query, call.key
        found = call.block_mask and tables(call.block_mask, config.tile_q, config.tile_kv,
                                           by_columns)
        return [*(found.tensors if found else ()), *q.shape[:3], k.shape[2], *k.shape[:2],
                *((found.batch, found.heads) if found else (1, 1)), call.scale,
                *argument_values(self.code, call.score, call.mask)]

    # The tensors among them, all that differs between calls that share the kernels

    def _key_tensors(self, call: Call, d_out: Tensor, memory: _Buffers) -> list[Tensor]:
        return [call.query, call.key, call.value, d_out, memory.statistics, memory.dk, memory.dv,
                *(memory.sums[i] for i in self.reads.columns),
                *(memory.peaks,) * self.exact_sums,
                *self._other_tensors(call, self.kv_config, True)]

    def _query_tensors(self, call: Call, d_out: Tensor, memory: _Buffers) -> list[Tensor]:
        return [call.query, call.key, call.value, d_out, memory.statistics, memory.dq,
                *(memory.sums[i] for i in self.reads.rows),
                *(memory.sums[i] for i in self.reads.diagonals),
                *(memory.totals[i] for i in self.reads.scattered), memory.units,
                *self._other_tensors(call, self.q_config, False)]

    def _other_tensors(self, call: Call, config: TritonConfig,
                       by_columns: bool) -> list[Tensor]:
        found = call.block_mask and tables(call.block_mask, config.tile_q, config.tile_kv,
                                           by_columns)
        captures = (mod.captures for mod in (call.score, call.mask) if mod)
        return [*(found.tensors if found else ()), self.code.flag,
                *(tensor for tensors in captures for tensor in tensors)]

    # Launches

    def _kernel(self, name: str, config: TritonConfig, call: Call, grid: tuple[int, int, int],
                values: list[Any], tensors: list[Tensor]) -> Launch:
        assert all(a is b for a, b in zip(tensors_of(values), tensors, strict=True))
        plan = self.shape.plan(name, config, call)
        return Launch(function(plan.key, call.query.device, plan.source), plan.source, grid,
                      values)

    def _prepare_launch(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None,
                        memory: _Buffers) -> Launch:
        value_dim, dtype = call.value.shape[-1], call.query.dtype
        with_lse, aligned = d_lse is not None, is_aligned(result.out, d_out)

        def build() -> Source:
            return prepare_source(dtype, value_dim, with_lse, aligned)

        key = repr(("triton prepare", dtype, value_dim, with_lse, aligned))
        return Launch(function(key, call.query.device, build), build,
                      (self.q_length // PREPARE_ROWS * self.lines, 1, 1),
                      prepare_values(call, result, d_out, d_lse, memory.statistics))

    def _scatter_launch(self, call: Call, memory: _Buffers, read: int) -> Launch:
        kind = ("row" if read in self.reads.rows else
                "column" if read in self.reads.columns else "diagonal")

        def build() -> Source:
            return _scatter_source(self.code, read, kind, self.exact)

        key = repr(("triton scatter", self.code.text, self.code.types, read, kind, self.exact))
        length = memory.sums[read].shape[1]
        return Launch(function(key, call.query.device, build), build,
                      (-(-length // _SCATTER_BLOCK) * self.lines, 1, 1),
                      self._scatter_values(call, memory, read, memory.units))

    def _scatter_values(self, call: Call, memory: _Buffers, read: int,
                        units: Tensor) -> list[Any]:
        q, k, sums = call.query, call.key, memory.sums[read]
        return [sums, memory.totals[read], units, q.shape[1], q.shape[2], k.shape[2],
                sums.shape[1], self.origin, *argument_values(self.code, call.score, call.mask)]

    def _scatter(self, call: Call, memory: _Buffers, read: int, launch: Launch,
                 stream: int) -> None:
        sums, units = memory.sums[read], self._whole(call.query)
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


def prepare_values(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None,
                   statistics: Tensor, total: Tensor | None = None) -> list[Any]:
    """Of the kernel that fills statistics: float32 [2 * batch * heads, length], lse2 and then
    delta, with room for whole tiles; and makes total 0, where there is one."""
    values: list[Any] = []
    for t in (result.out, d_out):
        values += [t, *t.stride()[:3]]
    values += [result.lse, *([d_lse] if d_lse is not None else [])]
    q = call.query.shape
    values += [statistics, statistics.stride(0), *([total] if total is not None else [])]
    return [*values, q[1], q[2], q[0] * q[1]]


def prepare_source(dtype: torch.dtype, value_dim: int, with_lse: bool, aligned: bool,
                   with_total: bool = False) -> Source:
    from flexattn.kernels.triton_backward import prepare as kernel

    tensor = (f"*{TYPES[dtype]}", *TENSOR)
    constants = {"VALUE_DIM": value_dim, "PADDED_DIM": power_of_two(value_dim),
                 "ROWS": PREPARE_ROWS}
    signature = {"out": tensor, "d_out": tensor, "lse": "*fp32",
                 "d_lse": "*fp32" if with_lse else "constexpr", "statistics": ("*fp32", "i64"),
                 "total": "*fp32" if with_total else "constexpr", "sizes": ("i32",) * 3,
                 **dict.fromkeys(constants, "constexpr")}
    absent = {"d_lse": None} if not with_lse else {}
    absent |= {"total": None} if not with_total else {}
    known = alignment((0, 1), dtype) if aligned else {}
    known |= {(5,): 16} if with_total else {}
    return Source(kernel, signature, {**absent, **constants}, known)


def _scatter_source(code: ModCode, read: int, kind: str, exact: bool) -> Source:
    from flexattn.kernels.triton_backward import scatter_sums as kernel

    total = "*i64" if exact else "*fp32"
    constants = {"MODS": load(code.text), "LOAD": read, "KIND": kind, "BLOCK": _SCATTER_BLOCK,
                 "EXACT": exact}
    signature = {"sums": total if kind == "diagonal" else "*fp32", "gradient": total,
                 "units": "*fp64", "sizes": ("i32",) * 5, "args": code.argument_type(),
                 **dict.fromkeys(constants, "constexpr")}
    return Source(kernel, signature, constants)
