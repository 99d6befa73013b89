"""The Triton kernels compiled without a GPU for Ampere, Hopper, Blackwell and CDNA3."""

from __future__ import annotations

import re

import pytest
import torch

from flexattn.compile_triton import Target, compiled
from flexattn.kernels.triton_config import (
    BackwardFacts,
    ForwardFacts,
    backward_configs,
    chunk_of,
    forward_configs,
)
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_mods import mod_code
from flexattn.runtime.launch_triton import ForwardPlan
from flexattn.runtime.triton_backward_plan import BackwardPlan
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod

TARGETS = {"sm_80": Target("cuda", 80, 32), "sm_90": Target("cuda", 90, 32),
           "sm_100": Target("cuda", 100, 32), "gfx942": Target("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SLOPES, DOCUMENT = torch.ones(4), torch.zeros(1024)
TABLE = torch.ones(4, 2048, requires_grad=True)


def capped_alibi(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh((score + SLOPES[h] * (kv_idx - q_idx)) / 20)


def relative_bias(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, q_idx - kv_idx + 1024]


def documents(b, h, q_idx, kv_idx):
    return (DOCUMENT[q_idx] == DOCUMENT[kv_idx]) & (q_idx >= kv_idx)


FORWARD = {  # score mod, mask mod, head_dim, value_dim, dtype
    "plain 128": (None, None, 128, 128, torch.bfloat16),
    "mods 64": (capped_alibi, documents, 64, 64, torch.float16),
    "table 192/128 float32": (relative_bias, None, 192, 128, torch.float32),
}


def forward(target, case, boxed=False):
    """The binary of the first config that fits, and its config."""
    score_mod, mask_mod, head_dim, value_dim, dtype = FORWARD[case]
    q = torch.empty(2, 4, 1024, 64, dtype=dtype)
    call = Call(q, q, q, 1.0, score_mod and specialize(trace_score_mod(score_mod)),
                mask_mod and specialize(trace_mask_mod(mask_mod)))
    where = TARGETS[target]
    code = mod_code(call, where.backend)
    for config in forward_configs(where.backend, where.arch, head_dim, value_dim, dtype.itemsize):
        facts = ForwardFacts(head_dim, value_dim, chunk_of(head_dim), chunk_of(value_dim),
                             config.tile_q, config.tile_kv, mask_mod is not None,
                             fold=score_mod is None,
                             rounded=dtype is torch.float32 and where.backend == "cuda")
        plan = ForwardPlan(facts, code, config, dtype, True, boxed, True, False)
        binary = compiled(plan.source(), where)
        if binary.shared <= SHARED[target]:
            return binary, config
    raise AssertionError("no config fits")


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("target", TARGETS)
def test_forward(target, case):
    binary, config = forward(target, case)
    assert len(binary.code) > 1000 and binary.threads == config.warps * TARGETS[target].warp_size
    if target == "sm_90":
        text = binary.stages["ptx"]
        assert "wgmma.mma_async" in text and "cp.async" in text
        assert not re.search(r"ld\.global\.b16|ld\.global\.u16", text), "keys are read one by one"


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_forward_by_tma(target, case):
    text = forward(target, case, boxed=True)[0].stages["ptx"]
    assert "cp.async.bulk.tensor.4d" in text and "cp.async.cg" not in text


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("kernel", ["key_value_gradient", "query_gradient"])
@pytest.mark.parametrize("target", TARGETS)
def test_backward(target, kernel, boxed):
    """With a learned relative bias, deterministic, of which the smallest config fits."""
    if boxed and target in ("sm_80", "gfx942"):
        pytest.skip("no TMA")
    where = TARGETS[target]
    q = torch.empty(2, 4, 1024, 64, dtype=torch.bfloat16)
    call = Call(q, q, q, 1.0, specialize(trace_score_mod(relative_bias)),
                specialize(trace_mask_mod(documents)))
    code = mod_code(call, where.backend, with_gradient=True)
    config = backward_configs(64, 64, 2)[kernel == "query_gradient"][-1]
    facts = BackwardFacts(64, 64, 64, 64, config.tile_q, config.tile_kv, True, "tf32",
                          diagonals=(0,), exact=True)
    plan = BackwardPlan(kernel, facts, code, config, torch.bfloat16, torch.bfloat16, True, boxed)
    binary = compiled(plan.source(), where)
    assert binary.shared <= SHARED[target] and len(binary.code) > 1000
