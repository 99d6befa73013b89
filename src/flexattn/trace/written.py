"""Traces as text, so that a compiled graph can hold a mod as a constant of an operator.

In: a `Trace`, of which some numbers may be symbolic (a SymInt or SymFloat of torch.compile). Out:
text that says all of it but captured tensors and symbolic numbers; and from that text, captured
tensors and numbers, a `Mod`. The text is data (JSON), never code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flexattn.ir.mod import Mod
from flexattn.ir.ops import Op, dtype_name
from flexattn.trace.tracer import Trace, specialize

_WHOLE, _REAL = "whole", "real"  # what stands for a symbolic number


@dataclass(frozen=True)
class Written:
    """text; captures of the trace; its symbolic numbers, whole ones and reals."""

    text: str
    captures: tuple[Any, ...]
    whole: tuple[Any, ...]
    reals: tuple[Any, ...]


def write(trace: Trace) -> Written:
    kind, result, kinds, entries = trace.key
    whole = tuple(n for n in trace.numbers if isinstance(n, torch.SymInt))
    reals = tuple(n for n in trace.numbers if isinstance(n, torch.SymFloat))
    text = json.dumps({
        "kind": kind, "result": result,
        "captures": [[rank, dtype_name(dtype), grad] for rank, dtype, grad in kinds],
        "entries": [[int(op), dtype_name(dtype), args, attr] for op, dtype, args, attr in entries],
        "numbers": [_WHOLE if isinstance(n, torch.SymInt) else
                    _REAL if isinstance(n, torch.SymFloat) else n for n in trace.numbers],
    }, separators=(",", ":"))
    return Written(text, trace.captures, whole, reals)


@lru_cache(maxsize=1024)
def _read(text: str) -> tuple[tuple, tuple[Any, ...]]:
    """Key and numbers of the trace."""
    data = json.loads(text)
    kinds = tuple((rank, getattr(torch, name), grad) for rank, name, grad in data["captures"])
    entries = tuple((Op(op), getattr(torch, name), tuple(args), attr)
                    for op, name, args, attr in data["entries"])
    return (data["kind"], data["result"], kinds, entries), tuple(data["numbers"])


def needs_gradient(text: str) -> tuple[bool, ...]:
    """Which captures require grad."""
    return tuple(grad for _, _, grad in _read(text)[0][2]) if text else ()


def counts(text: str) -> tuple[int, int, int]:
    """Numbers of captures, symbolic whole numbers and symbolic reals."""
    if not text:
        return 0, 0, 0
    key, numbers = _read(text)
    return len(key[2]), numbers.count(_WHOLE), numbers.count(_REAL)


def reads(text: str, name: str) -> bool:
    """Whether the mod reads an input."""
    return any(op is Op.INPUT and attr == name and i in _used(text)
               for i, (op, _, _, attr) in enumerate(_read(text)[0][3]))


@lru_cache(maxsize=1024)
def _used(text: str) -> frozenset[int]:
    """Entries that the result depends on."""
    _, result, _, entries = _read(text)[0]
    used, found = [result], {result}
    while used:
        new = set(entries[used.pop()][2]) - found
        found |= new
        used += new
    return frozenset(found)


def bind(text: str, captures: Sequence[Tensor], whole: Sequence[int],
         reals: Sequence[float]) -> Mod | None:
    """The mod that was written; None for the empty text. Its symbolic numbers are arguments of
    its code from the first call on."""
    if not text:
        return None
    key, numbers = _read(text)
    values = {_WHOLE: iter(whole), _REAL: iter(reals)}
    filled = tuple(next(values[n]) if n in values else n for n in numbers)
    symbolic = frozenset(i for i, n in enumerate(numbers) if n in values)
    return specialize(Trace(key[0], key, filled, tuple(captures)), symbolic)


class Replayed:
    """A written mask as a mask_mod again: what `bind` gives, for whoever wants a function."""

    def __init__(self, text: str, captures: Sequence[Tensor], whole: Sequence[int],
                 reals: Sequence[float]) -> None:
        self._key, numbers = _read(text)
        self._captures = captures
        values = {_WHOLE: iter(whole), _REAL: iter(reals)}
        self._numbers = [next(values[n]) if n in values else n for n in numbers]

    def __call__(self, *scalars: Any) -> Any:
        _, result, _, entries = self._key
        tape, inputs, made = scalars[0].tape, iter(scalars), []
        for op, dtype, args, attr in entries:
            if op is Op.INPUT:
                made.append(next(inputs))
            elif op is Op.NUMBER:
                made.append(tape.number(self._numbers[attr]))
            elif op is Op.LOAD:
                made.append(tape.load(self._captures[attr], [made[a] for a in args]))
            else:
                made.append(tape.record(op, dtype, tuple(made[a].index for a in args), attr))
        return made[result]
