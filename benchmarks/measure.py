"""Interleaved timing: every round runs each candidate once, so that a machine that slows down
slows all of them, and ratios come from neighbours in time.

In: candidates by name. Out: `Times` by name. Rejects nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate, one entry a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        if len(self.rounds) < 4:
            return (max(self.rounds) - min(self.rounds)) / self.median
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / self.median

    def slower_than(self, other: Times) -> float:
        """The median over rounds of this candidate's time divided by the other's."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def clock(run: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of one call, averaged over `repeats`."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15,
                min_seconds: float = 0.02, device: str = "cpu") -> dict[str, Times]:
    """Times of every candidate. Each is warmed up and then called as often in a round as it takes
    to fill `min_seconds`."""
    repeats: dict[str, int] = {}
    for name, run in candidates.items():
        run()
        repeats[name] = max(1, round(min_seconds / clock(run, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(clock(run, repeats[name], device))
    return {name: Times(tuple(values)) for name, values in seconds.items()}
