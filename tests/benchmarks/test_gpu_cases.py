"""The GPU suite's cases on a CPU: what peers are given is the same attention, and work is counted
right."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from benchmarks import gpu, gpu_cases, run
from benchmarks.gpu_cases import CASES, HeadShape
from flexattn.reference import attention


def small(**changes) -> HeadShape:
    return HeadShape(**{"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 64, "kv_len": 64,
                        "head_dim": 16, "dtype": torch.float64, "device": "cpu"} | changes)


@pytest.mark.parametrize("name", CASES)
def test_peers_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(gpu_cases, "WINDOW", 10)
    shape = small()
    case = CASES[name](shape)
    if not (case.kernels or case.peer):
        assert gpu.PROVIDERS["written_out"](case, False) is None
        return
    q, k, v = shape.inputs()
    wanted = attention(q, k, v, case.score_mod, case.mask_mod)[0]
    torch.testing.assert_close(case.sdpa(q, k, v), wanted)
    assert (gpu.PROVIDERS["cudnn"](case, False) is None) is not case.kernels


@pytest.mark.parametrize("name", CASES)
def test_work_is_that_of_attended_pairs(name, monkeypatch):
    monkeypatch.setattr(gpu_cases, "WIDTH", 64 * 64 * 5)
    case = CASES[name](small(value_dim=8))
    attended = 64 * 64
    if case.mask_mod is not None:
        attended = int(torch_flex.create_mask(case.mask_mod, None, None, 64, 64, "cpu").sum())
    assert case.attended == attended
    assert case.flops(False) == 2 * 2 * 4 * (16 + 8) * attended
    assert case.flops(True) == 2 * 2 * 4 * (3 * 16 + 2 * 8) * attended


def test_shapes_with_another_value_dim():
    shape = small(value_dim=24)
    assert shape.inputs()[2].shape == (2, 2, 64, 24) and str(shape).endswith("D16/24")


def test_decoding_reads_keys_and_values_once():
    for batch, heads, kv_heads, length, head_dim in gpu.DECODE:
        size = 4 * batch * kv_heads * length * head_dim
        assert 0.5e9 < size < 1.1e9 and heads % kv_heads == 0
        assert math.log2(length).is_integer()


def test_the_suite_has_its_own_names(capsys):
    with pytest.raises(SystemExit):
        run.main(["--suite", "gpu", "--providers", "sdpa"])
    assert "cudnn" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--suite", "cpu", "--cases", "natten"])
    assert "trained_bias" in capsys.readouterr().err
