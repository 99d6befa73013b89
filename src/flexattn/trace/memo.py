"""A mod is traced again when anything it reads has changed, or when that cannot be told.

In: a mod, and the dtype and device it is traced for. Out: its `Mod`, with this call's captured
tensors. What the mod reads is read at every call (trace.readings) and compared with what it read
when it was traced; captured tensors' shapes and strides belong to that where tracing asked for
them. Always traced: what cannot be told by reading it, and what uses torch on captured tensors
other than by indexing them with traced scalars, since that makes new tensors.
What is remembered holds no tensor and no closure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from flexattn.ir.mod import Mod
from flexattn.trace.readings import Readings, Unknown
from flexattn.trace.tracer import (
    Skeleton,
    Trace,
    skeleton_of,
    specialize,
    trace_mask_mod,
    trace_score_mod,
)

_MOST_KEPT = 256
# What torch may be asked of a captured tensor while a mod is traced: the mod's readings tell it.
_KIND = frozenset({"dtype", "device", "ndim", "dim", "requires_grad", "layout", "result_type",
                   "promote_types", "is_floating_point", "is_neg"})
_SHAPE = frozenset({"shape", "size", "numel", "__len__"})


def score_mod(fn: Callable, dtype: torch.dtype, device: torch.device) -> Mod:
    """What specialize(trace_score_mod(fn, dtype, device)) gives."""
    return _traced(fn, (dtype, device), lambda: trace_score_mod(fn, dtype, device))


def mask_mod(fn: Callable, device: torch.device) -> Mod:
    """What specialize(trace_mask_mod(fn, device)) gives."""
    return _traced(fn, (device,), lambda: trace_mask_mod(fn, device))


@dataclass(frozen=True)
class _Kept:
    """trace: without its captures, which are those at `places` among the tensors read. mod: of the
    skeleton while these of its numbers vary."""

    trace: Trace
    places: tuple[int, ...]
    skeleton: Skeleton
    varying: frozenset[int]
    mod: Mod


_SHAPED = object()  # what was traced for this key asked for shapes: they belong to it
_kept: OrderedDict[tuple, Any] = OrderedDict()
_lock = Lock()


def _traced(fn: Callable, context: tuple, trace: Callable[[], Trace]) -> Mod:
    try:
        if _watched():
            raise Unknown
        read = Readings(fn)
    except Unknown:
        return specialize(trace())
    tensors = read.tensors
    key = (context, torch.get_default_dtype(), *read.key)
    kept = _look(key)
    if kept is _SHAPED:
        key += (_shapes(tensors),)
        kept = _look(key)
    if kept is None:
        return _keep(key, tensors, trace())
    captures = tuple([tensors[i] for i in kept.places])
    if kept.varying != kept.skeleton.varying:  # another of its numbers varies since
        return _keep(key, tensors, replace(kept.trace, captures=captures))
    return Mod(kept.mod.graph, captures, kept.mod.numbers) if captures else kept.mod


def _watched() -> bool:
    """Whether somebody else sees or changes what torch does: a mode, a transform, a compiler."""
    return (torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._is_torch_function_all_disabled()
            or torch._C._functorch.maybe_current_level() is not None
            or torch.compiler.is_compiling())


def _look(key: tuple) -> Any:
    found = _kept.get(key)
    if found is not None and len(_kept) > _MOST_KEPT // 2:  # else nothing has to go soon
        with suppress(KeyError):  # another thread's mods needed the room
            _kept.move_to_end(key)
    return found


def _keep(key: tuple, tensors: list[Tensor], trace: Trace) -> Mod:
    """The mod of a trace, which is remembered if it has no tensor but those that were read."""
    mod = specialize(trace)
    place = {id(tensor): i for i, tensor in enumerate(tensors)}
    if trace.asked <= _KIND | _SHAPE and all(id(tensor) in place for tensor in trace.captures):
        skeleton = skeleton_of(trace)
        kept = _Kept(replace(trace, captures=()), tuple(place[id(t)] for t in trace.captures),
                     skeleton, skeleton.varying, replace(mod, captures=()))
        shapes = _shapes(tensors)
        with _lock:
            if trace.asked & _SHAPE and key[-1:] != (shapes,):
                _kept[key] = _SHAPED
                key += (shapes,)
            _kept[key] = kept
            while len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)
    return mod


def _shapes(tensors: Iterable[Tensor]) -> tuple:
    return tuple((tensor.shape, tensor.stride()) for tensor in tensors)
