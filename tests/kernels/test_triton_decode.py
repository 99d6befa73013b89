"""The decoding kernels compiled without a GPU for Ampere, Hopper, Blackwell and CDNA3, and how
keys are dealt out."""

from __future__ import annotations

import math
import re

import pytest
import torch

from flexattn.compile_triton import Target, compiled
from flexattn.kernels.decode_config import decode_configs, number_of_splits
from flexattn.kernels.triton_config import ForwardFacts, chunk_of
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_mods import mod_code
from flexattn.runtime.launch_triton_decode import CombinePlan, DecodePlan
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod

TARGETS = {"sm_80": Target("cuda", 80, 32), "sm_90": Target("cuda", 90, 32),
           "sm_100": Target("cuda", 100, 32), "gfx942": Target("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SLOPES, LAST = torch.ones(4), torch.zeros(1, dtype=torch.int64)


def capped_alibi(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh((score + SLOPES[h] * (kv_idx - q_idx)) / 20)


def causal_at_the_end(b, h, q_idx, kv_idx):
    return q_idx + LAST[0] >= kv_idx


DECODE = {  # score mod, mask mod, head_dim, value_dim, dtype, rows
    "plain 128": (None, None, 128, 128, torch.bfloat16, 4),
    "mods 576/512": (capped_alibi, causal_at_the_end, 576, 512, torch.float16, 64),
}


def decode(target, case):
    """The binary of the first config that fits, and its config."""
    score_mod, mask_mod, head_dim, value_dim, dtype, rows = DECODE[case]
    q = torch.empty(2, 4, 1, 64, dtype=dtype)
    call = Call(q, q, q, 1.0, score_mod and specialize(trace_score_mod(score_mod)),
                mask_mod and specialize(trace_mask_mod(mask_mod)))
    where = TARGETS[target]
    code = mod_code(call, where.backend)
    for config in decode_configs(where.backend, head_dim, value_dim, dtype.itemsize, rows):
        facts = ForwardFacts(head_dim, value_dim, chunk_of(head_dim), chunk_of(value_dim),
                             config.tile_q, config.tile_kv, sparse=mask_mod is not None,
                             fold=score_mod is None)
        plan = DecodePlan(facts, code, config, dtype, True, True, False, split=True)
        binary = compiled(plan.source(), where)
        if binary.shared <= SHARED[target]:
            return binary, config
    raise AssertionError("no config fits")


@pytest.mark.parametrize("case", DECODE)
@pytest.mark.parametrize("target", TARGETS)
def test_decode(target, case):
    binary, config = decode(target, case)
    assert len(binary.code) > 1000 and binary.threads == config.warps * TARGETS[target].warp_size
    if target == "sm_90":
        text = binary.stages["ptx"]
        assert "cp.async" in text and "mma" in text
        assert not re.search(r"ld\.global\.b16|ld\.global\.u16", text), "keys are read one by one"
        if case == "plain 128":
            at_once = (228 << 10) // (binary.shared + 1024)
            assert at_once * config.warps >= 8, "too few warps on a multiprocessor"


@pytest.mark.parametrize("target", TARGETS)
def test_combine(target):
    plan = CombinePlan(96, torch.float16, True, True)
    assert len(compiled(plan.source(), TARGETS[target]).code) > 1000


def test_splits_fill_the_gpu_in_whole_waves(rng):
    assert number_of_splits(8, 2048, 264) == 33
    assert number_of_splits(128, 128, 264) == 2
    assert number_of_splits(512, 64, 264) == 1
    assert number_of_splits(1, 1, 264) == 1
    for _ in range(50):
        lines, tiles = (int(n) for n in rng.integers(1, 400, 2))
        splits = number_of_splits(lines, tiles, 264)
        waves, longest = math.ceil(lines * splits / 264), math.ceil(tiles / splits)
        assert 1 <= splits <= tiles
        assert waves * longest <= math.ceil(lines / 264) * tiles
        assert waves * longest <= 2 * max(lines * tiles / 264, 1) + 2 * waves
        assert splits == min(range(1, min(tiles, 264) + 1), key=lambda n: (
            math.ceil(lines * n / 264) * (math.ceil(tiles / n) + 2)))
