"""Interleaving, medians and ratios, on times that are known."""

from __future__ import annotations

import pytest

from benchmarks import measure
from benchmarks.measure import Times, interleaved, waited


def test_rounds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "waited", lambda: 0.0)
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
                        rounds=3, min_seconds=0.0)
    assert calls[4:] == ["a", "b"] * 3
    assert all(len(t.rounds) == 3 for t in times.values())


def test_disturbed_rounds_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 99.0, 99.0, 99.0])  # before and after a round
    monkeypatch.setattr(measure, "waited", lambda: next(waits))
    calls: list[int] = []
    times = interleaved({"a": lambda: calls.append(1)}, rounds=3, min_seconds=0.0)
    assert len(calls) == 2 + 5 and len(times["a"].rounds) == 3


def test_a_machine_that_is_never_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(measure, "waited", lambda: next(clock))
    calls: list[int] = []
    times = interleaved({"a": lambda: calls.append(1)}, rounds=3, min_seconds=0.0)
    assert len(calls) == 2 + 12 and len(times["a"].rounds) == 3


def test_waiting_only_grows() -> None:
    before = waited()
    assert 0 <= before <= waited()


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    ours, peer = Times((1.0, 2.0, 10.0)), Times((3.0, 4.0, 10.0))
    assert peer.slower_than(ours) == 2.0
    assert peer.median == 4.0 and peer.best == 3.0


def test_spread_is_a_share_of_the_median() -> None:
    assert Times((2.0,) * 8).spread == 0.0
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)).spread == pytest.approx(1.0)
    assert Times((1.0, 2.0)).spread == pytest.approx(1 / 1.5)
