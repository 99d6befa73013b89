"""Forward on Hopper: tiles, arguments and launch of kernels.hopper_forward.

In: a runtime.call.Call of 16-bit floats. Out: a `Prepared` call, or a Refusal that says why Triton
serves it. Tensors that TMA cannot read as they lie are copied; registers that do not hold a mod
give it a smaller tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexattn.compile_triton import Source, load
from flexattn.ir.ops import COMPARISON, Op
from flexattn.kernels.hopper_config import ForwardConfig, forward_configs
from flexattn.lower.separate import COLUMNS, ROWS, TILE, levels
from flexattn.runtime.call import Call, Result
from flexattn.runtime.gpu_driver import (
    Function,
    lasting_zeros,
    multiprocessors,
    shared_limit,
    target,
)
from flexattn.runtime.gpu_launch import TYPES, Prepared, Refusal, function, stream_of
from flexattn.runtime.gpu_mods import (
    INTERPRETED,
    ModCode,
    argument_values,
    mod_code,
    on_device,
    watch,
)
from flexattn.runtime.hopper_tables import HopperTable, hopper_table
from flexattn.runtime.launch_triton import like_query, section
from flexattn.runtime.tensor_map import TensorMap, takes

_BOX_BYTES = 128  # of a row of a box: the widest swizzle
_RESERVED = 1024  # bytes of shared memory that the hardware keeps of each CTA
_FEW_KEYS, _NARROW = 2048, 64
_MOST_SPILLED = 64  # bytes of local memory a thread


def prepare(call: Call) -> Prepared | Refusal:
    """The call with the first config that hardly spills, or else the one that spills least."""
    reason = _refused(call)
    if reason is not None:
        return Refusal(reason)
    chosen = None
    for found in _fitting(call, every=False):
        if chosen is None or found.function.spilled_bytes < chosen.function.spilled_bytes:
            chosen = found
        if found.function.spilled_bytes <= _MOST_SPILLED:
            break
    return chosen or Refusal("no tile fits the shared memory")


def candidates(call: Call) -> Iterator[Prepared]:
    """The call with each config that fits."""
    if _refused(call) is None:
        yield from _fitting(call, every=True)


def _fitting(call: Call, every: bool) -> Iterator[_Forward]:
    """every: configs for other calls, too."""
    given, call = call, with_boxes(call)
    code = mod_code(call, "cuda")
    device = call.query.device
    fold = (call.score is None or code.sloped) and call.scale > 0
    for config in forward_configs(call.query.shape[-1], call.value.shape[-1], fold,
                                  not every and crowded(call, fold), every or short_rows(call)):
        plan = HopperPlan(config, code, call.query.dtype, call.block_mask is not None,
                          call.want_lse, call.want_max_scores)
        found = function(plan.key, device, plan.source)
        assert found is not None
        if _fits(config, found.binary.shared, shared_limit(device.index)):
            watch(code, call.score, call.mask)
            yield _Forward(call, plan, found, copied=call is not given)


def _fits(config: ForwardConfig, shared: int, limit: int) -> bool:
    """Whether as many CTAs as intended share a multiprocessor's memory. limit: of a single one."""
    return config.ctas * (shared + _RESERVED) <= limit + _RESERVED


def out_of_place(query: Tensor) -> str | None:
    """Why no Hopper kernel, forward or backward, takes such a tensor."""
    if INTERPRETED or not query.is_cuda or target(query.device.index).arch != 90:
        return "not a Hopper GPU (sm_90)"
    if query.element_size() != 2:
        return f"{str(query.dtype).removeprefix('torch.')} is not a 16-bit type"
    return None


def _refused(call: Call) -> str | None:
    q, v = call.query, call.value
    reason = out_of_place(q)
    if reason is not None:
        return reason
    if q.shape[-1] <= 32 or v.shape[-1] <= 32 or q.shape[-1] % 8 or v.shape[-1] % 8:
        return "heads must have more than 32 columns, a multiple of 8"
    if call.block_mask is not None and call.block_mask.table.runs is not None:
        return "making its tables would wait for the device, which max_runs forbids"
    if not forward_configs(q.shape[-1], v.shape[-1], True):
        return f"no tile for heads of {q.shape[-1]} and {v.shape[-1]} columns"
    return None


def crowded(call: Call, fold_scale: bool) -> bool:
    """Whether the mods spill with three consumers, which need not be compiled to know it: a mask
    compares rows with columns more than once, or a masked score is made of indices and not folded
    (a line over the keys)."""
    if call.mask is None:
        return False
    level = levels(call.mask.graph.nodes)
    compared = sum(n.op in COMPARISON and level[n] == TILE for n in call.mask.graph.nodes)
    if call.score is None or fold_scale:
        return compared > 1
    return compared > 1 or bool(call.score.graph.inputs() & {"q_idx", "kv_idx"})


def short_rows(call: Call) -> bool:
    """Whether several CTAs of one consumer are faster: rows have few blocks of keys, as far as that
    is known without waiting for the device. The mask wants something of rows and of columns to be
    equal, as masks of documents do; or heads are narrow and there are few keys, or the mask leaves
    no room for three consumers."""
    if call.mask is None:
        return False
    level = levels(call.mask.graph.nodes)
    wanted = [call.mask.graph.output("mask")]
    for n in wanted:
        if n.op is Op.AND:
            wanted += n.args
    if any(n.op is Op.EQ and {level[a] for a in n.args} == {ROWS, COLUMNS} for n in wanted):
        return True
    narrow = max(call.query.shape[3], call.value.shape[3]) <= _NARROW
    return narrow and (call.key.shape[2] <= _FEW_KEYS or crowded(call, True))


def with_boxes(call: Call) -> Call:
    """The call with tensors that TMA takes (copies where need be), mods' ones on its device."""
    q, k, v = (t if takes(t) else t.clone(memory_format=torch.contiguous_format)
               for t in (call.query, call.key, call.value))
    score, mask = (on_device(mod, q.device) for mod in (call.score, call.mask))
    same = q is call.query and k is call.key and v is call.value
    if same and score is call.score and mask is call.mask:
        return call
    return call._replace(query=q, key=k, value=v, score=score, mask=mask)


@dataclass(frozen=True)
class HopperPlan:
    """What the kernel is compiled from, without importing Triton unless it has to be."""

    config: ForwardConfig
    code: ModCode
    dtype: torch.dtype
    sparse: bool
    want_lse: bool
    want_max_scores: bool

    @property
    def key(self) -> str:
        return repr(("hopper forward", self.config, self.code.text, self.code.types, self.dtype,
                     self.sparse, self.want_lse, self.want_max_scores))

    def source(self) -> Source:
        from flexattn.kernels.hopper_forward import Results, hopper_forward
        from flexattn.kernels.hopper_pipeline import Sizes, Table

        config, kind = self.config, TYPES[self.dtype]
        results = Results(f"*{kind}", "i64", "i64", "i64", "i32",
                          "*fp32" if self.want_lse else "constexpr",
                          "*fp32" if self.want_max_scores else "constexpr")
        signature: dict[str, Any] = {
            "q_desc": descriptor_type(kind, 64, config.head_chunk),
            "k_desc": descriptor_type(kind, config.tile_kv, config.head_chunk),
            "v_desc": descriptor_type(kind, config.tile_kv, config.value_dim),
            "results": results, "sizes": Sizes(*["i32"] * 8),
            "table": Table("*i32", "*i32", "*i32", "i32", "i32") if self.sparse else "constexpr",
            "args": self.code.argument_type(), "counter": "*i32", "scale": "fp32",
            "C": "constexpr", "MODS": "constexpr"}
        constants: dict[Any, Any] = {"C": config, "MODS": load(self.code.text)}
        if not self.sparse:
            constants["table"] = None
        for field, wanted in ((5, self.want_lse), (6, self.want_max_scores)):
            if not wanted:
                constants[3, field] = None
        aligned: dict[tuple[int, ...], int] = {(3, 0): 16, **{(3, i): 8 for i in (1, 2, 3, 4)}}
        options = {"num_warps": 4, "maxnreg": config.entry_registers}
        return Source(hopper_forward, signature, constants, aligned, options)


def descriptor_type(kind: str, rows: int, columns: int) -> str:
    """A TMA descriptor's type in a kernel's signature."""
    from triton.experimental.gluon import language as gl

    box = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(box, getattr(gl, _GLUON_TYPES[kind]))
    return f"tensordesc<{kind}{box},{layout!r}>"


_GLUON_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_VARIES = object()  # among a launch's values, for one that the prepared call does not know
_COUNTER_BYTES = 8
_counters: dict[tuple[int, int], int] = {}


def _counter(tensor: Tensor, stream: int) -> Tensor | int:
    """Two zeros, or their address, which a launch leaves as it found them; launches of a stream
    share them."""
    if torch.cuda.is_current_stream_capturing():  # its replays may overlap with other streams
        return tensor.new_zeros(2, dtype=torch.int32)
    key = tensor.get_device(), stream
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = lasting_zeros(_COUNTER_BYTES)
    return found


class _Forward:
    """A prepared call."""

    def __init__(self, call: Call, plan: HopperPlan, function: Function, copied: bool) -> None:
        """copied: whether calls that agree with this one have tensors that TMA does not take."""
        q, k, v = call.query, call.key, call.value
        self.plan, self.function, config = plan, function, plan.config
        self._copied = copied
        box = _BOX_BYTES // q.element_size()
        self._maps = [TensorMap(t, rows, min(columns, box)) for t, rows, columns in (
            (q, 64, config.head_chunk), (k, config.tile_kv, config.head_chunk),
            (v, config.tile_kv, config.value_dim))]
        self._heads = [[*t.shape, *t.stride()] for t in (q, k, v)]
        row_tiles = -(-q.shape[2] // config.tile_q)
        self._sizes = [q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.shape[1] // k.shape[1],
                       int(k.shape[0] > 1), row_tiles, section(call)]
        tiles = row_tiles * q.shape[0] * q.shape[1]
        self._grid = (min(tiles, config.ctas * multiprocessors(q.get_device())), 1, 1)
        if config.ctas > 1:
            function.share()
        out = like_query(q, v.shape[-1])
        self._out = out.shape, out.stride()
        self._values, self._slots = self._template(call, out)

    def _template(self, call: Call, out: Tensor) -> tuple[list[Any], list[int]]:
        """The values of a launch, and the places of those that vary from call to call."""
        values: list[Any] = []
        for facts in self._heads:
            values += [_VARIES, *facts]
        values += [_VARIES, *out.stride()[:3], out.shape[3]]
        values += [_VARIES] * (call.want_lse + call.want_max_scores) + self._sizes
        table = self._table(call)
        if table is not None:
            values += [_VARIES] * len(table.values)
        values += [_VARIES if isinstance(x, Tensor) else x
                   for x in argument_values(self.plan.code, call.score, call.mask)]
        values += [_VARIES, call.scale]
        values += [0] * (self.function.parameters - len(values))  # what Triton adds
        return values, [i for i, x in enumerate(values) if x is _VARIES]

    @property
    def tile(self) -> dict[str, int]:
        config = self.plan.config
        return {"tile_q": config.tile_q, "tile_kv": config.tile_kv, "stages": config.stages,
                "consumers": config.consumers, "ctas": config.ctas}

    @property
    def functions(self) -> list[Function]:
        return [self.function]

    def run(self, call: Call) -> Result:
        if self._copied:
            call = with_boxes(call)
        q = call.query
        out = self._new_output(q)
        lse, max_scores = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
                           if wanted else None for wanted in (call.want_lse, call.want_max_scores))
        stream = stream_of(q)
        counter = _counter(q, stream)
        varying: list[Any] = [
            made.at(t.data_ptr())
            for t, made in zip((q, call.key, call.value), self._maps, strict=True)]
        varying += [t.data_ptr() for t in (out, lse, max_scores) if t is not None]
        table = self._table(call)
        if table is not None:
            varying += table.values
        varying.append(self.plan.code.flag.data_ptr())
        for mod in (call.score, call.mask):
            if mod is not None:
                varying += [t.data_ptr() for t in mod.captures]
        varying.append(counter.data_ptr() if isinstance(counter, Tensor) else counter)
        values = self._values.copy()
        for slot, value in zip(self._slots, varying, strict=True):
            values[slot] = value
        self.function.launch(self._grid, values, stream)
        return Result(out, lse, max_scores)

    def _new_output(self, q: Tensor) -> Tensor:
        return torch.empty_strided(*self._out, dtype=q.dtype, device=q.device)

    def _table(self, call: Call) -> HopperTable | None:
        if call.block_mask is None:
            return None
        config = self.plan.config
        return hopper_table(call.block_mask, config.tile_q, config.tile_kv,
                            call.mask is not None)
