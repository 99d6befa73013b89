"""What the kernels of a backward are compiled from, and what they depend on.

In: a runtime.call.Call, the code of its mods and the gradient of its output. Out: a `Shape`, which
gives a `BackwardPlan` for each kernel and tile, without importing Triton unless it has to be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis import grad_reads
from flexattn.compile_triton import Source, load
from flexattn.kernels.triton_config import BackwardFacts, TritonConfig, chunk_of
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_driver import multiprocessors
from flexattn.runtime.gpu_launch import TYPES, tensor_type
from flexattn.runtime.gpu_mods import ModCode
from flexattn.runtime.launch_triton import (
    TABLE,
    TENSOR,
    alignment,
    is_aligned,
    is_boxed,
    is_rounded,
    precision,
)


def deterministic(call: Call) -> bool:
    return bool(call.options.get("deterministic",
                                 torch.are_deterministic_algorithms_enabled()))


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
    boxed: bool

    @property
    def key(self) -> str:
        return repr(("triton backward", self.kernel, self.facts, self.code.text, self.code.types,
                     self.config, self.dtype, self.out_dtype, self.aligned, self.boxed))

    def source(self) -> Source:
        from flexattn.kernels import triton_backward

        facts = self.facts
        out = (f"*{TYPES[self.out_dtype]}", *TENSOR)
        total = "*i64" if facts.exact else "*fp32"
        table = TABLE if facts.sparse else "constexpr"
        signature: dict[str, Any] = {
            name: tensor_type(self.dtype, *tile, self.boxed)
            for name, tile in zip(("q", "k", "v", "d_out"), tiles_of(facts), strict=True)}
        signature["statistics"] = ("*fp32", "i64")
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
        aligned = alignment(range(4), self.dtype) if self.aligned and not self.boxed else {}
        return Source(getattr(triton_backward, self.kernel), signature, constants, aligned,
                      {"num_warps": self.config.warps, "num_stages": self.config.stages})


def tiles_of(facts: BackwardFacts) -> tuple[tuple[int, int], ...]:
    """Rows and columns of a chunk of q, k, v and d_out."""
    return ((facts.tile_q, facts.head_chunk), (facts.tile_kv, facts.head_chunk),
            (facts.tile_kv, facts.value_chunk), (facts.tile_q, facts.value_chunk))


class Reads:
    """The reads of captured tensors whose gradients are wanted, by how they are summed."""

    def __init__(self, code: ModCode) -> None:
        self.loads = code.gradient.loads if code.gradient else ()
        kinds = grad_reads.kinds(self.loads)
        self.rows, self.columns, self.diagonals, self.scattered = (
            tuple(i for i, kind in enumerate(kinds) if kind == wanted) for wanted in
            (grad_reads.ROW, grad_reads.COLUMN, grad_reads.DIAGONAL, grad_reads.SCATTERED))
        self.unordered = self.diagonals + self.scattered


class Shape:
    """What a backward's kernels depend on besides their tiles."""

    def __init__(self, call: Call, code: ModCode, d_out: Tensor) -> None:
        q, k, v = call.query, call.key, call.value
        self.code, self.exact, self.reads = code, deterministic(call), Reads(code)
        self.aligned, self.boxed = is_aligned(q, k, v, d_out), is_boxed(q, k, v, d_out)
        self._facts = BackwardFacts(
            q.shape[-1], v.shape[-1], chunk_of(q.shape[-1]), chunk_of(v.shape[-1]), 0, 0,
            call.block_mask is not None, precision(q.dtype), is_rounded(q), self.reads.rows,
            self.reads.columns, self.reads.diagonals, self.reads.scattered,
            self.exact and bool(self.reads.unordered))

    def facts(self, config: TritonConfig) -> BackwardFacts:
        return replace(self._facts, tile_q=config.tile_q, tile_kv=config.tile_kv)

    def plan(self, name: str, config: TritonConfig, call: Call) -> BackwardPlan:
        summed = name == "key_value_gradient" and parts(call, config) > 1
        dtype = call.query.dtype
        return BackwardPlan(name, self.facts(config), self.code, config, dtype,
                            torch.float32 if summed else dtype, self.aligned, self.boxed)


def parts(call: Call, config: TritonConfig) -> int:
    """How many programs share the query heads (and sequences) of a tile of keys."""
    q, k = call.query, call.key
    sharers = q.shape[1] // k.shape[1] * (q.shape[0] // k.shape[0])
    programs = -(-k.shape[2] // config.tile_kv) * k.shape[0] * k.shape[1]
    wanted = 2 * multiprocessors(q.device.index) if q.is_cuda else 1
    return max(1, min(sharers, wanted // programs))
