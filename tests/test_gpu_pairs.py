"""The cases of tests/gpu cover every pair of values, and what they compare with is right: on a CPU
they are run on its kernels."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import pytest
import torch

from tests.gpu import pairs
from tests.gpu.pairs import APART, AXES, Case, dense, error, ours, pairwise, weights_of


def test_every_pair_of_values_occurs():
    found = [astuple(case) for case in pairwise()]
    for (i, first), (j, second) in itertools.combinations(enumerate(AXES.values()), 2):
        pairs = {(case[i], case[j]) for case in found}
        assert pairs == set(itertools.product(first, second)) - APART


@pytest.mark.parametrize("score, mask, layout", list(zip(
    AXES["score"], (*AXES["mask"], "holes"), (*AXES["layout"], *("plain",) * 3), strict=True)))
def test_the_cpu_passes(rng, monkeypatch, score, mask, layout):
    monkeypatch.setattr(pairs, "DEVICE", "cpu")
    case = Case((16, 24), (37, 40), score, mask, "float32", (2, 2), layout)
    inputs, weights, mods = case.inputs(), weights_of(case), case.mods()
    exact = dense(case, inputs, weights, mods, torch.float64).tensors
    found = ours(case, inputs, weights, mods).tensors
    assert set(found) == {"out", "lse", "query", "key", "value"} | {
        f"captured{i}" for i in range(len(mods[2]))}
    assert all(error(found[name], exact[name]) < 1e-5 for name in found)


def test_errors_are_seen():
    exact = torch.tensor([1.0, -torch.inf, 2.0])
    assert error(exact.clone(), exact) == 0.0
    assert error(torch.tensor([1.0, 0.0, 2.0]), exact) == float("inf")
    assert error(torch.tensor([1.0, -torch.inf, float("nan")]), exact) == float("inf")
    assert 0.4 < error(torch.tensor([1.0, -torch.inf, 3.0]), exact) < 0.5
