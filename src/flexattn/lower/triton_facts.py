"""What is proven of a mod before its code is written: the facts that generated code rests on.

In: a graph, the lengths of the call, the captured tensors and the run-time numbers. Out: hashable
`ModFacts`, coarse enough that a new length or number seldom gives new ones: integers are bounded
by a few powers of two, tensors told apart only by unit strides and by whether offsets fit 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import INTEGERS, Op
from flexattn.lower.integer_ranges import Range, full_range, integer_ranges

_BOUNDS = (1 << 24, 1 << 31, 1 << 63)


class ReadFact(NamedTuple):
    """How the index of a read may leave [0, size) in one dimension."""

    negative: bool = True  # below 0: counts from the end
    below: bool = True  # below -size
    above: bool = True  # size or more

    @property
    def proven(self) -> bool:
        return not (self.below or self.above)


class CaptureFact(NamedTuple):
    """wide: element offsets, here or in a contiguous gradient, need 64 bits. unit: dimensions
    whose stride is 1."""

    wide: bool
    unit: tuple[bool, ...]


class ModFacts(NamedTuple):
    """captures and numbers by slot; reads by LOAD in the order of graph.nodes, then dimension."""

    captures: tuple[CaptureFact, ...] = ()
    numbers: tuple[Range | None, ...] = ()
    reads: tuple[tuple[ReadFact, ...], ...] = ()


def bound_of(*sizes: int) -> int:
    """The least of a few bounds above all sizes."""
    return next(bound for bound in _BOUNDS if max(sizes) < bound)


def leaf_ranges(graph: Graph, index_bound: int,
                numbers: Sequence[Range | None]) -> dict[Node, Range]:
    """Ranges of all integer nodes for 0 <= index inputs < index_bound."""
    known = {n: numbers[n.attr] for n in graph.nodes
             if n.op is Op.NUMBER and n.dtype in INTEGERS and n.attr < len(numbers)}
    return integer_ranges(graph.nodes, index_bound,
                          {n: r for n, r in known.items() if r is not None})


def mod_facts(graph: Graph, captures: Sequence[Tensor], numbers: Sequence[bool | int | float],
              lengths: Mapping[str, int]) -> ModFacts:
    """lengths: how many values b, h, q_idx and kv_idx each take."""
    return ModFacts(tuple(_capture_fact(t) for t in captures),
                    tuple(_coarse(x) for x in numbers),
                    _reads(graph, captures, numbers, lengths))


def _capture_fact(tensor: Tensor) -> CaptureFact:
    reach = sum((size - 1) * abs(stride)
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return CaptureFact(max(reach, tensor.numel()) >= 1 << 31,
                       tuple(stride == 1 for stride in tensor.stride()))


def _coarse(value: bool | int | float) -> Range | None:
    """A range for a run-time integer that later values will likely share."""
    if isinstance(value, (bool, float)):
        return None
    bound = bound_of(abs(value))
    return (-bound, bound) if bound < 1 << 63 else None


def _reads(graph: Graph, captures: Sequence[Tensor], numbers: Sequence[bool | int | float],
           lengths: Mapping[str, int]) -> tuple[tuple[ReadFact, ...], ...]:
    loads = [n for n in graph.nodes if n.op is Op.LOAD]
    if not loads:
        return ()
    known: dict[Node, Range] = {}
    for n in graph.nodes:
        if n.op is Op.INPUT and n.attr in lengths:
            known[n] = (0, lengths[n.attr] - 1)
        elif n.op is Op.NUMBER and n.dtype is torch.int64:
            known[n] = (int(numbers[n.attr]), int(numbers[n.attr]))
    indices = {a for n in loads for a in n.args}
    ranges = known if indices <= known.keys() else integer_ranges(
        graph.nodes, max(lengths.values()), known)
    return tuple(tuple(_read_fact(ranges.get(a, full_range(a.dtype)), size)
                       for a, size in zip(n.args, captures[n.attr].shape, strict=True))
                 for n in loads)


def _read_fact(index: Range, size: int) -> ReadFact:
    low, high = index
    return ReadFact(low < 0, low < -size, high >= size)
