"""Traces as text, so that a compiled graph can hold a mod as a constant of an operator.

In: a `Trace`, of which some numbers may be symbolic (a SymInt or SymFloat of torch.compile). Out:
text that says all of it but captured tensors and the numbers kept apart: symbolic ones, and those
that the caller expects to vary. Of these, whole ones are arguments of their own, and a real one is
a captured scalar tensor, which a device can read without the host. And from that text, tensors and
whole numbers, a `Mod`. The text is data (JSON), never code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flexattn.ir.mod import Mod
from flexattn.ir.ops import INTEGERS, Op, dtype_name
from flexattn.trace.tracer import Trace, specialize

_WHOLE = "whole"  # stands for a whole number that is kept apart
_SCALAR = (0, torch.float64, False)  # the kind of capture that a real number is


@dataclass(frozen=True)
class Written:
    """text; captures of the trace; reals, to be given as float64 scalars after the captures; whole
    numbers."""

    text: str
    captures: tuple[Any, ...]
    reals: tuple[Any, ...]
    whole: tuple[Any, ...]


NOTHING = Written("", (), (), ())


def write(trace: Trace, varies: Callable[[Any], bool] = lambda number: False) -> Written:
    """varies: numbers that are kept apart although they are known; none that has to be known (a
    divisor of integers), and none that is infinite."""
    kind, result, kinds, entries = trace.key
    known = _to_be_known(entries, _reached(entries, result))
    apart = [isinstance(n, (torch.SymInt, torch.SymFloat)) or (
        type(n) in (int, float) and i not in known and math.isfinite(n) and varies(n))
        for i, n in enumerate(trace.numbers)]
    whole = [isinstance(n, (int, torch.SymInt)) for n in trace.numbers]
    slots = {i: len(kinds) + slot for slot, i in enumerate(
        i for i in range(len(whole)) if apart[i] and not whole[i])}
    text = json.dumps({
        "kind": kind, "result": result,
        "captures": [[rank, dtype_name(dtype), grad]
                     for rank, dtype, grad in (*kinds, *[_SCALAR] * len(slots))],
        "entries": [[int(Op.LOAD), dtype_name(dtype), (), slots[attr]]
                    if op is Op.NUMBER and attr in slots else
                    [int(op), dtype_name(dtype), args, attr] for op, dtype, args, attr in entries],
        "numbers": [n if not apart[i] else _WHOLE if whole[i] else 0.0
                    for i, n in enumerate(trace.numbers)],
    }, separators=(",", ":"))
    numbers = list(enumerate(trace.numbers))
    return Written(text, trace.captures, tuple(n for i, n in numbers if i in slots),
                   tuple(n for i, n in numbers if apart[i] and whole[i]))


def _to_be_known(entries: Sequence[tuple], used: frozenset[int]) -> set[int]:
    """Slots of numbers that code is made for, since it divides integers quickly by what is known,
    and of those that are not used."""
    slot_of: dict[int, int] = {}
    known = set()
    for i, (op, dtype, args, attr) in enumerate(entries):
        if op is Op.NUMBER:
            slot_of[i] = attr
            if i not in used:
                known.add(attr)
        elif op is Op.CAST and args[0] in slot_of:
            slot_of[i] = slot_of[args[0]]
        elif op in (Op.FLOORDIV, Op.MOD) and dtype in INTEGERS and args[1] in slot_of:
            known.add(slot_of[args[1]])
    return known


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


def count_whole(text: str) -> int:
    """How many whole numbers are kept apart."""
    return _read(text)[1].count(_WHOLE) if text else 0


def reads(text: str, name: str) -> bool:
    """Whether the mod reads an input."""
    return any(op is Op.INPUT and attr == name and i in _used(text)
               for i, (op, _, _, attr) in enumerate(_read(text)[0][3]))


@lru_cache(maxsize=1024)
def _used(text: str) -> frozenset[int]:
    """Entries that the result depends on."""
    _, result, _, entries = _read(text)[0]
    return _reached(entries, result)


def _reached(entries: Sequence[tuple], result: int) -> frozenset[int]:
    used, found = [result], {result}
    while used:
        new = set(entries[used.pop()][2]) - found
        found |= new
        used += new
    return frozenset(found)


def bind(text: str, captures: Sequence[Tensor], whole: Sequence[int]) -> Mod | None:
    """The mod that was written; None for the empty text. Numbers kept apart are arguments of its
    code from the first call on."""
    if not text:
        return None
    key, numbers = _read(text)
    apart = frozenset(i for i, n in enumerate(numbers) if n == _WHOLE)
    return specialize(Trace(key[0], key, _filled(numbers, whole), tuple(captures)), apart)


def _filled(numbers: tuple[Any, ...], whole: Sequence[int]) -> tuple[Any, ...]:
    given = iter(whole)
    return tuple(next(given) if n == _WHOLE else n for n in numbers)


class Replayed:
    """A written mask as a mask_mod again: what `bind` gives, for whoever wants a function."""

    def __init__(self, text: str, captures: Sequence[Tensor], whole: Sequence[int]) -> None:
        self._key, numbers = _read(text)
        self._captures, self._numbers = captures, _filled(numbers, whole)

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
