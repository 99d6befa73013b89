"""Hopper's forward kernel compiled without a GPU, and what its machine code must have."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from flexattn.compile_triton import Target, compiled
from flexattn.kernels.hopper_config import forward_configs
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_mods import mod_code
from flexattn.runtime.launch_hopper import HopperPlan
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod
from tests.kernels.ptx_flow import operands

SLOPES, TABLE = torch.ones(4), torch.ones(4, 2048)
DOCUMENT = torch.zeros(1024, dtype=torch.int32)


def alibi(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


def softcap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def table_bias(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, q_idx - kv_idx + 1024]


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 256)


def documents(b, h, q_idx, kv_idx):
    return (DOCUMENT[q_idx] == DOCUMENT[kv_idx]) & (q_idx >= kv_idx)


CASES = {  # score mod, mask mod, head_dim, value_dim, dtype, number of the config
    "plain 64": (None, None, 64, 64, torch.bfloat16, 0),
    "softcap 64": (softcap, None, 64, 64, torch.bfloat16, 0),
    "alibi causal 64": (alibi, causal, 64, 64, torch.bfloat16, 0),
    "plain 96": (None, None, 96, 96, torch.float16, 0),
    "alibi causal 128": (alibi, causal, 128, 128, torch.bfloat16, 0),
    "softcap 128": (softcap, None, 128, 128, torch.float16, 0),
    "table 128": (table_bias, None, 128, 128, torch.bfloat16, 0),
    "documents 128": (None, documents, 128, 128, torch.bfloat16, 0),
    "window 192/128": (None, window, 192, 128, torch.bfloat16, 0),
    "plain 256": (None, None, 256, 256, torch.bfloat16, 0),
}
SHORT_ROWS = {
    "documents 64, short": (None, documents, 64, 64, torch.bfloat16, 0),
    "alibi causal 64, short": (alibi, causal, 64, 64, torch.bfloat16, 0),
    "softcap 128, short": (softcap, None, 128, 128, torch.float16, 0),
    "documents 128, short": (None, documents, 128, 128, torch.bfloat16, 0),
    "window 64, short": (None, window, 64, 64, torch.bfloat16, 0),
}


def call_of(case):
    score_mod, mask_mod, head_dim, value_dim, dtype, _ = (CASES | SHORT_ROWS)[case]
    q = torch.empty(2, 4, 1024, head_dim, dtype=dtype)
    return Call(q, q, q[..., :1].expand(-1, -1, -1, value_dim), 1.0,
                score_mod and specialize(trace_score_mod(score_mod)),
                mask_mod and specialize(trace_mask_mod(mask_mod)))


def machine_code(binary, tmp_path: Path) -> list[str]:
    """The instructions of a binary, labels among them."""
    import triton

    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary.code)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    lines = (re.sub(r"/\*[0-9a-f]*\*/|&.*|\?.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def loops(code: list[str]) -> list[list[str]]:
    """What lies between a label and a later jump back to it, innermost only."""
    label_at = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    found = []
    for end, line in enumerate(code):
        target = re.search(r"BRA `\((\.L\w+)\)", line)
        if target and label_at.get(target[1], end) < end:
            found.append((label_at[target[1]], end))
    return [code[start:end] for start, end in found
            if not any(start <= s and e <= end for s, e in found if (s, e) != (start, end))]


@pytest.mark.parametrize("case", CASES | SHORT_ROWS)
def test_machine_code(case, tmp_path):
    score_mod, mask_mod, head_dim, value_dim, dtype, number = (CASES | SHORT_ROWS)[case]
    call = call_of(case)
    code = mod_code(call, "cuda")
    assert code.sloped == (score_mod is alibi)
    config = forward_configs(head_dim, value_dim, score_mod is None or code.sloped,
                             short_rows=case in SHORT_ROWS)[number]
    plan = HopperPlan(config, code, dtype, mask_mod is not None, True, False)
    binary = compiled(plan.source(), Target("cuda", 90, 32))
    assert config.ctas * (binary.shared + 1024) <= 228 << 10
    lines = machine_code(binary, tmp_path)
    assert any("UTMALDG.4D" in line for line in lines)
    steps = [loop for loop in loops(lines) if any("HGMMA" in line for line in loop)]
    assert len(steps) == config.consumers * (2 if mask_mod else 1)
    for step in steps:
        check_step(step, config.tile_kv, score_mod is softcap)
        check_addresses(step)
    if score_mod is None:
        check_operands(binary.stages["ptx"], config.tile_kv // 16)


def check_operands(ptx: str, products: int) -> None:
    """P's registers are made of those of Q K^T, in the order in which tensor cores take them."""
    found = operands(ptx)
    assert found and len(found) % products == 0
    for i, halves in enumerate(found):
        assert halves == [{8 * (i % products) + j} for j in range(8)]


def check_step(step: list[str], tile_kv: int, has_tanh: bool) -> None:
    """The softmax runs between the wait for Q K^T and that for P V, and nothing is spilled."""
    assert not any(re.search(r"\b(LDL|STL)\b", line) for line in step), "registers are spilled"
    waits = [i for i, line in enumerate(step) if "WARPGROUP.DEPBAR" in line]
    assert [step[i].split()[-2] for i in waits] == ["0x1", "0x0"]
    first, last = waits
    powers = [i for i, line in enumerate(step) if "MUFU.EX2" in line]
    assert len(powers) >= tile_kv // 2, "64 rows of 128 threads: half a column each"
    assert all(first < i < last for i in powers), "the softmax does not overlap with P V"
    tangents = [i for i, line in enumerate(step) if "MUFU.TANH" in line]
    assert len(tangents) == (tile_kv // 2 if has_tanh else 0)
    assert all(first < i < last for i in tangents)
    assert all(i < first for i, line in enumerate(step) if "HGMMA" in line)
    assert sum("PRMT" in line for line in step) < 8, "probabilities are packed twice"
    shifts = [line for line in step if re.search(r"\bSHF\b", line)]
    assert len(shifts) < 8, "comparisons are packed into bits"


def check_addresses(step: list[str]) -> None:
    """What is read for each score lies at a constant distance from what is read for the first, and
    positions are not converted for each column."""
    assert sum(bool(re.search(r"\b(LEA|I2FP)\b", line)) for line in step) < 8


def reals(b, h, q_idx, kv_idx):
    near = torch.floor(kv_idx / 49) * SLOPES[h] + 1 <= q_idx / 7 * TABLE[0, kv_idx]
    return near | (torch.tanh(TABLE[h, q_idx]) < torch.sqrt(TABLE[h, kv_idx]) ** 2 - 0.5)


def test_masks_of_reals_round_once_an_operation():
    """Of 16-bit inputs, too: a score's error is not noticed, a mask's is an element."""
    q = torch.empty(2, 4, 1024, 64, dtype=torch.float16)
    call = Call(q, q, q, 1.0, None, specialize(trace_mask_mod(reals)))
    code = mod_code(call, "cuda")
    assert "math.tanh(" in code.text and "sqrt_rn" in code.text
    plan = HopperPlan(forward_configs(64, 64, True)[0], code, torch.float16, True, True, False)
    text = compiled(plan.source(), Target("cuda", 90, 32)).stages["ptx"]
    assert text.count("mul.rn.f32") >= 3 and text.count("div.rn.f32") >= 2
    assert "tanh.approx" not in text


def test_masks_of_float64_round_once_an_operation():
    table = torch.rand(2, 1024, dtype=torch.float64)

    def mask(b, h, q_idx, kv_idx):
        return table[0, q_idx] * table[1, kv_idx] + table[1, q_idx] * 0.3 < table[0, kv_idx] ** 2

    q = torch.empty(1, 2, 1024, 64, dtype=torch.float16)
    code = mod_code(Call(q, q, q, 1.0, None, specialize(trace_mask_mod(mask))), "cuda")
    plan = HopperPlan(forward_configs(64, 64, True)[0], code, torch.float16, True, True, False)
    text = compiled(plan.source(), Target("cuda", 90, 32)).stages["ptx"]
    assert text.count("mul.rn.f64") >= 3 and "fma.rn.f64" not in text


def test_configs():
    assert [c.tile_q for c in forward_configs(64, 64, True)][:2] == [192, 128]
    assert forward_configs(192, 128, False)[0].head_chunks == 3
    assert all(config.stages <= 3 for d in (64, 96, 128, 256) for config in
               forward_configs(d, d, True)), "there are named barriers for three stages"
    assert all(c.ctas * 128 * (c.consumers + 1) * c.entry_registers <= 65536
               and c.consumers * c.consumer_registers + c.producer_registers
               <= (c.consumers + 1) * c.entry_registers
               for d in (64, 96, 128, 256) for c in forward_configs(d, d, True, short_rows=True))
    assert forward_configs(64, 64, True, short_rows=True)[1:] == forward_configs(64, 64, True)
    assert forward_configs(264, 64, True) == ()
