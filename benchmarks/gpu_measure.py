"""Interleaved timing on a GPU by events: every round times each candidate, and ratios come from
neighbours in time.

In: candidates by name. Out: `Times` (seconds; one median a round) by name. The GPU's cache is
overwritten before each call, so that inputs come from memory. Host time counts only where the GPU
waits for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from benchmarks.measure import Times

CACHE_BYTES = 256 << 20  # more than any GPU's cache
_MOST_CALLS = 50


def event_seconds(run: Callable[[], object], calls: int, filler: torch.Tensor) -> list[float]:
    """Seconds of each of `calls` calls."""
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    for start, end in pairs:
        filler.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def interleaved(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15,
                min_seconds: float = 0.01) -> dict[str, Times]:
    """Times of every candidate. Each is warmed up and then called as often in a round as it takes
    to fill `min_seconds`."""
    filler = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    calls: dict[str, int] = {}
    for name, run in candidates.items():
        event_seconds(run, 2, filler)
        once = statistics.median(event_seconds(run, 3, filler))
        calls[name] = max(1, min(_MOST_CALLS, round(min_seconds / once)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            found[name].append(statistics.median(event_seconds(run, calls[name], filler)))
    return {name: Times(tuple(times)) for name, times in found.items()}
