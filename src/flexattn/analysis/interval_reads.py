"""Intervals of captured tensors over ranges of indices: minima and maxima of ranges.

In: the captured tensors, and for each read an Interval per index. Out: an Interval of the values.
An index is taken as `ir.evaluate` does: negative ones count from the end, then it is clamped.
Tables of minima and maxima of ranges whose lengths are powers of two are built when first needed;
a range is covered by two of them in each dimension. Memory is linear, or less, in the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.bounds import (
    Bound,
    Interval,
    both,
    choose,
    maximum,
    minimum,
    point,
    unbounded,
)
from flexattn.ir.ops import FLOATS

Combine = Callable[[Tensor, Tensor], Tensor]

_FINE = 1 << 15  # table entries up to which every start of a range has an entry
_COARSEST = 32  # elements behind one entry of the finest level
_DIRECT = 64  # elements of a range up to which they are read one by one


@dataclass(frozen=True)
class Span:
    """Ranges of positions [lo, hi], ends included, int64 tensors; `size` is the most that one
    covers. `number` is given where every range is the number-th of consecutive ranges of `size`
    positions, cut at `length`."""

    lo: Tensor
    hi: Tensor
    size: int
    number: Tensor | None = None
    length: int = 0

    @property
    def interval(self) -> Interval:
        return point(self.lo) if self.size == 1 else Interval(self.lo, self.hi)


def aligned_span(number: Tensor, size: int, length: int) -> Span:
    """The number-th of consecutive ranges of `size` positions below `length`."""
    lo = number * size
    hi = lo + (size - 1)
    return Span(lo, hi.clamp(max=length - 1) if length % size else hi, size, number, length)


class Reads:
    """The captured tensors of a mod, ready for reads over ranges."""

    def __init__(self, captures: Sequence[Tensor]) -> None:
        self.captures = [t.detach() for t in captures]
        self._tables: dict[tuple[int, tuple[int, ...]], RangeTable] = {}
        self._consecutive: dict[tuple[int, int, int, int], Interval] = {}
        self._whole: dict[int, Interval] = {}

    def interval(self, slot: int, indices: Sequence[Interval]) -> Interval:
        tensor = self.captures[slot]
        if not tensor.numel():
            return point(_zero(tensor.dtype))
        if not any(isinstance(b, Tensor) for i in indices for b in i[:2]) and not all(
                i.is_point for i in indices):
            return self.whole(slot)
        places = [_inside(i, size) for i, size in zip(indices, tensor.shape, strict=True)]
        ranges = tuple(d for d, place in enumerate(places) if not place.is_point)
        if not ranges:
            return _points(_read(tensor, [p.lo for p in places]))
        if tensor.device.type == "cpu":  # an accelerator would have to be waited for
            lengths = [int((places[d].hi - places[d].lo).max()) + 1 for d in ranges]
            if prod(lengths) <= _DIRECT:
                return _one_by_one(tensor, places, dict(zip(ranges, lengths, strict=True)))
        if (slot, ranges) not in self._tables:
            self._tables[slot, ranges] = RangeTable(tensor, ranges)
        return self._tables[slot, ranges].query(places)

    def consecutive(self, slot: int, indices: Sequence[Interval], dim: int, span: Span,
                    base: int) -> Interval:
        """Reads at points, but for dimension `dim`, where consecutive ranges are read; `base` is a
        length that those of most reads are multiples of."""
        tensor = self.captures[slot]
        if not tensor.numel():
            return point(_zero(tensor.dtype))
        values = self.of_blocks(slot, dim, span.size, span.length, base)
        places = [_inside(x, n) for d, (x, n) in enumerate(zip(indices, tensor.shape, strict=True))
                  if d != dim]
        at = [*(place.lo for place in places), span.number]
        lo, hi = (_restored(_read(v, at), tensor.dtype) for v in values[:2])
        return _with_nan(lo, hi, _read(values.nan, at)) if values.nan is not None else Interval(
            lo, hi, False)

    def of_blocks(self, slot: int, dim: int, size: int, length: int, base: int) -> Interval:
        """Minima and maxima of consecutive ranges of `size` positions below `length` of dimension
        `dim`, which comes last; made from those of `base` positions where that divides `size`."""
        key = (slot, dim, size, length)
        found = self._consecutive.get(key)
        if found is None:
            if size > base and size % base == 0:
                found = Interval(*coarser(self.of_blocks(slot, dim, base, length, base),
                                          size // base))
            else:
                found = _consecutive(self.captures[slot], dim, size, length)
            self._consecutive[key] = found
        return found

    def whole(self, slot: int) -> Interval:
        """All values of a tensor; on an accelerator, where that would wait for it, any value."""
        tensor = self.captures[slot]
        if tensor.device.type != "cpu":
            return unbounded(tensor.dtype)
        if not tensor.numel():
            return point(_zero(tensor.dtype))
        if slot not in self._whole:
            flat = tensor.reshape(-1)
            nan = tensor.dtype in FLOATS and bool(flat.isnan().any())
            if nan:
                self._whole[slot] = unbounded(tensor.dtype)
            else:
                ends = _ordered(flat).aminmax()
                self._whole[slot] = Interval(*(_restored(e, tensor.dtype).item() for e in ends))
        return self._whole[slot]


def coarser(fine: Sequence[Any], factor: int) -> list[Any]:
    """Lowest, highest and NaN (or None) of `factor` consecutive ranges together."""
    def grouped(x: Tensor) -> Tensor:
        return _in_groups(x, factor, -(-x.shape[-1] // factor))

    lo, hi, *nan = fine
    return [grouped(lo).amin(-1), grouped(hi).amax(-1),
            *(x if x is None else grouped(x).any(-1) for x in nan)]


def _in_groups(values: Tensor, size: int, count: int) -> Tensor:
    """The last dimension as [count, size]; its last element repeated where it is too short."""
    short = count * size - values.shape[-1]
    if short > 0:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], short)], -1)
    return values.unflatten(-1, (count, size))


def _consecutive(tensor: Tensor, dim: int, size: int, length: int) -> Interval:
    """Minima, maxima and whether there is NaN (None: none) of ranges of `size` elements of
    dimension `dim`, which comes last."""
    values = _in_groups(tensor.movedim(dim, -1)[..., :length], size, -(-length // size))
    if tensor.dtype not in FLOATS:
        return Interval(*_ordered(values).aminmax(dim=-1), None)
    least, most = _without_nan(values)
    return Interval(least.amin(-1), most.amax(-1), values.isnan().any(-1))


class RangeTable:
    """Minima and maxima over ranges of some dimensions of a tensor; the others are read at points.

    Entries of level (k, ...) cover 2^k steps of 2^coarse elements in each ranged dimension, at
    every start where the table is small and ranges are in one dimension, else at multiples of 2^k.
    """

    def __init__(self, tensor: Tensor, ranges: tuple[int, ...]) -> None:
        fixed = [d for d in range(tensor.dim()) if d not in ranges]
        self.order, self.points, self.dtype = [*fixed, *ranges], len(fixed), tensor.dtype
        moved = tensor.permute(self.order)
        size, self.coarse = prod(moved.shape), 0
        while size > _FINE * len(ranges) ** 2 and 2 << self.coarse <= _COARSEST:
            size, self.coarse = size >> len(ranges), self.coarse + 1
        self.every_start = len(ranges) == 1 and size <= 2 * _FINE
        nan = moved.isnan() if tensor.dtype in FLOATS else None
        if nan is not None and tensor.device.type == "cpu" and not nan.any():
            nan = None
        least, most = (moved, moved) if nan is None else _without_nan(moved)
        self.least = self._levels(_ordered(least), torch.minimum)
        self.most = self._levels(_ordered(most), torch.maximum)
        self.nan = None if nan is None else self._levels(_ordered(nan), torch.maximum)

    def _levels(self, values: Tensor, op: Combine) -> Tensor:
        """All levels in one flat tensor; `self.columns` says where each starts and its strides."""
        first = self.points
        for _ in range(self.coarse):
            for dim in range(first, values.dim()):
                values = _halved(values, dim, op)
        self.counts = [max(n - 1, 0).bit_length() + 1 for n in values.shape[first:]]
        made: dict[tuple[int, ...], Tensor] = {}
        rows: list[list[int]] = []
        start = 0
        for level in product(*map(range, self.counts)):
            grown = next((d for d, k in enumerate(level) if k), None)
            if grown is not None:
                below = made[(*level[:grown], level[grown] - 1, *level[grown + 1:])]
                values = (_joined(below, 1 << (level[0] - 1), op) if self.every_start
                          else _halved(below, first + grown, op))
            made[level] = values = values.contiguous()
            rows.append([start, *values.stride()])
            start += values.numel()
        self.columns = torch.tensor(rows, device=values.device).t().contiguous().unbind()
        return torch.cat([found.view(-1) for found in made.values()])

    def query(self, places: Sequence[Interval]) -> Interval:
        moved = [places[d] for d in self.order]
        level: Any = 0  # a tensor from the first place on
        ends = []
        for place, count in zip(moved[self.points:], self.counts, strict=True):
            first, last = place.lo >> self.coarse, place.hi >> self.coarse
            k = _floor_log2(last - first + 1)
            if self.every_start:
                ends.append((first, last - (1 << k) + 1))
            else:
                k = torch.where(1 << k == last - first + 1, k, k + 1)
                ends.append((first >> k, last >> k))
            level = level * count + k
        start, *strides = (_read(column, [level]) for column in self.columns)
        for stride, place in zip(strides, moved[:self.points], strict=False):
            start = start + stride * place.lo
        at = [reduce(lambda total, pair: total + pair[0] * pair[1],
                     zip(strides[self.points:], corner, strict=True), start)
              for corner in product(*ends)]
        lo = reduce(torch.minimum, (_read(self.least, [i]) for i in at))
        hi = reduce(torch.maximum, (_read(self.most, [i]) for i in at))
        lo, hi = _restored(lo, self.dtype), _restored(hi, self.dtype)
        if self.nan is None:
            return Interval(lo, hi)
        nan = reduce(torch.maximum, (_read(self.nan, [i]) for i in at))
        return _with_nan(lo, hi, nan.bool())


def _inside(index: Interval, size: int) -> Interval:
    """The places that an index can mean: from the end where negative, then clamped."""
    if index.is_point:
        place = index.lo
        if isinstance(place, Tensor):
            return point(torch.where(place < 0, place + size, place).clamp(0, size - 1))
        return point(min(max(place + size if place < 0 else place, 0), size - 1))
    lo, hi = index.lo, index.hi
    if isinstance(lo, Tensor) or lo < 0:
        negative, mixed = hi < 0, both(lo < 0, hi >= 0)
        lo = choose(negative, maximum(lo, -size) + size, choose(mixed, 0, lo))
        hi = choose(negative, maximum(hi, -size) + size, choose(mixed, size - 1, hi))
    lo, hi = (maximum(minimum(b, size - 1), 0) for b in (lo, hi))
    if not isinstance(lo, Tensor) and not isinstance(hi, Tensor):
        lo = torch.tensor(lo)
    return Interval(lo, hi)


def _one_by_one(tensor: Tensor, places: Sequence[Interval], lengths: dict[int, int]) -> Interval:
    """Reads every element of ranges of at most `lengths` elements (the last one repeated)."""
    indices, dims = [], len(lengths)
    axes = list(lengths)
    for d, place in enumerate(places):
        lo = place.lo[(..., *[None] * dims)] if isinstance(place.lo, Tensor) else place.lo
        if d in lengths:
            steps = torch.arange(lengths[d], device=tensor.device)
            steps = steps.view([-1 if axis == d else 1 for axis in axes])
            hi = place.hi[(..., *[None] * dims)] if isinstance(place.hi, Tensor) else place.hi
            lo = minimum(lo + steps, hi)
        indices.append(lo)
    found = _read(tensor, indices).flatten(-dims)
    if tensor.dtype not in FLOATS:
        lo, hi = _ordered(found).aminmax(dim=-1)
        return Interval(_restored(lo, tensor.dtype), _restored(hi, tensor.dtype))
    least, most = _without_nan(found)
    return _with_nan(least.amin(-1).double(), most.amax(-1).double(), found.isnan().any(-1))


def _read(tensor: Tensor, indices: Sequence[Bound]) -> Tensor:
    """tensor[indices], by one flat index."""
    if not indices:
        return tensor
    flat: Bound = 0
    for index, size in zip(indices, tensor.shape, strict=True):
        flat = flat * size + index
    if not isinstance(flat, Tensor):
        return tensor.reshape(-1)[flat]
    return tensor.reshape(-1).index_select(0, flat.reshape(-1)).view(flat.shape)


def _without_nan(values: Tensor) -> tuple[Tensor, Tensor]:
    """NaN replaced by what no minimum, and what no maximum, takes."""
    return (values.nan_to_num(torch.inf, torch.inf, -torch.inf),
            values.nan_to_num(-torch.inf, torch.inf, -torch.inf))


def _points(values: Tensor) -> Interval:
    """Values read at points."""
    found = _restored(_ordered(values), values.dtype)
    if not found.dim() and found.device.type == "cpu":
        value = found.item()
        return point(value) if value == value else unbounded(values.dtype)
    if values.dtype not in FLOATS:
        return point(found)
    return _with_nan(found, found, found.isnan())


def _with_nan(lo: Tensor, hi: Tensor, nan: Tensor) -> Interval:
    empty = nan & ~(lo <= hi)  # nothing but NaN
    return Interval(torch.where(empty, -torch.inf, lo), torch.where(empty, torch.inf, hi), nan)


def _zero(dtype: torch.dtype) -> Bound:
    return False if dtype is torch.bool else 0.0 if dtype in FLOATS else 0


def _ordered(values: Tensor) -> Tensor:
    """In a dtype that has minima and maxima."""
    return values.to(torch.uint8) if values.dtype is torch.bool else values


def _restored(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return values.bool()
    return values.double() if dtype in FLOATS else values.long()


def _halved(values: Tensor, dim: int, op: Combine) -> Tensor:
    """Pairs of neighbours along a dimension combined; an odd last one stays."""
    size = values.shape[dim]
    pairs = op(values.narrow(dim, 0, size // 2 * 2).unflatten(dim, (-1, 2)).select(dim + 1, 0),
               values.narrow(dim, 0, size // 2 * 2).unflatten(dim, (-1, 2)).select(dim + 1, 1))
    return torch.cat([pairs, values.narrow(dim, size - 1, 1)], dim) if size % 2 else pairs


def _joined(values: Tensor, step: int, op: Combine) -> Tensor:
    """Each entry combined with the one `step` further along the last dimension, if there is."""
    size = values.shape[-1]
    if step >= size:
        return op(values, values[..., -1:])
    last = values[..., -1:].expand(*values.shape[:-1], step)
    return op(values, torch.cat([values[..., step:], last], -1))


def _floor_log2(x: Tensor) -> Tensor:
    """Of positive numbers below 2^52."""
    return torch.frexp(x.double()).exponent.long() - 1
