"""The kernels of block masks compiled without a GPU for Ampere, Hopper, Blackwell and CDNA3."""

from __future__ import annotations

import pytest
import torch

from flexattn import masks
from flexattn.analysis.block_sparsity import grid_of
from flexattn.compile_triton import Target, compiled
from flexattn.runtime import launch_block_mask, launch_block_runs
from flexattn.trace import specialize, trace_mask_mod

TARGETS = {"sm_80": Target("cuda", 80, 32), "sm_90": Target("cuda", 90, 32),
           "sm_100": Target("cuda", 100, 32), "gfx942": Target("hip", "gfx942", 64)}
DOCUMENT = torch.arange(1 << 14) // 300
REALS = torch.randn(1 << 14)
MASKS = {"documents": masks.causal_document(DOCUMENT), "natten": masks.natten((128, 128), (13, 13)),
         "hash": lambda b, h, q, k: (q * 7 + k * 13 + h) % 97 < 40,
         "reals": lambda b, h, q, k: REALS[q] * 2 + 1 > REALS[k] - h,
         "offsets": lambda b, h, q, k: q + DOCUMENT[b] >= k}


def plan(mask, target, length=1 << 14):
    """The plan for a target that is not here."""
    mod = specialize(trace_mask_mod(mask))
    grid = grid_of(mod, 2, 2, length, length, 128, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_block_mask, "target", lambda device: target)
        return launch_block_mask._planned(mod, grid, torch.device("cpu"))


COMPILED = [("documents", target) for target in TARGETS] + [
    (name, target) for name in MASKS if name != "documents" for target in ("sm_90", "gfx942")]


@pytest.mark.parametrize("name, target", COMPILED)
def test_kinds(name, target):
    binary = compiled(plan(MASKS[name], TARGETS[target]).source(), TARGETS[target])
    assert binary.code and binary.shared <= 48 << 10


@pytest.mark.parametrize("target", TARGETS)
def test_runs(target):
    for name, types in (("count_runs", launch_block_runs.COUNT),
                        ("count_runs", launch_block_runs.COUNT | launch_block_runs.CHUNKED),
                        ("write_runs", launch_block_runs.WRITE),
                        ("write_runs", launch_block_runs.WRITE | launch_block_runs.BOUNDED),
                        ("write_runs", launch_block_runs.WRITE | launch_block_runs.BOUNDED
                         | launch_block_runs.CHUNKED),
                        ("paint", launch_block_runs.PAINT)):
        assert compiled(launch_block_runs.source(name, types), TARGETS[target]).code


def test_other_lengths_and_values_are_no_new_kernel():
    """The key says lengths, captured values and numbers that vary by their class alone."""
    target = TARGETS["sm_90"]
    keys = {plan(masks.causal_document(torch.arange(length) // size), target, length).key
            for length, size in ((1 << 14, 300), (5000, 7), (1 << 20, 4000))}
    assert len(keys) == 1


def test_integers_of_a_mask_stay_narrow():
    """Positions below 2^24 take 32-bit lanes, also with numbers that were seen to vary."""
    for width in (100, 77, 128):
        def mask(b, h, q_idx, kv_idx, width=width):
            return (q_idx // width == kv_idx // width) | (q_idx % width < kv_idx % width)

        text = plan(mask, TARGETS["sm_90"]).tiles.text
        assert "int64" not in text and "float64" not in text
