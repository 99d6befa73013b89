"""Runs a graph through the LLVM lowering on a whole matrix of scores, without a kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from flexattn import compile as objects
from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import Op
from flexattn.kernels.cpu_dsl import Emitter, Module, Value, const
from flexattn.lower.llvm_mod import FAULT_WORDS, LlvmMod, argument_words

STORED = {torch.float32: "float", torch.float64: "double", torch.float16: "half",
          torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
          torch.uint8: "i8", torch.bool: "i8"}


def rows(graph: Graph, scores: Tensor, captures: Sequence[Tensor] = (),
         numbers: Sequence[bool | int | float] = (), *, b: int = 0, h: int = 0,
         index_bound: int = 2**15, grad: Tensor | None = None,
         attended: Tensor | None = None) -> tuple[dict[str, Tensor], list[int]]:
    """Outputs [Q, KV] of the graph at (b, h), and the fault record. float16 and bfloat16
    outputs come as float32, as the lowering holds them."""
    q_len, kv_len = scores.shape
    lanes = Module(objects.host().vector_bits, _storage(scores)).lanes
    padded = -(-kv_len // lanes) * lanes
    lib = _library(graph, _storage(scores), index_bound)
    out = {name: torch.zeros(q_len, padded, dtype=_plain(n)) for name, n in graph.outputs}
    pad = (0, padded - kv_len)
    inputs = [torch.nn.functional.pad(x.contiguous(), pad).contiguous()
              for x in (scores, scores if grad is None else grad)]
    allowed = torch.ones(q_len, kv_len, dtype=torch.bool) if attended is None else attended
    inputs.append(torch.nn.functional.pad(allowed.to(torch.int8), pad).contiguous())
    tables = [torch.tensor([*words, 0]) for words in argument_words(captures, numbers)]
    fault, scratch = torch.zeros(FAULT_WORDS, dtype=torch.int64), torch.zeros(64 * padded)
    pointers = [t.data_ptr() for t in (*inputs, *tables, fault, scratch, *out.values())]
    lib.function("run", *[ctypes.c_void_p] * len(pointers), *[ctypes.c_long] * 4)(
        *pointers, b, h, q_len, padded)
    return {name: t[:, :kv_len] for name, t in out.items()}, fault.tolist()


def _storage(scores: Tensor) -> str:
    return str(scores.dtype).removeprefix("torch.")


def _plain(n: Node) -> torch.dtype:
    return torch.float32 if n.dtype in (torch.float16, torch.bfloat16) else n.dtype


def _library(graph: Graph, storage: str, index_bound: int) -> objects.Library:
    module = Module(objects.host().vector_bits, storage)
    names = [STORED[_plain(n)] for _, n in graph.outputs]
    e = module.function("run", ["ptr"] * (7 + len(names)) + ["i64"] * 4, export=True)
    scores, grads, allowed, captures, numbers, fault, scratch = e.params[:7]
    b, h, q_len, kv_len = e.params[-4:]
    mod = LlvmMod(graph, index_bound)
    stored: list[Value] = []
    with e.loop(0, kv_len, e.lanes) as column:
        place = dict(b=b, h=h, captures=captures, numbers=numbers, fault=fault)
        for i, x in enumerate(mod.per_column(e, SimpleNamespace(kv_base=column.index, **place))):
            e.store(x, _array(e, scratch, kv_len, i), column.index)
            stored.append(x)
    with e.loop(0, q_len) as row:
        site = SimpleNamespace(q_idx=row.index, **place)
        row_values = mod.per_row(e, site)
        with e.loop(0, kv_len, e.lanes) as column:
            at = e.add(e.mul(row.index, kv_len), column.index)
            kept = [e.load(_array(e, scratch, kv_len, i), x.type, column.index)
                    for i, x in enumerate(stored)]
            lanes = e.compare("ne", e.load(allowed, e.vec("i8"), at), const(e.vec("i8"), 0))
            code = mod.vector_code(e, SimpleNamespace(row=site, kv_base=column.index,
                                                      row_values=row_values, column_values=kept))
            score = e.load(scores, e.vector, at)
            code.give("score", score)
            code.give("grad", e.load(grads, e.vector, at))
            for (name, n), type, out in zip(graph.outputs, names, e.params[7:-4], strict=True):
                x = code.output(name)
                if n.dtype not in (torch.float16, torch.bfloat16) and not n.dtype.is_floating_point:
                    x = _full_width(e, x, n, type)
                e.store(x, out, at)
            code.report(lanes, fault, score)
    e.ret()
    text = str(module)
    return objects.library(f"test lowering {text}", lambda: text, ["run"])


def _array(e: Emitter, scratch: Value, kv_len: Value, i: int) -> Value:
    return e.at(scratch, e.mul(kv_len, const("i64", i)), "i64")


def _full_width(e: Emitter, x: Value, n: Node, type: str) -> Value:
    """bool as a byte, a narrowed int64 as an int64."""
    if x.type == e.vec(type):
        return x
    return e.cast("zext" if n.dtype is torch.bool else "sext", x, e.vec(type))


def index_inputs(q_len: int, kv_len: int, b: int = 0, h: int = 0) -> dict[str, Tensor]:
    """The index inputs of ir.evaluate for a matrix of scores."""
    return {"b": torch.tensor(b), "h": torch.tensor(h), "q_idx": torch.arange(q_len)[:, None],
            "kv_idx": torch.arange(kv_len)}


def is_input(n: Node, name: str) -> bool:
    return n.op is Op.INPUT and n.attr == name
