"""Forward, lse and gradients of every pair of shapes, dtypes, mods and masks, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.pairs import ROUNDING, Case, dense, error, ours, pairwise, weights_of

FACTOR = 1.5  # of the error of eager attention in the same dtype


@pytest.mark.parametrize("case", list(pairwise()), ids=str)
def test_no_worse_than_eager(case: Case, rng, warmed) -> None:
    inputs, weights, mods = case.inputs(), weights_of(case), case.mods()
    exact = dense(case, inputs, weights, mods, torch.float64).tensors
    eager = dense(case, inputs, weights, mods, case.torch_dtype).tensors
    found = ours(case, inputs, weights, mods).tensors
    worse = {}
    for name, tensor in found.items():
        off, allowed = error(tensor, exact[name]), error(eager[name], exact[name])
        if not off <= FACTOR * allowed + ROUNDING:
            worse[name] = f"{off:.2e}, eager {allowed:.2e}"
    assert not worse
