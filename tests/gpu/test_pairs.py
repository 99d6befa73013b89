"""Forward, lse and gradients of every pair of shapes, dtypes, mods and masks, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.gpu.pairs import (
    HALF_UNIT,
    ROUNDING,
    Case,
    Results,
    dense,
    error,
    finite_peak,
    moved_by_delta,
    ours,
    pairwise,
    weights_of,
)

FACTOR = 1.5  # of the error of eager attention in the same dtype
DEVIATIONS = 4  # of what rounding in delta changes


@pytest.mark.parametrize("case", list(pairwise()), ids=str)
def test_no_worse_than_eager(case: Case, rng, warmed) -> None:
    assert_no_worse(case, grads=True)


def test_wide_heads_in_float32(rng) -> None:
    assert_no_worse(Case((576, 512), (64, 1024), "softcap", "causal", "float32", (1, 3), "plain"),
                    grads=False)


def assert_no_worse(case: Case, grads: bool, of_lse: bool = True) -> None:
    """of_lse: the loss depends on lse."""
    inputs, mods = case.inputs(), case.mods()
    of_out, of_rows = weights_of(case)
    weights = (of_out, of_rows if of_lse else None)
    exact = dense(case, inputs, weights, mods, torch.float64).tensors
    eager = dense(case, inputs, weights, mods, case.torch_dtype).tensors
    found = ours(case, inputs, weights, mods, grads).tensors
    by_delta = moved_by_delta(case, inputs, weights, mods, Results(exact)) if grads else {}
    worse = {}
    rounding = ROUNDING + HALF_UNIT * finite_peak(exact["lse"])
    for name, tensor in found.items():
        off, allowed = error(tensor, exact[name]), error(eager[name], exact[name])
        allowed = math.hypot(allowed, DEVIATIONS * by_delta.get(name, 0.0))
        if not off <= FACTOR * allowed + rounding:
            worse[name] = f"{off:.2e}, eager {allowed:.2e}"
    assert not worse


@pytest.mark.parametrize("score", ["alibi", "bias", "pair_bias", "buckets"])
def test_deterministic_gradients_have_the_same_bits(score: str, rng) -> None:
    case = Case((64, 64), (1000, 1000), score, "causal", "bfloat16", (2, 4), "plain")
    inputs, weights, mods = case.inputs(), weights_of(case), case.mods()
    first, *others = (ours(case, inputs, weights, mods, deterministic=True).tensors
                      for _ in range(4))
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
