"""Hopper's backward kernel compiled without a GPU, and what its machine code must have."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from flexattn.compile_triton import Target, compiled
from flexattn.kernels.hopper_backward_config import backward_configs
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_mods import mod_code
from flexattn.runtime.launch_hopper_backward import HopperBackwardPlan
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod
from tests.kernels.test_hopper_forward import (
    alibi,
    causal,
    documents,
    loops,
    machine_code,
    softcap,
)

pytestmark = pytest.mark.usefixtures("no_number_has_varied")
CASES = {  # score mod, mask mod, head_dim, dtype, number of the config
    "plain 64": (None, None, 64, torch.bfloat16, 0),
    "plain 128": (None, None, 128, torch.float16, 0),
    "causal 64": (None, causal, 64, torch.float16, 0),
    "causal 128": (None, causal, 128, torch.bfloat16, 0),
    "softcap 64": (softcap, None, 64, torch.bfloat16, 1),
    "softcap 128": (softcap, None, 128, torch.bfloat16, 0),
    "alibi causal 64": (alibi, causal, 64, torch.bfloat16, 1),
    "alibi causal 128": (alibi, causal, 128, torch.bfloat16, 0),
    "documents 64": (None, documents, 64, torch.bfloat16, 0),
    "documents 128": (None, documents, 128, torch.bfloat16, 0),
}


RESIDENT = ("plain 128", "causal 64", "documents 64", "documents 128")


def plan_of(case: str, resident: bool = False) -> HopperBackwardPlan:
    score_mod, mask_mod, head_dim, dtype, number = CASES[case]
    q = torch.empty(2, 4, 1024, head_dim, dtype=dtype)
    call = Call(q, q, q, 1.0, score_mod and specialize(trace_score_mod(score_mod)),
                mask_mod and specialize(trace_mask_mod(mask_mod)))
    config = replace(backward_configs(head_dim, head_dim)[number], resident=resident)
    return HopperBackwardPlan(config, mod_code(call, "cuda", with_gradient=True), dtype,
                              mask_mod is not None)


@pytest.mark.parametrize("case, resident", [(case, False) for case in CASES]
                         + [(case, True) for case in RESIDENT])
def test_machine_code(case, resident, tmp_path):
    plan = plan_of(case, resident)
    binary = compiled(plan.source(), Target("cuda", 90, 32))
    assert binary.shared <= 227 << 10
    code = machine_code(binary, tmp_path)
    for instruction in ("UTMALDG.4D", "UTMAREDG.4D.ADD", "UTMASTG.4D"):
        assert any(instruction in line for line in code), instruction
    steps = [loop for loop in loops(code) if any("HGMMA" in line for line in loop)]
    assert len(steps) == 4, "two consumers, steps without and with a mask"
    for full, masked in (steps[:2], steps[2:]):
        assert len(full) < len(masked)
        check_step(full, plan.config.tile_q, CASES[case][0] is softcap)
        plain = CASES[case][0] is None and CASES[case][1] in (None, causal)
        check_spills(full, 0.05 if plain else 0.08)
        check_spills(masked, 0.05 if plain else 0.08)
        if CASES[case][1] is documents:
            check_reads(masked)


def check_reads(step: list[str]) -> None:
    """What the mask reads for the queries, each thread reads once, while scores are computed."""
    reads = [i for i, line in enumerate(step) if "LDG" in line]
    wait = next(i for i, line in enumerate(step) if "WARPGROUP.DEPBAR" in line)
    assert len(reads) == 1 and reads[0] < wait


def check_step(step: list[str], tile_q: int, has_tanh: bool) -> None:
    """Probabilities are computed while the tensor cores work on dp, and each product is waited for
    where the kernel says."""
    waits = [i for i, line in enumerate(step) if "WARPGROUP.DEPBAR" in line]
    assert [step[i].split()[-2] for i in waits] == ["0x1", "0x0", "0x1", "0x0"]
    of_scores, of_dp, of_dq, _ = waits
    powers = [i for i, line in enumerate(step) if "MUFU.EX2" in line]
    assert len(powers) == tile_q // 2, "64 keys of 128 threads: half a column each"
    assert of_scores < powers[0] < of_dp and powers[-1] < of_dq
    assert sum(of_scores < i < of_dp for i in powers) >= tile_q // 8
    tangents = [i for i, line in enumerate(step) if "MUFU.TANH" in line]
    assert len(tangents) == (tile_q // 2 if has_tanh else 0)
    products = [i for i, line in enumerate(step) if "HGMMA" in line]
    assert any(i < of_scores for i in products) and any(of_dp < i < of_dq for i in products)
    assert not any(of_scores < i < of_dp or i > of_dq for i in products)


def check_spills(step: list[str], share: float) -> None:
    """Few instructions of a step are about registers that did not fit."""
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in step)
    assert spills <= share * len(step), f"{spills} of {len(step)} instructions"


def test_configs():
    assert [c.tile_q for c in backward_configs(64, 64)] == [128, 64]
    assert backward_configs(128, 64) == backward_configs(96, 96) == ()
    for config in (*backward_configs(64, 64), *backward_configs(128, 128)):
        assert config.stages <= 3, "there are named barriers for three stages"
        rows, columns = config.tile_q - config.row_step, config.head_dim - config.column_step
        assert rows == columns == 64, "a consumer's share of dq is 64 x 64"
