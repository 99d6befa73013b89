"""What explain says of a call on a GPU: the Triton source of its mods, and the kernel.

In: a runtime.call.Call; its tensors may be on any device, so that a machine without a GPU can show
the code. Out: the text of the generated module; on a GPU also the kernels that serve.
"""

from __future__ import annotations

import torch

from flexattn.analysis.gradient import gradient
from flexattn.explanation.report import Kernel
from flexattn.ir.graph import Graph
from flexattn.ir.mod import Mod
from flexattn.lower.triton import Facts, lower
from flexattn.lower.triton_facts import ModFacts, bound_of, mod_facts
from flexattn.runtime import launch_gpu, launch_triton
from flexattn.runtime.call import Call, Result, like_query

LANGUAGE = "Triton"


def code(call: Call) -> dict[str, str]:
    """Role -> source of the functions a kernel inlines, the gradient's among the score mod's."""
    roles = {"score_mod": call.score, "mask_mod": call.mask}
    return {role: _text(role, mod, call) for role, mod in roles.items() if mod is not None}


def _text(role: str, mod: Mod, call: Call) -> str:
    q, k = call.query, call.key
    lengths = {"b": q.shape[0], "h": q.shape[1], "q_idx": q.shape[2], "kv_idx": k.shape[2]}
    fast, bound = q.element_size() == 2, bound_of(*lengths.values())
    known = mod_facts(mod.graph, mod.captures, mod.numbers, lengths)
    if role == "mask_mod":
        return lower(None, mod.graph, Facts("cuda", fast, bound, mask=known))
    both = _with_reads(mod.graph)
    derived: ModFacts = mod_facts(both, mod.captures, mod.numbers, lengths)
    return lower(mod.graph, None, Facts("cuda", fast, bound, score=known, gradient=derived), both)


def _with_reads(graph: Graph) -> Graph:
    """The gradient with the reads its d_load<i> belong to."""
    found = gradient(graph)
    reads = ((f"load{i}", n) for i, n in enumerate(found.loads))
    return found.graph.replace_outputs(*found.graph.outputs, *reads)


def kernels(call: Call) -> tuple[Kernel, ...]:
    """The kernel that serves, and why those asked before it do not; none without a GPU, since
    they are asked for the device at hand."""
    if not call.query.is_cuda:
        return ()
    found = launch_gpu.choice(launch_triton.with_rows(call))
    file = f"kernels/{found.kernel.replace(' ', '_')}.py"
    if found.kernel in ("triton", "hopper"):
        file = f"kernels/{found.kernel}_forward.py"
    return (_kernel("forward", found, file), _backward(call))


def _kernel(role: str, found: launch_gpu.Choice, file: str) -> Kernel:
    facts = {f"not {name}": reason for name, reason in found.refusals}
    used = found.prepared.functions
    facts |= {"registers of a thread": ", ".join(str(f.registers) for f in used),
              "spilled bytes of a thread": ", ".join(str(f.spilled_bytes) for f in used),
              "bytes of shared memory": ", ".join(str(f.binary.shared) for f in used)}
    return Kernel(role, found.kernel, file, found.prepared.tile, facts)


def _backward(call: Call) -> Kernel:
    """The one that serves gradients as the query lies in memory."""
    out = like_query(call.query, call.value.shape[-1])
    lse = torch.empty(call.query.shape[:3], dtype=torch.float32, device=out.device)
    found = launch_gpu.backward_choice(call, Result(out, lse), out, None)
    return _kernel("backward", found, f"kernels/{found.kernel}_backward.py")
