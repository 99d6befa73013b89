"""Backward on Hopper: tiles, buffers and launches of kernels.hopper_backward.

In: a runtime.call.Call of 16-bit floats, its Result (out and lse), and the gradients of both. Out:
a `Prepared` backward, which gives Gradients, or a Refusal that says why Triton serves it. Three
launches: lse and delta, all gradients, and dq from float32 to the query's type. dq's sums are made
in any order, so deterministic calls are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn.compile_triton import Source, load
from flexattn.ir.graph import Node
from flexattn.ir.ops import FLOAT_UNARY, Op
from flexattn.kernels.hopper_backward_config import HopperBackwardConfig, backward_configs
from flexattn.lower.separate import ROWS, levels
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.runtime.gpu_driver import Function, multiprocessors
from flexattn.runtime.gpu_launch import (
    TYPES,
    Box,
    Launch,
    PreparedBackward,
    Refusal,
    function,
    stream_of,
)
from flexattn.runtime.gpu_mods import ModCode, argument_values, mod_code, on_device
from flexattn.runtime.gpu_tables import tables
from flexattn.runtime.launch_hopper import descriptor_type, out_of_place
from flexattn.runtime.launch_triton import TABLE, TENSOR, alignment, is_aligned
from flexattn.runtime.launch_triton_backward import PREPARE_ROWS, prepare_source, prepare_values
from flexattn.runtime.tensor_map import takes
from flexattn.runtime.triton_backward_plan import deterministic

_LARGEST_TILE = 128
_CONSUMER_ROWS = 64
_ROUND_ROWS = 32
_MOST_SPILLED = 256  # bytes of local memory a thread: mostly outside of the loops
_TOO_MANY_SPILLED = 512  # Triton's kernels are faster
_EARLY = False  # launch each kernel before the last one has ended: not measured yet


def prepare(call: Call, result: Result, d_out: Tensor,
            d_lse: Tensor | None) -> PreparedBackward | Refusal:
    """The backward with the first config that hardly spills, or the one that spills least."""
    reason = _reason(call, d_out)
    if reason is not None:
        return Refusal(reason)
    chosen = None
    for plan, found in _compiled(call):
        if chosen is None or found.spilled_bytes < chosen[1].spilled_bytes:
            chosen = plan, found
        if found.spilled_bytes <= _MOST_SPILLED:
            break
    assert chosen is not None
    if chosen[1].spilled_bytes > _TOO_MANY_SPILLED:
        return Refusal(f"{chosen[1].spilled_bytes} bytes of a thread do not fit its registers")
    return _Backward(_with_mods(call), result, d_out, d_lse, *chosen)


def candidates(call: Call, result: Result, d_out: Tensor,
               d_lse: Tensor | None) -> Iterator[PreparedBackward]:
    """The backward with each config."""
    if _reason(call, d_out) is None:
        for plan, found in _compiled(call):
            yield _Backward(_with_mods(call), result, d_out, d_lse, plan, found)


def _compiled(call: Call) -> Iterator[tuple[HopperBackwardPlan, Function]]:
    code = mod_code(_with_mods(call), "cuda", with_gradient=True)
    for config in backward_configs(call.query.shape[-1], call.value.shape[-1], crowded(code)):
        plan = HopperBackwardPlan(config, code, call.query.dtype, call.block_mask is not None)
        found = function(plan.key, call.query.device, plan.source)
        assert found is not None
        yield plan, found


def crowded(code: ModCode) -> bool:
    """Whether scores and functions of them are kept for their gradients, as a softcap's tanh is:
    the larger tile would spill, which need not be compiled to know it."""
    score, _ = code.graphs
    made_of_score: set[Node] = set()
    for n in score.nodes if score else ():
        if n.attr == "score" or not made_of_score.isdisjoint(n.args):
            if n.op in FLOAT_UNARY:
                return True
            made_of_score.add(n)
    return False


def _reason(call: Call, d_out: Tensor) -> str | None:
    """Why Triton serves the call, as far as that is known without compiling."""
    return (refused(call) or _unreadable(call, d_out)
            or _untaken(mod_code(_with_mods(call), "cuda", with_gradient=True)))


def refused(call: Call) -> str | None:
    """Why this kernel never serves such a call."""
    q, v = call.query, call.value
    reason = out_of_place(q)
    if reason is not None:
        return reason
    if not backward_configs(q.shape[-1], v.shape[-1]):
        return f"no tile for heads of {q.shape[-1]} and {v.shape[-1]} columns"
    if deterministic(call):
        return "dq is summed in any order, and a deterministic result is wanted"
    return None


def _unreadable(call: Call, d_out: Tensor) -> str | None:
    tensors = {"query": call.query, "key": call.key, "value": call.value,
               "the output's gradient": d_out}
    for name, tensor in tensors.items():
        if not takes(tensor):
            return f"TMA cannot read {name} as it lies in memory"
    return None


def _untaken(code: ModCode) -> str | None:
    if code.gradient is not None and code.gradient.loads:
        return "captured tensors need gradients"
    return None


def _reads_queries(code: ModCode) -> bool:
    """Whether a mod reads a captured tensor once for each query."""
    for graph in code.graphs:
        level = levels(graph.nodes) if graph else {}
        if any(n.op is Op.LOAD and known == ROWS for n, known in level.items()):
            return True
    return False


def _with_mods(call: Call) -> Call:
    """The call with the tensors of its mods on its device."""
    score, mask = (on_device(mod, call.query.device) for mod in (call.score, call.mask))
    if score is call.score and mask is call.mask:
        return call
    return call._replace(score=score, mask=mask)


@dataclass(frozen=True)
class HopperBackwardPlan:
    """What the kernel is compiled from, without importing Triton unless it has to be."""

    config: HopperBackwardConfig
    code: ModCode
    dtype: torch.dtype
    sparse: bool

    @property
    def key(self) -> str:
        return repr(("hopper backward", self.config, self.code.text, self.code.types, self.dtype,
                     self.sparse))

    def source(self) -> Source:
        from flexattn.kernels.hopper_backward import Outputs, hopper_backward
        from flexattn.kernels.hopper_backward_pipeline import Blocks, Inputs, Sizes

        config, kind = self.config, TYPES[self.dtype]
        of_queries = descriptor_type(kind, config.tile_q, config.head_dim)
        of_keys = descriptor_type(kind, _CONSUMER_ROWS, config.head_dim)
        signature: dict[str, Any] = {
            "inputs": Inputs(of_queries, of_keys, of_keys, of_queries,
                             descriptor_type("fp32", 2, config.tile_q)),
            "outputs": Outputs(of_keys, of_keys, descriptor_type("fp32", _CONSUMER_ROWS, 64)),
            "sizes": Sizes(*["i32"] * 6),
            "blocks": Blocks(TABLE, TABLE, "i32", "i32") if self.sparse else "constexpr",
            "args": self.code.argument_type(), "counter": "*i32", "scale": "fp32",
            "C": "constexpr", "MODS": "constexpr"}
        constants: dict[str, Any] = {
            "C": replace(config, reads_queries=_reads_queries(self.code)),
            "MODS": load(self.code.text)}
        if not self.sparse:
            constants["blocks"] = None
        options = {"num_warps": 4, "maxnreg": config.entry_registers}
        return Source(hopper_backward, signature, constants, {}, options)


class _Memory(NamedTuple):
    """Of one backward. statistics: lse2 and delta of all lines (batches and heads), with rows for
    whole tiles; counter: behind them; total: dq in float32, with rows for whole tiles."""

    statistics: Tensor
    counter: Tensor
    total: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class _Backward:
    """A prepared backward."""

    def __init__(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None,
                 plan: HopperBackwardPlan, main: Function) -> None:
        q, k = call.query, call.key
        self.plan, self.lines = plan, q.shape[0] * q.shape[1]
        self.length = -(-q.shape[2] // _LARGEST_TILE) * _LARGEST_TILE
        memory, device = self._memory(call), q.device
        tiles = -(-k.shape[2] // plan.config.tile_kv)
        around = ((*_prepare_source(call, result, d_out, d_lse), PREPARE_ROWS,
                   prepare_values(call, result, d_out, d_lse, memory.statistics, memory.total)),
                  (*_round_source(call), _ROUND_ROWS, self._round_values(call, memory)))
        self._prepare, self._round = (
            Launch(function(repr(key), device, build), build,
                   (self.length // rows * self.lines, 1, 1), values, early)
            for (key, build, rows, values), early in zip(around, (False, _EARLY), strict=True))
        ctas = tiles * k.shape[0] * k.shape[1]
        if plan.config.resident:
            ctas = min(ctas, multiprocessors(device.index))
        self._main = Launch(main, plan.source, (ctas, 1, 1),
                            self._main_values(call, d_out, memory), _EARLY)

    @property
    def launches(self) -> list[Launch]:
        return [self._prepare, self._main, self._round]

    @property
    def tile(self) -> dict[str, int]:
        config = self.plan.config
        return {"tile_q": config.tile_q, "tile_kv": config.tile_kv, "stages": config.stages}

    @property
    def functions(self) -> list[Function]:
        return self._main.functions

    def run(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
        with_mods, memory = _with_mods(call), self._memory(call)
        stream = stream_of(call.query)
        self._prepare.fresh(prepare_values(call, result, d_out, d_lse, memory.statistics,
                                           memory.total), stream)
        self._main.fresh(self._main_values(with_mods, d_out, memory), stream)
        self._round.fresh(self._round_values(call, memory), stream)
        captures = call.score.captures if call.score else ()
        return Gradients(memory.dq, memory.dk, memory.dv, tuple(
            torch.zeros_like(t) if t.requires_grad else None for t in captures))

    def _memory(self, call: Call) -> _Memory:
        q, room = call.query, 2 * self.lines * self.length
        flat = q.new_empty(room + 1, dtype=torch.float32)
        return _Memory(flat[:room].view(2 * self.lines, self.length), flat[room:],
                       q.new_empty(1, self.lines, self.length, q.shape[3], dtype=torch.float32),
                       torch.empty_like(q), torch.empty_like(call.key),
                       torch.empty_like(call.value))

    # The kernels' arguments, in their order

    def _main_values(self, call: Call, d_out: Tensor, memory: _Memory) -> list[Any]:
        config, q, k = self.plan.config, call.query, call.key
        statistics = memory.statistics.view(1, 2, self.lines, self.length).transpose(1, 2)
        boxes = [Box(q, config.tile_q, config.head_dim)]
        boxes += [Box(t, _CONSUMER_ROWS, config.head_dim) for t in (k, call.value)]
        boxes += [Box(d_out, config.tile_q, config.head_dim),
                  Box(statistics, 2, config.tile_q, exact=True, swizzled=False)]
        boxes += [Box(t, _CONSUMER_ROWS, config.head_dim) for t in (memory.dk, memory.dv)]
        boxes.append(Box(memory.total, _CONSUMER_ROWS, 64, exact=True))
        values = [value for box in boxes for value in box.values]
        values += [q.shape[2], k.shape[2], *q.shape[:2], *k.shape[:2]]
        if call.block_mask is not None:
            found = tables(call.block_mask, config.tile_q, config.tile_kv, by_columns=True)
            values += [*found.tensors, found.batch, found.heads]
        return [*values, *argument_values(self.plan.code, call.score, call.mask), memory.counter,
                call.scale]

    def _round_values(self, call: Call, memory: _Memory) -> list[Any]:
        return [memory.total, memory.dq, *memory.dq.stride()[:3], call.query.shape[1],
                call.query.shape[2], self.length, call.scale]


_Build = tuple[tuple, Callable[[], Source]]


def _prepare_source(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> _Build:
    dtype, value_dim, with_lse = call.query.dtype, call.value.shape[-1], d_lse is not None
    aligned = is_aligned(result.out, d_out)
    return (("triton prepare with total", dtype, value_dim, with_lse, aligned),
            lambda: prepare_source(dtype, value_dim, with_lse, aligned, with_total=True))


def _round_source(call: Call) -> _Build:
    dtype, head_dim = call.query.dtype, call.query.shape[-1]

    def build() -> Source:
        from flexattn.kernels.triton_backward import round_query_gradient as kernel

        constants = {"DIM": head_dim, "ROWS": _ROUND_ROWS, "WAITS": True}
        signature = {"total": "*fp32", "dq_out": (f"*{TYPES[dtype]}", *TENSOR),
                     "sizes": ("i32",) * 3, "scale": "fp32",
                     **dict.fromkeys(constants, "constexpr")}
        return Source(kernel, signature, constants, {(0,): 16, **alignment((1,), dtype)})

    return ("triton round", dtype, head_dim), build
