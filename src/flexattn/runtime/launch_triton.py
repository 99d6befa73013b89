"""Forward on any GPU that Triton serves: tiles, arguments and launch of kernels.triton_forward.

In: a runtime.call.Call of 16-bit floats or float32. Out: a `Prepared` call. Rejects (a Refusal):
nothing but a GPU whose shared memory holds none of the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flexattn.compile_triton import Source, load
from flexattn.kernels.triton_config import ForwardFacts, TritonConfig, chunk_of, forward_configs
from flexattn.runtime.call import Call, Result, like_query
from flexattn.runtime.gpu_driver import Function, shared_limit, target
from flexattn.runtime.gpu_launch import (
    TYPES,
    Launch,
    Prepared,
    Refusal,
    function,
    stream_of,
    tensor_type,
    tensor_values,
)
from flexattn.runtime.gpu_mods import (
    INTERPRETED,
    ModCode,
    argument_values,
    mod_code,
    on_device,
    watch,
)
from flexattn.runtime.gpu_tables import Tables, tables
from flexattn.runtime.tensor_map import has_tma, takes

TENSOR = ("i64", "i64", "i64")  # strides of batches, heads and rows
TABLE = ("*i32", "*i32", "*i32", "*i64")
_WIDEST_BOXED = 256  # columns
_SECOND_LEVEL_SHARE = 2 / 3  # of the cache that keys and values of a section may fill


def prepare(call: Call) -> Prepared | Refusal:
    """The call with the first config whose kernel fits."""
    return next(candidates(call), None) or Refusal("no tile fits the shared memory")


def candidates(call: Call) -> Iterator[Prepared]:
    """The call with each config whose kernel fits."""
    call = with_rows(call)
    where = target(call.query.device.index) if call.query.is_cuda else None
    code = mod_code(call, where.backend if where else "interpreter")  # type: ignore[arg-type]
    for config in _configs(call, where):
        prepared = _Forward(call, code, config)
        if all(f.binary.shared <= shared_limit(call.query.device.index)
               for f in prepared.functions):
            watch(code, call.score, call.mask)
            yield prepared


def with_rows(call: Call) -> Call:
    """The call with contiguous columns (a copy where they are not) and tensors of mods on its
    device."""
    q, k, v, score, mask = call.query, call.key, call.value, call.score, call.mask
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        q, k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
                   for t in (q, k, v))
    if score is not None or mask is not None:
        score, mask = on_device(score, q.device), on_device(mask, q.device)
    if (q is call.query and k is call.key and v is call.value and score is call.score
            and mask is call.mask):
        return call
    return call._replace(query=q, key=k, value=v, score=score, mask=mask)


def _configs(call: Call, where: Any) -> tuple[TritonConfig, ...]:
    if where is None:
        return (TritonConfig(16, 16, 4, 1),)
    return forward_configs(where.backend, where.arch, call.query.shape[-1], call.value.shape[-1],
                           call.query.element_size(), precision(call.query.dtype) == "ieee",
                           call.block_mask is not None)


@dataclass(frozen=True)
class ForwardPlan:
    """What the kernel is compiled from, without importing Triton unless it has to be."""

    facts: ForwardFacts
    code: ModCode
    config: TritonConfig
    dtype: torch.dtype
    aligned: bool
    boxed: bool
    want_lse: bool
    want_max_scores: bool

    @property
    def key(self) -> str:
        return repr(("triton forward", self.facts, self.code.text, self.code.types, self.config,
                     self.dtype, self.aligned, self.boxed, self.want_lse,
                     self.want_max_scores))

    def source(self) -> Source:
        from flexattn.kernels.triton_forward import forward

        facts, boxed = self.facts, self.boxed
        table = TABLE if facts.sparse else "constexpr"
        signature: dict[str, Any] = {
            "q": tensor_type(self.dtype, facts.tile_q, facts.head_chunk, boxed),
            "k": tensor_type(self.dtype, facts.tile_kv, facts.head_chunk, boxed),
            "v": tensor_type(self.dtype, facts.tile_kv, facts.value_chunk, boxed),
            "out": (f"*{TYPES[self.dtype]}", *TENSOR),
            "lse": "*fp32" if self.want_lse else "constexpr",
            "max_scores": "*fp32" if self.want_max_scores else "constexpr",
            "full": table, "partial": table, "sizes": ("i32",) * 7, "blocks": ("i32",) * 2,
            "scale": "fp32", "args": self.code.argument_type(), "MODS": "constexpr",
            "F": "constexpr"}
        constants = {"lse": None, "max_scores": None, "full": None, "partial": None,
                     "MODS": load(self.code.text), "F": facts}
        constants = {k: v for k, v in constants.items() if signature[k] == "constexpr"}
        aligned = alignment((3,) if boxed else range(4), self.dtype) if self.aligned else {}
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        return Source(forward, signature, constants, aligned, options)


def alignment(parameters: Any, dtype: torch.dtype) -> dict[tuple[int, ...], int]:
    """Rows of these tensors begin at multiples of 16 bytes."""
    return {(p, i): 16 if i == 0 else 16 // dtype.itemsize for p in parameters for i in range(4)}


def is_aligned(*tensors: Tensor) -> bool:
    bits = 0
    for t in tensors:
        batches, heads, rows, _ = t.stride()
        bits |= t.data_ptr() | (batches | heads | rows) * t.element_size()
    return not bits & 15


class _Forward:
    """A prepared call."""

    def __init__(self, call: Call, code: ModCode, config: TritonConfig) -> None:
        q, k, v = call.query, call.key, call.value
        facts = ForwardFacts(
            q.shape[-1], v.shape[-1], chunk_of(q.shape[-1]), chunk_of(v.shape[-1]),
            config.tile_q, config.tile_kv, sparse=call.block_mask is not None,
            fold=call.score is None and call.scale > 0, precision=precision(q.dtype),
            rounded=is_rounded(q))
        out = like_query(q, v.shape[-1])
        self.config, self.code = config, code
        self.plan = ForwardPlan(facts, code, config, q.dtype, is_aligned(q, k, v, out),
                                is_boxed(q, k, v), call.want_lse, call.want_max_scores)
        q_tiles = -(-q.shape[2] // config.tile_q)
        grid = (q_tiles * q.shape[0] * q.shape[1], 1, 1)
        self.launch = Launch(function(self.plan.key, q.device, self.plan.source),
                             self.plan.source, grid, self._values(call, out))

    def _values(self, call: Call, out: Tensor) -> list[Any]:
        q, k, v = call.query, call.key, call.value
        facts, boxed = self.plan.facts, self.plan.boxed
        values = [*tensor_values(q, facts.tile_q, facts.head_chunk, boxed),
                  *tensor_values(k, facts.tile_kv, facts.head_chunk, boxed),
                  *tensor_values(v, facts.tile_kv, facts.value_chunk, boxed),
                  out, *out.stride()[:3]]
        values += [q] * (call.want_lse + call.want_max_scores)  # stand for their pointers
        found = self._tables(call)
        if found is not None:
            values += found.tensors
        return [*values, *q.shape[:3], k.shape[2], *k.shape[:2], section(call),
                *((found.batch, found.heads) if found else (1, 1)), call.scale,
                *argument_values(self.code, call.score, call.mask)]

    @property
    def tile(self) -> dict[str, int]:
        return asdict(self.config)

    @property
    def functions(self) -> list[Function]:
        return self.launch.functions

    def _tables(self, call: Call) -> Tables | None:
        if call.block_mask is None:
            return None
        return tables(call.block_mask, self.config.tile_q, self.config.tile_kv)

    def run(self, call: Call) -> Result:
        q = call.query
        out = like_query(q, call.value.shape[-1])
        lse, max_scores = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
                           if wanted else None for wanted in (call.want_lse, call.want_max_scores))
        tensors = [q, call.key, call.value, out]
        tensors += [t for t in (lse, max_scores) if t is not None]
        found = self._tables(call)
        if found is not None:
            tensors += found.tensors
        tensors.append(self.code.flag)
        for mod in (call.score, call.mask):
            if mod is not None:
                tensors += mod.captures
        self.launch(tensors, stream_of(q))
        return Result(out, lse, max_scores)


def precision(dtype: torch.dtype) -> str:
    """Of products of float32: what torch's own large matrix products have."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if dtype is torch.float32 and highest else "tf32"


def is_rounded(tensor: Tensor) -> bool:
    """Whether the kernel rounds to tf32: NVIDIA's tensor cores do not."""
    return (tensor.is_cuda and torch.version.hip is None
            and tensor.dtype is torch.float32 and precision(tensor.dtype) == "tf32")


def is_boxed(*tensors: Tensor) -> bool:
    """Whether the kernel reads these tensors by TMA. Tiles of wide heads have too few rows for
    Hopper's tensor cores, and their code is bad with TMA (32 registers a thread)."""
    q = tensors[0]
    return (has_tma(q.device) and all(map(takes, tensors))
            and (q.element_size() == 2 or is_rounded(q))
            and max(t.shape[-1] for t in tensors) <= _WIDEST_BOXED)


def section(call: Call) -> int:
    """Query heads walked together, so that their keys and values stay in the cache."""
    q, k, v = call.query, call.key, call.value
    lines, group = q.shape[0] * q.shape[1], q.shape[1] // k.shape[1]
    if INTERPRETED:
        return min(lines, 2)
    cache = torch.cuda.get_device_properties(q.device).L2_cache_size * _SECOND_LEVEL_SHARE
    one = k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    return max(1, min(lines, int(cache // max(one, 1)) * group))


