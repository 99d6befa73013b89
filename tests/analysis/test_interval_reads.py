"""Minima and maxima of captured tensors over ranges of indices, against every element read."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexattn.analysis import interval_reads
from flexattn.analysis.bounds import Interval, point
from flexattn.analysis.interval_reads import RangeTable, Reads, aligned_span

DTYPES = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32,
          torch.bfloat16)


def random_tensor(rng, dtype, *shape):
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point:
        values = torch.randn(shape).to(dtype)
        return torch.where(torch.rand(shape) < 0.02, math.nan, values) if rng.random() < 0.5 else (
            values)
    return torch.randint(0 if dtype is torch.uint8 else -100, 100, shape).to(dtype)


def place(index, size):
    return min(max(index + size if index < 0 else index, 0), size - 1)


def expected(tensor, ranges):
    """(least, most, whether there is NaN) of what indices in `ranges` read."""
    read = [tensor[tuple(map(place, at, tensor.shape))].item()
            for at in itertools.product(*(range(lo, hi + 1) for lo, hi in ranges))]
    numbers = [x for x in read if x == x]
    return (min(numbers, default=-math.inf), max(numbers, default=math.inf),
            len(numbers) < len(read))


def random_ranges(rng, tensor, count, width):
    """For each dimension int64 [count] (lo, hi); some are points, some leave the tensor."""
    found = []
    for size in tensor.shape:
        lo = torch.from_numpy(rng.integers(-size - 3, size + 3, count))
        found.append((lo, lo + torch.from_numpy(rng.integers(0, width, count))))
    return found


def check(tensor, got, ranges):
    lo, hi, nan = (torch.as_tensor(x).reshape(-1) for x in got)
    for i in range(len(ranges[0][0])):
        least, most, has_nan = expected(tensor, [(int(a[i]), int(b[i])) for a, b in ranges])
        at = [min(i, len(t) - 1) for t in (lo, hi, nan)]
        assert lo[at[0]] <= least and most <= hi[at[1]], (ranges, i)
        assert bool(nan[at[2]]) or not has_nan
    return lo, hi


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, width", [((40,), 60), ((5, 30), 8), ((3, 4, 9), 4), ((1,), 5)])
def test_reads_hold_all_elements(dtype, shape, width, rng):
    tensor = random_tensor(rng, dtype, *shape)
    ranges = random_ranges(rng, tensor, 30, width)
    check(tensor, Reads([tensor]).interval(0, [Interval(lo, hi) for lo, hi in ranges]), ranges)
    points = [(lo, lo) for lo, _ in ranges]
    check(tensor, Reads([tensor]).interval(0, [point(lo) for lo, _ in points]), points)
    mixed = [*points[:-1], ranges[-1]]
    check(tensor, Reads([tensor]).interval(
        0, [*(point(lo) for lo, _ in points[:-1]), Interval(*ranges[-1])]), mixed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("shape, ranged", [((3000,), (0,)), ((9, 400), (1,)), ((9, 400), (0, 1)),
                                           ((70000,), (0,))])
def test_tables_of_powers_of_two(dtype, shape, ranged, rng, monkeypatch):
    """Tables, also coarse ones, hold all elements; fine ones over every start are exact."""
    monkeypatch.setattr(interval_reads, "_FINE", 1 << 9 if shape[0] < 70000 else 1 << 15)
    tensor = random_tensor(rng, dtype, *shape)
    places, ranges = [], []
    for dim, size in enumerate(shape):
        lo = torch.from_numpy(rng.integers(0, size, 12))
        hi = torch.minimum(lo + torch.from_numpy(rng.integers(0, 90, 12)),
                           torch.tensor(size - 1)) if dim in ranged else lo
        ranges.append((lo, hi))
        places.append(Interval(lo, hi) if dim in ranged else point(lo))
    check(tensor, RangeTable(tensor, ranged).query(places), ranges)


def test_consecutive_ranges_are_exact(rng):
    tensor = torch.from_numpy(rng.integers(-50, 50, (2, 333)))
    for length, size, base in ((333, 16, 1), (300, 64, 16), (400, 128, 32), (20, 50, 1)):
        count = -(-length // size)
        span = aligned_span(torch.arange(count), size, length)
        got = Reads([tensor]).consecutive(0, [point(1), span.interval], 1, span, base)
        for i in range(count):
            part = tensor[1, [place(p, 333) for p in range(i * size, min((i + 1) * size, length))]]
            assert (int(got.lo[i]), int(got.hi[i])) == (int(part.min()), int(part.max()))


def test_whole_tensors():
    reads = Reads([torch.tensor([3, -1, 7]), torch.tensor([1.0, math.nan]), torch.zeros(0)])
    assert reads.whole(0) == Interval(-1, 7)
    assert reads.whole(1).nan is True and reads.whole(2).is_point
