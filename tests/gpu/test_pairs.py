"""Forward, lse and gradients of every pair of shapes, dtypes, mods and masks, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.pairs import (
    HALF_UNIT,
    ROUNDING,
    TF32_UNIT,
    Case,
    dense,
    error,
    finite_peak,
    ours,
    pairwise,
    weights_of,
)

FACTOR = 1.5  # of the error of eager attention in the same dtype


@pytest.mark.parametrize("case", list(pairwise()), ids=str)
def test_no_worse_than_eager(case: Case, rng, warmed) -> None:
    inputs, weights, mods = case.inputs(), weights_of(case), case.mods()
    exact = dense(case, inputs, weights, mods, torch.float64).tensors
    eager = dense(case, inputs, weights, mods, case.torch_dtype).tensors
    found = ours(case, inputs, weights, mods).tensors
    worse = {}
    rounding = ROUNDING + HALF_UNIT * finite_peak(exact["lse"])
    for name, tensor in found.items():
        off, allowed = error(tensor, exact[name]), error(eager[name], exact[name])
        if case.dtype == "tf32":  # which cuBLAS does not use for all shapes
            allowed = max(allowed, TF32_UNIT)
        if not off <= FACTOR * allowed + rounding:
            worse[name] = f"{off:.2e}, eager {allowed:.2e}"
    assert not worse
