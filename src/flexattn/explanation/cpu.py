"""What explain says of a call on a CPU.

In: a runtime.call.Call. Out: the LLVM IR of its mods on one vector of scores, and the kernels that
serve it. The kernels contain the same instructions, with what does not vary over a row, or over a
tile's columns, hoisted out of the loop.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from flexattn import compile
from flexattn.explanation.report import Kernel
from flexattn.ir.graph import Graph
from flexattn.kernels.cpu_dsl import Emitter, Module, const
from flexattn.kernels.cpu_sites import ColumnSite, RowSite, VectorSite
from flexattn.kernels.tile_config import cpu_backward_tile, cpu_tile, decode_tile
from flexattn.lower.llvm_mod import LlvmMod
from flexattn.runtime import launch_cpu
from flexattn.runtime.call import Call
from flexattn.runtime.cpu_call import STORAGE, index_bound, team_size

LANGUAGE = "LLVM IR"


def code(call: Call) -> dict[str, str]:
    """Role -> IR of a function that applies the mod to one vector."""
    mods = {"score_mod": call.score, "mask_mod": call.mask}
    return {role: mod_code(role, mod.graph, STORAGE[call.query.dtype], index_bound(call))
            for role, mod in mods.items() if mod is not None}


def mod_code(role: str, graph: Graph, storage: str, bound: int) -> str:
    """`role`(scores, captures, numbers, fault, b, h, q_idx, kv_idx): the scores of one vector of
    consecutive keys are replaced, a mask mod stores its bits there."""
    module = Module(compile.host().vector_bits, storage)
    e = module.function(role, ["ptr"] * 4 + ["i64"] * 4, export=True)
    scores, captures, numbers, fault, b, h, q_idx, kv_idx = e.params
    mod = LlvmMod(graph, bound)
    row = RowSite(b, h, q_idx, captures, numbers, fault)
    columns = mod.per_column(e, ColumnSite(b, h, kv_idx, captures, numbers, fault))
    everywhere = const(e.vec("i1"), True)
    site = VectorSite(row, kv_idx, mod.per_row(e, row), columns, everywhere)
    result = mod.per_vector(e, site, _scores(e, graph, scores))
    e.store(result, scores)
    e.ret()
    names = ", ".join(f"%a{i} {name}" for i, name in enumerate(
        ("scores", "captures", "numbers", "fault", "b", "h", "q_idx", "kv_idx")))
    return f"; {names}\n{_SPLAT.sub(_shorter, str(module))}".rstrip()


_SPLAT = re.compile(r"<((\w+) [^,<>]+)(?:, \1)+>")  # a constant vector of equal elements


def _shorter(found: re.Match[str]) -> str:
    return f"splat ({found[1]})"


def _scores(e: Emitter, graph: Graph, scores: Any) -> Any:
    return e.load(scores, e.vector) if graph.outputs[0][0] == "score" else None


def kernels(call: Call) -> tuple[Kernel, ...]:
    """Forward and backward."""
    storage, bits = STORAGE[call.query.dtype], compile.host().vector_bits
    shape = storage, call.query.shape[-1], call.value.shape[-1], bits
    facts = {"processor": compile.host().cpu, "vectors": f"{bits} bits",
             "threads": str(team_size(call))}
    if launch_cpu.kernel(call) == "decode":
        forward = Kernel("forward", "few queries", "kernels/cpu_decode.py",
                         _sizes(decode_tile(bits)), facts)
    else:
        forward = Kernel("forward", "many queries", "kernels/cpu_forward.py",
                         _sizes(cpu_tile(*shape)), facts)
    backward = Kernel("backward", "all queries", "kernels/cpu_backward.py",
                      _sizes(cpu_backward_tile(*shape)), facts)
    return forward, backward


def _sizes(tile: Any) -> dict[str, int]:
    return {name: size for name, size in asdict(tile).items() if name.startswith("tile")}
