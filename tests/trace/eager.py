"""A mod run by torch at many positions, beside the graph the tracer made of it.

Both get the same one-dimensional inputs, one element a position: torch through vmap, so that the
mod sees scalars, the graph through ir.evaluate. What they give must have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexattn.errors import TraceError
from flexattn.ir.evaluate import evaluate
from flexattn.ir.mod import Mod
from flexattn.trace import specialize, trace_score_mod

NAMES = ("score", "b", "h", "q_idx", "kv_idx")
SIZES = {"b": 3, "h": 4, "q_idx": 37, "kv_idx": 41}
POSITIONS = 64


def random_inputs() -> dict[str, Tensor]:
    """Scores around 0 with whole and special values among them; indices below SIZES."""
    score = torch.randn(POSITIONS, dtype=torch.float64) * 3
    score[::7] = score[::7].round()
    score[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    indices = {name: torch.randint(0, n, (POSITIONS,)) for name, n in SIZES.items()}
    return {"score": score, **indices}


def result_dtype(mod: Callable) -> torch.dtype:
    """Of the mod's result on torch's own scalars."""
    score, *indices = torch.tensor(0.5).double(), *(torch.tensor(n - 1) for n in SIZES.values())
    return mod(score, *indices).dtype


def check(mod: Callable, inputs: dict[str, Tensor] | None = None, tolerance: float = 0.0) -> None:
    """The traced mod, and every value it looks at, has torch's dtype and torch's bits.

    mod(score, b, h, q_idx, kv_idx) may return any dtype; score is float64.
    """
    seen: list[torch.dtype] = []

    def wide(*args: Any) -> Any:
        result = mod(*args)
        seen.append(result.dtype)
        return result.double()

    inputs = random_inputs() if inputs is None else inputs
    traced = specialize(trace_score_mod(wide, torch.float64))
    dtype = seen[0]
    expected = torch.vmap(wide)(*(inputs[name] for name in NAMES))
    assert dtype is result_dtype(mod)
    same(run(traced, inputs), expected, tolerance)


def run(traced: Mod, inputs: dict[str, Tensor]) -> Tensor:
    result = evaluate(traced.graph, inputs, traced.captures, traced.numbers)["score"]
    return result.detach().expand(len(inputs["score"]))


def same(got: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    """Bit for bit, signs of zeros included; any NaN equals any NaN."""
    expected = expected.detach()
    if tolerance:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        return
    number = ~expected.isnan()
    assert torch.equal(got.isnan(), ~number)
    assert torch.equal(got[number], expected[number])
    assert torch.equal(got[number].signbit(), expected[number].signbit())


def check_or_both_refuse(mod: Callable, tolerance: float = 0.0) -> bool:
    """check(), where torch has an answer; otherwise the tracer must refuse, too."""
    try:
        result_dtype(mod)
    except (RuntimeError, TypeError, NotImplementedError):
        try:
            trace_score_mod(lambda *args: mod(*args).double(), torch.float64)
        except TraceError:
            return False
        raise AssertionError("torch refuses what the tracer takes") from None
    check(mod, tolerance=tolerance)
    return True
