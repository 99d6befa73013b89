"""Decoding on any GPU that Triton serves: few queries, whose keys are dealt out to many programs.

In: a runtime.call.Call of 16-bit floats or float32. Out: a `Prepared` call. Rejects (a Refusal)
calls of many queries, and of several that fill the GPU without dealing out keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flexattn.compile_triton import Source, load
from flexattn.kernels.decode_config import MOST_QUERIES, SHORT, decode_configs, number_of_splits
from flexattn.kernels.triton_config import ForwardFacts, TritonConfig, chunk_of
from flexattn.runtime.call import Call, Result, like_query
from flexattn.runtime.gpu_driver import Function, multiprocessors, shared_limit, target
from flexattn.runtime.gpu_launch import TYPES, Kernel, Prepared, Refusal, pointer, stream_of
from flexattn.runtime.gpu_mods import INTERPRETED, ModCode, mod_code, proven, watch
from flexattn.runtime.gpu_tables import tables
from flexattn.runtime.launch_triton import (
    TABLE,
    TENSOR,
    alignment,
    is_aligned,
    precision,
    with_rows,
)

_RESERVED_SHARED = 1024  # bytes that each program takes besides its own
_MOST_AT_ONCE = 4  # programs of a multiprocessor
_INTERPRETED_AT_ONCE = 8
_STEP = 32  # splits that `combine` reads at a time


def decodes(call: Call) -> bool:
    """Whether a call is one of few queries."""
    q_len = call.query.shape[2]
    return q_len <= SHORT or (q_len <= MOST_QUERIES and _would_idle(call))


def key(call: Call) -> tuple:
    """What calls that share a prepared one agree in: not in the length of the keys, in which
    caches grow, nor in what changes with it. The call has contiguous columns."""
    q, k, v, mask = call.query, call.key, call.value, call.block_mask
    return ("decode", q.shape, q.stride(), k.shape[:2], v.shape[3], q.dtype, q.get_device(),
            is_aligned(q, k, v), call.scale > 0, call.want_lse, call.want_max_scores,
            None if call.score is None else id(call.score.graph),
            None if call.mask is None else id(call.mask.graph), proven(call),
            None if mask is None else mask.shape[1] > 1,
            q.dtype is torch.float32 and torch.get_float32_matmul_precision())


def prepare(call: Call) -> Prepared | Refusal:
    """The call with the first config whose kernel fits."""
    if not decodes(call):
        return Refusal(f"{call.query.shape[2]} queries are no decoding")
    return next(candidates(call), None) or Refusal("no tile fits the shared memory")


def candidates(call: Call) -> Iterator[Prepared]:
    """The call with each config whose kernel fits."""
    if not decodes(call):
        return
    call = with_rows(call)
    where = target(call.query.device.index) if call.query.is_cuda else None
    code = mod_code(call, where.backend if where else "interpreter")  # type: ignore[arg-type]
    for config in _configs(call, where):
        prepared = _Decode(call, code, config)
        if prepared.fits(call.key.shape[2]):
            watch(code, call.score, call.mask)
            yield prepared


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
    """Prepared for all calls of one `key`. How many splits there are follows the length of the
    keys, and whether there is more than one says which kernels run: each is made when it is first
    needed."""

    def __init__(self, call: Call, code: ModCode, config: TritonConfig) -> None:
        q, k, v = call.query, call.key, call.value
        self.config, self.code, self._device = config, code, q.device
        facts = ForwardFacts(
            q.shape[-1], v.shape[-1], chunk_of(q.shape[-1]), chunk_of(v.shape[-1]),
            config.tile_q, config.tile_kv, sparse=call.block_mask is not None,
            fold=call.score is None and call.scale > 0, precision=_precision(q))
        out = like_query(q[:, :, :0], v.shape[-1])
        self._plan = DecodePlan(facts, code, config, q.dtype, is_aligned(q, k, v, out),
                                call.want_lse, call.want_max_scores, split=True)
        self._end = CombinePlan(v.shape[-1], q.dtype, call.want_lse, call.want_max_scores)
        self.pack = packed_heads(call)
        self._tiles = q.shape[0] * q.shape[1] // self.pack * -(
            -self.pack * q.shape[2] // config.tile_q)
        self._lines, self._strides = q.shape[:3], q.stride()[:3]
        self._rows = self._lines.numel()
        self._mask_rows = SHORT if q.shape[2] <= SHORT else MOST_QUERIES
        found = self._dealt.function
        self._at_once = programs_at_once(found, q.device) if found else _INTERPRETED_AT_ONCE
        self._flag = pointer(code.flag)

    @cached_property
    def _alone(self) -> Kernel:
        plan = replace(self._plan, split=False)
        return Kernel(plan.key, self._device, plan.source)

    @cached_property
    def _dealt(self) -> Kernel:
        return Kernel(self._plan.key, self._device, self._plan.source)

    @cached_property
    def _combine(self) -> Kernel:
        return Kernel(self._end.key, self._device, self._end.source)

    @property
    def tile(self) -> dict[str, int]:
        return asdict(self.config)

    @property
    def functions(self) -> list[Function]:
        made = (self.__dict__.get("_alone"), self._dealt)  # the first where it was needed
        return [kernel.function for kernel in made if kernel and kernel.function]

    def fits(self, kv_len: int) -> bool:
        """Whether shared memory holds what the kernel of so many keys needs."""
        found = (self._dealt if self.splits(kv_len) > 1 else self._alone).function
        return found is None or found.binary.shared <= shared_limit(self._device.index)

    def splits(self, kv_len: int) -> int:
        """Into how many parts the keys are dealt out."""
        return number_of_splits(self._tiles, -(-kv_len // self.config.tile_kv), self._at_once)

    def run(self, call: Call) -> Result:
        q = call.query
        out = like_query(q, self._end.value_dim)
        results, lse, max_scores = [pointer(out), *out.stride()[:3]], None, None
        if call.want_lse:
            lse = self._floats(self._rows).view(self._lines)
            results.append(pointer(lse))
        if call.want_max_scores:
            max_scores = self._floats(self._rows).view(self._lines)
            results.append(pointer(max_scores))
        stream, splits = stream_of(q), self.splits(call.key.shape[2])
        grid = (self._tiles * splits, 1, 1)
        if splits == 1:
            self._alone(grid, self._values(call, results, 1), stream)
        else:
            parts = self._floats(self._rows * splits * (self._end.value_dim + 2))
            self._dealt(grid, self._values(call, [pointer(parts)], splits), stream)
            self._combine((self._rows, -(-self._end.value_dim // self._end.columns), 1),
                          [pointer(parts), *results, self._rows, *self._lines[1:], splits], stream)
        return Result(out, lse, max_scores)

    def _floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self._device)

    def _values(self, call: Call, results: list[Any], splits: int) -> list[Any]:
        """Of the parameters of `decode`."""
        q, k, v = call.query, call.key, call.value
        values = [pointer(q), *self._strides, pointer(k), *k.stride()[:3], pointer(v),
                  *v.stride()[:3], *results]
        blocks = (1, 1)
        if call.block_mask is not None:
            found = tables(call.block_mask, self._mask_rows, self.config.tile_kv)
            blocks = found.batch, found.heads
            values += found.pointers
        kv_batch, kv_heads, kv_len, _ = k.shape
        values += [*self._lines, kv_len, kv_batch, kv_heads, self.pack, splits, *blocks,
                   call.scale, self._flag]
        for mod in (call.score, call.mask):
            if mod is not None:
                for t in mod.captures:
                    values += [pointer(t), *t.shape, *t.stride()]
                values += mod.numbers
        return values
