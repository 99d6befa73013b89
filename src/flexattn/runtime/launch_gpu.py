"""A validated call on a GPU: which kernel serves it, and its launch.

In: a runtime.call.Call. Out: its Result, or its Gradients. The kernels are asked in the order of
`FORWARD` or `BACKWARD`; each prepares the call or gives a `Refusal` that says why not. What was
chosen for a call is found again by everything it depends on, so that a call in the steady state
only looks it up, allocates, and launches.

With FLEXATTN_CHECK=1 every call waits for its kernel and raises what it reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexattn.errors import DeviceError, DtypeError, message
from flexattn.runtime import (
    autotune,
    gpu_mods,
    launch_hopper,
    launch_hopper_backward,
    launch_triton,
    launch_triton_backward,
    launch_triton_decode,
    triton_backward_plan,
)
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.runtime.gpu_launch import Prepared, PreparedBackward, Refusal, on
from flexattn.runtime.gpu_mods import mod_key

FORWARD: dict[str, Callable[[Call], Prepared | Refusal]] = {
    "triton decode": launch_triton_decode.prepare,
    "hopper": launch_hopper.prepare,
    "triton": launch_triton.prepare,
}
BACKWARD: dict[str, Callable[..., PreparedBackward | Refusal]] = {
    "hopper": launch_hopper_backward.prepare,
    "triton": launch_triton_backward.prepare,
}
_TUNED: dict[Any, Callable[..., Iterator[Any]]] = {
    module.prepare: module.candidates
    for module in (launch_triton_decode, launch_hopper, launch_triton, launch_hopper_backward,
                   launch_triton_backward)}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHECK = os.environ.get("FLEXATTN_CHECK") == "1"
_MOST_PREPARED = 4096


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a call, and why those before it do not."""

    kernel: str
    prepared: Any  # a Prepared or a PreparedBackward
    refusals: tuple[tuple[str, str], ...]
    keep: Any  # the mods' graphs, by whose identity the call was found; no tensors


_choices: dict[tuple, Choice] = {}
_backwards: dict[tuple, Choice] = {}


def forward(call: Call) -> Result:
    """out, and lse and max_scores where wanted."""
    gpu_mods.check()
    if not (call.query.numel() and call.value.numel()):
        return _nothing_attended(call)
    with on(call.query.device):
        return _run(launch_triton.with_rows(call))


def _run(call: Call) -> Result:
    result = choice(call).prepared.run(call)
    if _CHECK:
        torch.cuda.synchronize()
        gpu_mods.check()
    return result


def backward(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """Gradients of the call's tensors."""
    if not (call.query.numel() and call.value.numel()):
        return _no_gradients(call)
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    with on(call.query.device):
        chosen = backward_choice(call, result, d_out, d_lse)
        return chosen.prepared.run(call, result, d_out, d_lse)


def backward_choice(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Choice:
    """The kernel of a call's backward, prepared."""
    key = (*_key(call), d_out.stride(), d_out.data_ptr() & 15, d_lse is None,
           triton_backward_plan.deterministic(call))
    return _backwards.get(key) or _kept(_backwards, key, call,
                                        _served(BACKWARD, call, result, d_out, d_lse))


def choice(call: Call) -> Choice:
    """The kernel of a call with contiguous columns, prepared."""
    if launch_triton_decode.decodes(call):
        tuned = autotune.magnitude(call.key.shape[2]) if autotune.asked(call) else None
        found = _found((*launch_triton_decode.key(call), tuned), call)
        if found.kernel == "triton decode":
            return found
    return _found(_key(call), call)


def _found(key: tuple, call: Call) -> Choice:
    return _choices.get(key) or _kept(_choices, key, call, _chosen(call))


def _kept(choices: dict[tuple, Choice], key: tuple, call: Call, found: Choice) -> Choice:
    """What was just chosen, for later calls, too, unless they can find a faster one."""
    if not autotune.postponed(call):
        if len(choices) >= _MOST_PREPARED:
            choices.clear()
        choices[key] = found
    return found


def _chosen(call: Call) -> Choice:
    if call.query.dtype not in _DTYPES:
        raise DtypeError(message("GPU kernels have no such dtype.",
                                 expected="float16, bfloat16 or float32",
                                 got=str(call.query.dtype),
                                 remedy="convert the tensors, or run them on the CPU"))
    return _served(FORWARD, call)


def _served(kernels: Mapping[str, Callable[..., Any]], call: Call, *more: Any) -> Choice:
    """By the fastest kernel and tile if the call asks for it, or by the first that takes it."""
    if not autotune.asked(call) or autotune.postponed(call):
        return _first(kernels, call, *more)

    def candidates() -> Iterator[autotune.Candidate]:
        for name, prepare in kernels.items():
            yield from ((name, found) for found in _TUNED[prepare](call, *more))

    found = autotune.fastest(autotune.facts_of(call, kernels, *more), candidates,
                             lambda prepared: prepared.run(call, *more))
    if found is None:
        return _first(kernels, call, *more)  # which says why
    return Choice(*found, (), _graphs(call))


def _graphs(call: Call) -> list[Any]:
    return [mod.graph for mod in (call.score, call.mask) if mod is not None]


def _first(kernels: Mapping[str, Callable[..., Any]], call: Call, *more: Any) -> Choice:
    """The first kernel that takes a call."""
    refusals: list[tuple[str, str]] = []
    for name, prepare in kernels.items():
        prepared = prepare(call, *more)
        if not isinstance(prepared, Refusal):
            return Choice(name, prepared, tuple(refusals), _graphs(call))
        refusals.append((name, prepared.reason))
    raise _no_kernel(refusals)


def _no_kernel(refusals: list[tuple[str, str]]) -> DeviceError:
    return DeviceError(message("No GPU kernel takes this call.", expected="a kernel that fits",
                               got="; ".join(f"{name}: {why}" for name, why in refusals)))


def _key(call: Call) -> tuple:
    """Everything that a prepared launch depends on."""
    q, k, v = call.query, call.key, call.value
    return (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype,
            q.get_device(), q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, call.scale,
            call.want_lse, call.want_max_scores, mod_key(call.score), mod_key(call.mask),
            _mask_key(call), q.dtype is torch.float32
            and torch.get_float32_matmul_precision(), autotune.asked(call))


def _mask_key(call: Call) -> tuple | None:
    mask = call.block_mask
    return None if mask is None else (mask.shape[:2], mask.BLOCK_SIZE, mask.table.runs is None)


def _nothing_attended(call: Call) -> Result:
    """Without keys (or queries, or columns) every row is a fully masked one."""
    q = call.query

    def rows(wanted: bool) -> Tensor | None:
        return q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32) if wanted else None

    return Result(q.new_zeros(*q.shape[:3], call.value.shape[-1]), rows(call.want_lse),
                  rows(call.want_max_scores))


def _no_gradients(call: Call) -> Gradients:
    captures = call.score.captures if call.score else ()
    query, key, value = (torch.zeros_like(t) for t in (call.query, call.key, call.value))
    return Gradients(query, key, value, tuple(
        torch.zeros_like(t) if t.requires_grad else None for t in captures))
