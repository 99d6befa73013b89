"""Hopper's backward kernel where it alone may serve, against float64: a call that it refuses fails.

Lengths are mostly not multiples of its tiles; captured tensors want no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor

from flexattn.kernels.hopper_backward_config import backward_configs
from flexattn.runtime import launch_gpu, launch_hopper_backward
from tests.gpu.pairs import Case, ours, pairwise, weights_of
from tests.gpu.test_pairs import assert_no_worse

AXES = {
    "dims": ((64, 64),),
    "lengths": ((333, 333), (1, 1500), (1000, 1000), (77, 333), (1500, 77), (1, 77), (128, 256)),
    "score": ("none", "softcap", "frozen_alibi", "frozen_bias", "frozen_reads"),
    "mask": ("none", "causal", "sliding", "documents", "heads", "holes", "scattered"),
    "dtype": ("bfloat16",),
    "heads": ((2, 1), (2, 4), (1, 3)),
    "layout": ("plain", "rows_of_heads", "one_batch"),
}
KINDS = (((64, 64), "bfloat16"), ((128, 128), "bfloat16"), ((128, 128), "float16"),
         ((64, 64), "float16"), ((128, 128), "bfloat16"))
MANY_OPS = [  # they do not fit the registers beside heads of 128
    Case((64, 64), (333, 333), "ten_ops", "none", "float16", (1, 3), "plain"),
    Case((64, 64), (1000, 1000), "ten_ops", "causal", "bfloat16", (2, 4), "rows_of_heads"),
    Case((64, 64), (77, 1500), "ten_ops", "holes", "bfloat16", (2, 1), "one_batch"),
]
RUNS = 200
REPEATED = [
    Case((64, 64), (333, 77), "none", "causal", "bfloat16", (2, 4), "plain"),
    Case((64, 64), (1500, 1500), "softcap", "documents", "float16", (12, 1), "plain"),
    Case((128, 128), (1000, 1000), "none", "none", "bfloat16", (2, 4), "plain"),
    Case((128, 128), (1500, 1500), "none", "documents", "bfloat16", (12, 1), "plain"),
    Case((128, 128), (77, 1500), "frozen_alibi", "holes", "float16", (2, 4), "plain"),
]


def cases() -> list[Case]:
    """Every pair of the axes' values, each in the next one of the kinds."""
    return [replace(case, dims=dims, dtype=dtype)
            for case, (dims, dtype) in zip(pairwise(AXES), cycle(KINDS), strict=False)]


@pytest.fixture(autouse=True)
def only_hopper() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    launch_gpu._backwards.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_gpu, "BACKWARD", {"hopper": launch_gpu.BACKWARD["hopper"]})
        yield
    launch_gpu._backwards.clear()


@pytest.mark.parametrize("case", MANY_OPS + cases(), ids=str)
def test_no_worse_than_eager(case: Case, rng, warmed) -> None:
    assert_no_worse(case, grads=True)


@pytest.mark.parametrize("case", [
    Case((64, 64), (333, 333), "none", "causal", "bfloat16", (2, 4), "plain"),
    Case((128, 128), (1000, 1000), "softcap", "none", "float16", (2, 1), "one_batch"),
], ids=str)
def test_without_a_gradient_of_lse(case: Case, rng, warmed) -> None:
    assert_no_worse(case, grads=True, of_lse=False)


@pytest.fixture(params=["plain", "early", "resident"])
def way(request, monkeypatch) -> None:
    """early: launches overlap. resident: CTAs take tile after tile."""
    monkeypatch.setattr(launch_hopper_backward, "_EARLY", request.param == "early")
    if request.param == "resident":
        monkeypatch.setattr(launch_hopper_backward, "backward_configs", lambda *sizes: tuple(
            replace(config, resident=True) for config in backward_configs(*sizes)))


@pytest.mark.parametrize("case", [*MANY_OPS, *cases()[::4]], ids=str)
def test_each_way_is_no_worse_than_eager(case: Case, rng, way) -> None:
    assert_no_worse(case, grads=True)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_every_run_gives_the_same_sums(case: Case, rng, way) -> None:
    """Races would show; other work keeps the GPU busy in between."""
    inputs, weights, mods = case.inputs(), weights_of(case), case.mods()
    first = ours(case, inputs, weights, mods).tensors
    noise = torch.randn(1024, 1024, device="cuda")
    for run in range(RUNS):
        found = ours(case, inputs, weights, mods).tensors
        if run % 3 == 0:
            noise @= noise / noise.norm()
        for name in ("key", "value"):
            assert torch.equal(found[name], first[name]), f"{name}, run {run}"
        assert_rounds_alike(found["query"], first["query"])


def assert_rounds_alike(x: Tensor, y: Tensor) -> None:
    """Of sums in float32 of the same terms in any order, rounded to a 16-bit type."""
    size = torch.maximum(x.abs(), y.abs()).double()
    allowed = torch.finfo(x.dtype).eps * (size + size.max() / 100)
    assert ((x.double() - y.double()).abs() <= allowed).all()
