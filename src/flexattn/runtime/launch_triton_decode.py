"""Decoding on any GPU that Triton serves: few queries, whose keys are dealt out to many programs.

In: a runtime.call.Call of 16-bit floats or float32. Out: a `Prepared` call. Rejects (a Refusal)
calls of many queries, and of several that fill the GPU without dealing out keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexattn.compile_triton import Source, load
from flexattn.kernels.decode_config import MOST_QUERIES, SHORT, decode_configs, number_of_splits
from flexattn.kernels.triton_config import ForwardFacts, TritonConfig, chunk_of
from flexattn.runtime.call import Call, Result
from flexattn.runtime.gpu_driver import Function, multiprocessors, shared_limit, target
from flexattn.runtime.gpu_launch import TYPES, Launch, Prepared, Refusal, function, stream_of
from flexattn.runtime.gpu_mods import (
    INTERPRETED,
    ModCode,
    argument_values,
    mod_code,
    watch,
)
from flexattn.runtime.gpu_tables import Tables, tables
from flexattn.runtime.launch_triton import (
    TABLE,
    TENSOR,
    alignment,
    is_aligned,
    like_query,
    precision,
    with_rows,
)

_RESERVED_SHARED = 1024  # bytes that each program takes besides its own
_MOST_AT_ONCE = 4  # programs of a multiprocessor
_INTERPRETED_AT_ONCE = 8
_STEP = 32  # splits that `combine` reads at a time


def prepare(call: Call) -> Prepared | Refusal:
    """The call with the first config whose kernel fits."""
    q_len = call.query.shape[2]
    if q_len > MOST_QUERIES or (q_len > SHORT and not _would_idle(call)):
        return Refusal(f"{q_len} queries are no decoding")
    call = with_rows(call)
    where = target(call.query.device.index) if call.query.is_cuda else None
    code = mod_code(call, where.backend if where else "interpreter")  # type: ignore[arg-type]
    too_large = []
    for config in _configs(call, where):
        prepared = _Decode(call, code, config)
        if prepared.fits:
            watch(code, call.score, call.mask)
            return prepared
        too_large.append(f"{config.tile_q}x{config.tile_kv}")
    return Refusal("no tile fits the shared memory: " + ", ".join(too_large))


def _would_idle(call: Call) -> bool:
    """Whether one program for each head leaves half of the GPU without work."""
    programs = call.query.shape[0] * call.query.shape[1]
    return not INTERPRETED and 2 * programs <= multiprocessors(call.query.device.index)


def _configs(call: Call, where: Any) -> tuple[TritonConfig, ...]:
    if where is None:
        return (TritonConfig(16, 16, 4, 1),)
    return decode_configs(where.backend, call.query.shape[-1], call.value.shape[-1],
                          call.query.element_size(), packed_heads(call) * call.query.shape[2])


def packed_heads(call: Call) -> int:
    """Query heads that are read for together: those of a key head, unless their masks differ."""
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    differ = call.block_mask is not None and call.block_mask.shape[1] > 1
    return 1 if differ else heads // kv_heads


def programs_at_once(kernel: Function, device: torch.device) -> int:
    """How many programs of a kernel the GPU runs at a time, by shared memory and registers."""
    facts, binary = torch.cuda.get_device_properties(device), kernel.binary
    shared = getattr(facts, "shared_memory_per_multiprocessor", 64 * 1024)
    registers = getattr(facts, "regs_per_multiprocessor", 64 * 1024)
    by_shared = shared // (binary.shared + _RESERVED_SHARED)
    by_registers = registers // max(kernel.registers * binary.threads, 1)
    return facts.multi_processor_count * max(1, min(by_shared, by_registers, _MOST_AT_ONCE))


@dataclass(frozen=True)
class DecodePlan:
    """What the kernel is compiled from. facts.tile_q: rows of a tile."""

    facts: ForwardFacts
    code: ModCode
    config: TritonConfig
    dtype: torch.dtype
    aligned: bool
    want_lse: bool
    want_max_scores: bool
    split: bool

    @property
    def key(self) -> str:
        return repr(("triton decode", self.facts, self.code.text, self.code.types, self.config,
                     self.dtype, self.aligned, self.want_lse, self.want_max_scores, self.split))

    def source(self) -> Source:
        from flexattn.kernels.triton_decode import decode

        tensor = (f"*{TYPES[self.dtype]}", *TENSOR)
        table = TABLE if self.facts.sparse else "constexpr"
        signature = {
            "q": tensor, "k": tensor, "v": tensor,
            "out": "constexpr" if self.split else tensor,
            "lse": "*fp32" if self.want_lse and not self.split else "constexpr",
            "max_scores": "*fp32" if self.want_max_scores and not self.split else "constexpr",
            "parts": "*fp32" if self.split else "constexpr",
            "full": table, "partial": table, "sizes": ("i32",) * 8, "blocks": ("i32",) * 2,
            "scale": "fp32", "args": self.code.argument_type(), "MODS": "constexpr",
            "F": "constexpr"}
        constants: dict[str, Any] = {n: None for n, t in signature.items() if t == "constexpr"}
        constants |= {"MODS": load(self.code.text), "F": self.facts}
        aligned = alignment(range(3 if self.split else 4), self.dtype) if self.aligned else {}
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        return Source(decode, signature, constants, aligned, options)


@dataclass(frozen=True)
class CombinePlan:
    """What the kernel that puts splits together is compiled from."""

    value_dim: int
    dtype: torch.dtype
    want_lse: bool
    want_max_scores: bool

    @property
    def key(self) -> str:
        return repr(("triton combine", self))

    @property
    def columns(self) -> int:
        """Of the output, for one program."""
        return min(128, 1 << max(self.value_dim - 1, 15).bit_length())

    def source(self) -> Source:
        from flexattn.kernels.triton_decode import combine

        signature = {
            "parts": "*fp32", "out": (f"*{TYPES[self.dtype]}", *TENSOR),
            "lse": "*fp32" if self.want_lse else "constexpr",
            "max_scores": "*fp32" if self.want_max_scores else "constexpr",
            "sizes": ("i32",) * 4, "VALUE_DIM": "constexpr", "COLUMNS": "constexpr",
            "STEP": "constexpr"}
        known = {"lse": None, "max_scores": None, "VALUE_DIM": self.value_dim,
                 "COLUMNS": self.columns, "STEP": _STEP}
        constants = {name: known[name] for name, t in signature.items() if t == "constexpr"}
        return Source(combine, signature, constants, {}, {"num_warps": 4})


def _precision(q: Tensor) -> str:
    """torch multiplies few rows of float32 without rounding them to tf32; three products of tf32
    come as close, and reading the keys takes longer than they do."""
    found = precision(q.dtype)
    three = found == "tf32" and q.is_cuda and torch.version.hip is None
    return "tf32x3" if three else found


class _Decode:
    """A prepared call."""

    def __init__(self, call: Call, code: ModCode, config: TritonConfig) -> None:
        q, k, v = call.query, call.key, call.value
        self.config, self.code, self._device = config, code, q.device
        self.facts = ForwardFacts(
            q.shape[-1], v.shape[-1], chunk_of(q.shape[-1]), chunk_of(v.shape[-1]),
            config.tile_q, config.tile_kv, sparse=call.block_mask is not None,
            fold=call.score is None and call.scale > 0, precision=_precision(q))
        self.pack = packed_heads(call)
        lines = q.shape[0] * q.shape[1] // self.pack * -(-self.pack * q.shape[2] // config.tile_q)
        tiles = -(-k.shape[2] // config.tile_kv)
        self.splits = number_of_splits(lines, tiles, self._at_once(call, split=True))
        self._first = self._attend(call, lines)
        self._second = self._combine(call) if self.splits > 1 else None

    def _plan(self, call: Call, split: bool) -> DecodePlan:
        out = like_query(call.query[:, :, :0], call.value.shape[-1])
        return DecodePlan(self.facts, self.code, self.config, call.query.dtype,
                          is_aligned(call.query, call.key, call.value, out), call.want_lse,
                          call.want_max_scores, split)

    def _at_once(self, call: Call, split: bool) -> int:
        """Programs that the GPU runs at a time."""
        plan = self._plan(call, split)
        found = function(plan.key, call.query.device, plan.source)
        if found is None:
            return _INTERPRETED_AT_ONCE
        return programs_at_once(found, call.query.device)

    def _attend(self, call: Call, lines: int) -> Launch:
        q, k, v = call.query, call.key, call.value
        plan = self._plan(call, self.splits > 1)
        values: list[Any] = []
        for t in (q, k, v):
            values += [t, *t.stride()[:3]]
        if self.splits > 1:
            values.append(q)  # stands for the parts
        else:
            values += [q, *like_query(q, v.shape[-1]).stride()[:3]]
            values += [q] * (call.want_lse + call.want_max_scores)
        found = self._tables(call)
        if found is not None:
            values += found.tensors
        values += [*q.shape[:3], k.shape[2], *k.shape[:2], self.pack, self.splits,
                   *((found.batch, found.heads) if found else (1, 1)), call.scale,
                   *argument_values(self.code, call.score, call.mask)]
        return Launch(function(plan.key, q.device, plan.source), plan.source,
                      (lines * self.splits, 1, 1), values)

    def _combine(self, call: Call) -> Launch:
        q, value_dim = call.query, call.value.shape[-1]
        plan = CombinePlan(value_dim, q.dtype, call.want_lse, call.want_max_scores)
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        values = [q, q, *like_query(q, value_dim).stride()[:3],
                  *[q] * (call.want_lse + call.want_max_scores), rows, *q.shape[1:3], self.splits]
        return Launch(function(plan.key, q.device, plan.source), plan.source,
                      (rows, -(-value_dim // plan.columns), 1), values)

    def _tables(self, call: Call) -> Tables | None:
        if call.block_mask is None:
            return None
        tile_q = SHORT if call.query.shape[2] <= SHORT else MOST_QUERIES
        return tables(call.block_mask, tile_q, self.config.tile_kv)

    @property
    def fits(self) -> bool:
        binary = self._first.binary
        return binary is None or binary.shared <= shared_limit(self._device.index)

    def run(self, call: Call) -> Result:
        call = with_rows(call)
        q = call.query
        out = like_query(q, call.value.shape[-1])
        lse, max_scores = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
                           if wanted else None for wanted in (call.want_lse, call.want_max_scores))
        results = [out, *(t for t in (lse, max_scores) if t is not None)]
        stream = stream_of(q)
        if self._second is None:
            self._first(self._arguments(call, results), stream)
        else:
            parts = torch.empty(out.numel() // out.shape[-1] * self.splits * (out.shape[-1] + 2),
                                dtype=torch.float32, device=q.device)
            self._first(self._arguments(call, [parts]), stream)
            self._second([parts, *results], stream)
        return Result(out, lse, max_scores)

    def _arguments(self, call: Call, results: list[Tensor]) -> list[Tensor]:
        found = self._tables(call)
        tensors = [call.query, call.key, call.value, *results]
        if found is not None:
            tensors += found.tensors
        tensors.append(self.code.flag)
        for mod in (call.score, call.mask):
            if mod is not None:
                tensors += mod.captures
        return tensors
