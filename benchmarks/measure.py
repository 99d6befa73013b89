"""Interleaved timing: every round runs each candidate once, so that a machine that slows down
slows all of them, and ratios come from neighbours in time. A round in which another process took
the processor away is run again.

In: candidates by name. Out: `Times` by name. Rejects nothing.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_CALM = 0.02  # share of a round that its threads may have waited for a processor


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


def waited() -> float:
    """Seconds that this process's threads were ready to run and another's ran instead, so far; 0
    where the system does not say (all but Linux)."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds * 1e-9


def interleaved(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15,
                min_seconds: float = 0.02, device: str = "cpu") -> dict[str, Times]:
    """Times of every candidate. Each is warmed up and then called as often in a round as it takes
    to fill `min_seconds`. Of up to four times as many rounds, the least disturbed are kept."""
    repeats: dict[str, int] = {}
    for name, run in candidates.items():
        run()
        repeats[name] = max(1, round(min_seconds / clock(run, 1, device)))
    done: list[tuple[float, list[float]]] = []
    calm = 0
    while calm < rounds and len(done) < 4 * rounds:
        before, start = waited(), time.perf_counter()
        seconds = [clock(run, repeats[name], device) for name, run in candidates.items()]
        share = (waited() - before) / (time.perf_counter() - start)
        done.append((0.0 if share < _CALM else share, seconds))
        calm += share < _CALM
    kept = sorted(done, key=lambda one: one[0])[:rounds]
    return {name: Times(times) for name, times in
            zip(candidates, zip(*(seconds for _, seconds in kept), strict=True), strict=True)}
