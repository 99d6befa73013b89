"""What kernels need of a call's mods: the text of their functions, the types and values of their
arguments, and the word in which a kernel reports a captured tensor read out of range.

In: a runtime.call.Call on a GPU (or on the CPU, for Triton's interpreter). Out: `ModCode`, the
same object for all calls that share it, and the values that differ from call to call.
"""

from __future__ import annotations

import ctypes
import os
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.gradient import Gradient, gradient
from flexattn.analysis.runs import too_little_room
from flexattn.errors import IndexOutOfRangeError, message
from flexattn.ir.graph import Graph
from flexattn.ir.ops import Op
from flexattn.lower.triton import Facts, argument_fields, argument_types, lower
from flexattn.lower.triton_facts import ModFacts, bound_of, mod_facts
from flexattn.lower.triton_ops import Target
from flexattn.runtime.call import Call
from flexattn.trace import Mod

_MOST_PROVEN = 4096
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class ModCode:
    """text: the module of device functions. fields and types: of the kernel's argument `args`.
    flag: one int32 that kernels write and the host reads without waiting. loads: the reads that
    d_load0, ... belong to, where the text has a gradient."""

    text: str
    fields: tuple[str, ...]
    types: tuple[str, ...]
    flag: Tensor
    graphs: tuple[Graph | None, Graph | None]
    gradient: Gradient | None = None
    _word: Any = field(default=None, compare=False, repr=False)

    def argument_type(self) -> Any:
        """Of `args`: a named tuple of the types of its fields."""
        return namedtuple("arguments", self.fields)(*self.types)

    @property
    def sloped(self) -> bool:
        """Whether the score mod is a line over the keys."""
        return "def score_line(" in self.text

    @property
    def reported(self) -> int:
        return self._word.value


_codes: dict[tuple, ModCode] = {}


def mod_code(call: Call, target: Target, with_gradient: bool = False) -> ModCode:
    """The code of the call's mods; found again for every call of which the same is proven."""
    score, mask = call.score, call.mask
    fast = call.query.dtype in (torch.float16, torch.bfloat16)
    taken = gradient(score.graph) if with_gradient and score is not None else None
    graph = _with_reads(taken) if taken else None
    of_gradient = Mod(graph, score.captures, score.numbers) if graph and score else None
    facts = Facts(target, fast, *proven(call), _facts(of_gradient, _lengths(call)),
                  report=not with_gradient)
    graphs = (score.graph if score else None, mask.graph if mask else None)
    key = (*graphs, facts, with_gradient)
    found = _codes.get(key)
    if found is None:
        flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=call.query.is_cuda)
        found = _codes[key] = ModCode(
            lower(*graphs, facts, graph), argument_fields(*graphs), argument_types(*graphs, facts),
            flag, graphs, taken, ctypes.c_int32.from_address(flag.data_ptr()))
    return found


Proven = tuple[int, ModFacts, ModFacts]
_proven: dict[tuple, tuple[Proven, Any]] = {}  # with the graphs by whose identity it is found


def proven(call: Call) -> Proven:
    """The bound of all indices, and what is proven of the score mod and of the mask mod."""
    score, mask, q = call.score, call.mask, call.query.shape
    key = (q[:3], call.key.shape[2], mod_key(score), mod_key(mask))
    found = _proven.get(key)
    if found is None:
        if len(_proven) >= _MOST_PROVEN:
            _proven.clear()
        lengths = _lengths(call)
        facts = (bound_of(*lengths.values()), _facts(score, lengths), _facts(mask, lengths))
        found = _proven[key] = facts, (score and score.graph, mask and mask.graph)
    return found[0]


def mod_key(mod: Mod | None) -> tuple | None:
    """What differs between mods besides what captured tensors hold."""
    if mod is None:
        return None
    if not mod.captures:
        return id(mod.graph), mod.numbers
    return id(mod.graph), mod.numbers, *[(t.shape, t.stride()) for t in mod.captures]


def _lengths(call: Call) -> dict[str, int]:
    q = call.query.shape
    return {"b": q[0], "h": q[1], "q_idx": q[2], "kv_idx": call.key.shape[2]}


def _facts(mod: Mod | None, lengths: dict[str, int]) -> ModFacts:
    return ModFacts() if mod is None else mod_facts(
        mod.graph, mod.captures, mod.numbers, lengths)


def _with_reads(taken: Gradient) -> Graph:
    reads = [(f"load{i}", n) for i, n in enumerate(taken.loads)]
    return taken.graph.replace_outputs(*taken.graph.outputs, *reads)


def argument_values(code: ModCode, score: Mod | None, mask: Mod | None) -> list[Any]:
    """The values of `args`, captured tensors as tensors."""
    values: list[Any] = [code.flag]
    for mod in (score, mask):
        if mod is not None:
            for tensor in mod.captures:
                values += [tensor, *tensor.shape, *tensor.stride()]
            values += mod.numbers
    return values


def on_device(mod: Mod | None, device: torch.device) -> Mod | None:
    """The mod with 0-dimensional CPU tensors, which torch lets mods capture, on the device."""
    if mod is None or not mod.captures or all(t.device == device for t in mod.captures):
        return mod
    return Mod(mod.graph, tuple(t.to(device) for t in mod.captures), mod.numbers)


# Reads out of range

_watched: dict[int, tuple[ModCode, Sequence[tuple[int, ...]]]] = {}  # by the identity of code


def watch(code: ModCode, score: Mod | None, mask: Mod | None) -> None:
    """From now on, `check` looks at this code's flag. The shapes it names are those of the call
    prepared last."""
    shapes = [tuple(t.shape) for mod in (score, mask) if mod for t in mod.captures]
    if shapes:
        _watched[id(code)] = code, shapes


def check() -> None:
    """Raises what kernels that have finished reported; waits for nothing."""
    check_rooms()
    for code, _ in tuple(_watched.values()):  # other threads may add to it
        if code.reported:
            _raise(code)


def _raise(code: ModCode) -> None:
    number = code.reported
    code.flag.zero_()
    role = 0 if number > 0 else 1
    graph = code.graphs[role]
    assert graph is not None
    loads = [n for n in graph.nodes if n.op is Op.LOAD]
    slot = loads[min(abs(number), len(loads)) - 1].attr
    first = len(code.graphs[0].captures) if role and code.graphs[0] else 0
    shape = _watched[id(code)][1][first + slot]
    raise IndexOutOfRangeError(message(
        f"a {('score', 'mask')[role]}_mod reads captured tensor {slot} (shape {shape}) out of "
        "range at an attended position", expected="indices inside of the tensor",
        got="an index beyond it, in this call or an earlier one (GPUs report late)",
        remedy="mask such positions out, or clamp the index in the mod; FLEXATTN_CHECK=1 makes "
               "the call that does it raise"))


# Block masks with more runs than room

_rooms: dict[torch.device, tuple[Tensor, Any]] = {}


def room_report(device: torch.device) -> Tensor:
    """int32 (runs, room) of a table that had too little room: kernels write it, the host reads it
    without waiting."""
    if device not in _rooms:
        words = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        _rooms[device] = (words, (ctypes.c_int32 * 2).from_address(words.data_ptr()))
    return _rooms[device][0]


def check_rooms() -> None:
    """The part of `check` that is about block masks."""
    for words, view in _rooms.values():
        if view[0]:
            runs, room = view
            words.zero_()
            raise too_little_room(runs, room)
