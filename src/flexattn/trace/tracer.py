"""A user's Python mod -> Graph.

In: a score mod `(score, b, h, q_idx, kv_idx)` or mask mod `(b, h, q_idx, kv_idx)`. The function
runs once on proxies that record a tape; a TorchFunctionMode sees what proxies cannot (captured
tensors indexed by them, factories, in-place writes, `.item()`). Out: a `Trace`, whose hashable key
is the tape without the values of Python numbers, and from it, by `specialize`, a `Mod`: the
simplified graph with its captured tensors and run-time numbers. Rejects, naming the user's line:
Python control flow on traced values, random numbers, in-place writes, unknown operations,
results of the wrong type.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import flexattn.trace.torch_functions  # noqa: F401  gives proxies their operators
from flexattn.errors import DtypeError, Location, TraceError, message
from flexattn.ir.graph import Capture, Graph, Node, cast, const, node
from flexattn.ir.mod import Mod
from flexattn.ir.ops import INDEX_INPUTS, Op, dtype_name
from flexattn.ir.simplify import simplify
from flexattn.trace.compositions import COMPOSED
from flexattn.trace.proxy import (
    NUMBERS,
    Proxy,
    Tape,
    View,
    call_on_proxies,
    contains_proxy,
    scalar_factory,
)
from flexattn.trace.refusals import IN_PLACE, RANDOM, reject_random, reject_read, reject_write

Number = bool | int | float


@dataclass(frozen=True)
class Trace:
    """key: the skeleton (kind, operations, types). numbers: the value of each Python number at
    each occurrence. captures: the captured tensors, in order of first use. asked: names of what
    torch was asked of other than scalars, such as the shape of a captured tensor."""

    kind: str
    key: tuple
    numbers: tuple[Number, ...]
    captures: tuple[Tensor, ...]
    asked: frozenset[str] = frozenset()


_READERS = frozenset(COMPOSED) | {"round"}  # their rules may look at an argument's value


class _Mode(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if contains_proxy(args) or (kwargs and contains_proxy(tuple(kwargs.values()))):
            if kwargs or name in _READERS:
                given = (*args, *kwargs.values())
                self.tape.asked |= {name for value in given if isinstance(value, Tensor)}
            return call_on_proxies(self.tape, func, args, kwargs)
        made = untraced(self.tape, name, args, kwargs)
        if made is not None:
            return made
        self.tape.asked.add(func.__self__.__name__ if name == "__get__" else name)
        return func(*args, **kwargs)


def untraced(tape: Tape, name: str, args: tuple, kwargs: dict) -> Proxy | None:
    """A torch function without a traced argument: refused, or a number, or (None) left to torch."""
    if kwargs.get("out") is not None:
        reject_write(f"{name}, out=")
    if name in RANDOM:
        reject_random(name)
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        reject_write(name)
    if name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        reject_read(f"{name} of a captured tensor")
    return scalar_factory(tape, name, args, kwargs)


def trace_score_mod(fn: Callable, dtype: torch.dtype = torch.float32,
                    device: torch.device | str = "cpu") -> Trace:
    """The trace of `fn(score, b, h, q_idx, kv_idx)` with a score of `dtype`."""
    tape = Tape(torch.device(device))
    score = tape.record(Op.INPUT, dtype, (), "score")
    result = _run(fn, tape, [score, *_index_inputs(tape)], "score_mod")
    if result.dtype is torch.bool or not result.dtype.is_floating_point:
        raise DtypeError(message("A score_mod must return a floating-point score.",
                                 expected=dtype_name(dtype), got=dtype_name(result.dtype),
                                 remedy="a function that says what to keep is a mask_mod",
                                 where=definition(fn)))
    return _finish("score", tape, tape.cast(result, dtype))


def trace_mask_mod(fn: Callable, device: torch.device | str = "cpu") -> Trace:
    """The trace of `fn(b, h, q_idx, kv_idx)`."""
    tape = Tape(torch.device(device), "mask")
    result = _run(fn, tape, _index_inputs(tape), "mask_mod")
    if result.dtype is not torch.bool:
        raise DtypeError(message("A mask_mod must return a bool: True where attended.",
                                 expected="bool", got=dtype_name(result.dtype),
                                 remedy="compare, for example `value != 0`",
                                 where=definition(fn)))
    return _finish("mask", tape, result)


def _index_inputs(tape: Tape) -> list[Proxy]:
    return [tape.record(Op.INPUT, torch.int64, (), name) for name in INDEX_INPUTS]


def _run(fn: Callable, tape: Tape, inputs: list[Proxy], role: str) -> Proxy:
    try:
        # torch.export would take enable_grad for a part of the model.
        with nullcontext() if torch.compiler.is_compiling() else torch.enable_grad(), _Mode(tape):
            tape.running = tape.kind == "score" and torch.is_grad_enabled()
            result = fn(*inputs)
            tape.running = False
    except TypeError:
        _check_signature(fn, inputs, role)
        raise
    if isinstance(result, NUMBERS) or (isinstance(result, Tensor) and not result.dim()):
        result = tape.wrap(result)
    if not isinstance(result, Proxy):
        what = "None" if result is None else f"a {type(result).__name__}"
        if isinstance(result, (Tensor, View)):
            what = f"a tensor of shape {tuple(result.shape)}"
        raise TraceError(message(f"The {role} must return one scalar.", expected="a scalar",
                                 got=what, remedy="index the tensor in every dimension",
                                 where=definition(fn)))
    return result


def _check_signature(fn: Callable, inputs: list[Proxy], role: str) -> None:
    try:
        inspect.signature(fn).bind(*inputs)
    except TypeError as error:
        names = ", ".join((["score"] if role == "score_mod" else []) + list(INDEX_INPUTS))
        raise TraceError(message(f"The {role} does not take the right arguments.",
                                 expected=f"{role}({names})", got=str(error),
                                 where=definition(fn))) from None
    except ValueError:  # a builtin without a signature
        pass


def definition(fn: Any) -> Location | None:
    """Where a mod is written: through partials, methods and callable objects."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = inspect.unwrap(fn)
    if not hasattr(fn, "__code__"):
        fn = getattr(fn, "forward", None) or type(fn).__call__
    code = getattr(fn, "__code__", None)
    return Location(code.co_filename, code.co_firstlineno, code.co_name) if code else None


def _finish(kind: str, tape: Tape, result: Proxy) -> Trace:
    kinds = tuple((t.dim(), t.dtype, t.requires_grad) for t in tape.captures)
    return Trace(kind, (kind, result.index, kinds, tuple(tape.entries)), tuple(tape.numbers),
                 tuple(tape.captures), frozenset(tape.asked))


@dataclass
class Skeleton:
    """What was seen of one trace key: the first numbers, and which slots varied since."""

    numbers: tuple[Number, ...]
    varying: frozenset[int] = frozenset()
    graphs: dict[frozenset[int], Graph] = field(default_factory=dict)


_skeletons: dict[tuple, Skeleton] = {}


def skeleton_of(trace: Trace) -> Skeleton:
    """What was seen of the trace's key; of this trace first, where nothing was."""
    seen = _skeletons.get(trace.key)
    return seen or _skeletons.setdefault(trace.key, Skeleton(trace.numbers))


def specialize(trace: Trace, symbolic: frozenset[int] = frozenset()) -> Mod:
    """Constants for the numbers that never varied, run-time numbers for the others and those in
    `symbolic`.

    Examples:
        >>> mod = specialize(trace_mask_mod(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx))
        >>> print(mod.graph)
        %0 = input int64 kv_idx
        %1 = input int64 q_idx
        %2 = le bool %0 %1
        return mask: %2
    """
    seen = skeleton_of(trace)
    varying = seen.varying | symbolic  # of this call: other threads add to seen.varying
    same = all(map(is_, seen.numbers, trace.numbers))  # as constants of one function are
    if not same and repr(seen.numbers) != repr(trace.numbers):  # 0.0 is not -0.0; NaN is itself
        pairs = zip(seen.numbers, trace.numbers, strict=True)
        varying |= {i for i, (old, new) in enumerate(pairs) if repr(old) != repr(new)}
    if not varying <= seen.varying:
        seen.varying |= varying
    graph = seen.graphs.get(varying)
    if graph is None:
        graph = seen.graphs.setdefault(varying, simplify(_graph(trace, sorted(varying))))
    return Mod(graph, trace.captures, tuple([trace.numbers[i] for i in sorted(varying)]))


def _graph(trace: Trace, varying: list[int]) -> Graph:
    kind, result, kinds, entries = trace.key
    slots = {number: slot for slot, number in enumerate(varying)}
    nodes: list[Node] = []
    for op, dtype, args, attr in entries:
        if op is Op.NUMBER and attr not in slots:
            nodes.append(const(trace.numbers[attr], dtype))
        elif op is Op.CONST:
            nodes.append(const(attr, dtype))
        elif op is Op.CAST:
            nodes.append(cast(nodes[args[0]], dtype))
        else:
            attr = slots[attr] if op is Op.NUMBER else attr
            nodes.append(node(op, *(nodes[a] for a in args), dtype=dtype, attr=attr))
    numbers = tuple(_dtype_of(trace.numbers[i]) for i in varying)
    return Graph(((kind, nodes[result]),), tuple(Capture(*k) for k in kinds), numbers)


def _dtype_of(value: Number) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float64
