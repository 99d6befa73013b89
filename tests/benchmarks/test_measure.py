"""Interleaving, medians and ratios, on times that are known."""

from __future__ import annotations

import pytest

from benchmarks.measure import Times, interleaved


def test_rounds_take_turns() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
                        rounds=3, min_seconds=0.0)
    assert calls[4:] == ["a", "b"] * 3
    assert all(len(t.rounds) == 3 for t in times.values())


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    ours, peer = Times((1.0, 2.0, 10.0)), Times((3.0, 4.0, 10.0))
    assert peer.slower_than(ours) == 2.0
    assert peer.median == 4.0 and peer.best == 3.0


def test_spread_is_a_share_of_the_median() -> None:
    assert Times((2.0,) * 8).spread == 0.0
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)).spread == pytest.approx(1.0)
    assert Times((1.0, 2.0)).spread == pytest.approx(1 / 1.5)
