"""What goes to Hopper's backward kernel, as far as a machine without a GPU can tell."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
import torch

import flexattn
from flexattn.compile_triton import Target, compiled
from flexattn.kernels.hopper_backward_config import backward_configs
from flexattn.runtime import gpu_driver, launch_hopper
from flexattn.runtime import launch_hopper_backward as launcher
from flexattn.runtime.call import Call, Result
from flexattn.runtime.gpu_launch import Box, Refusal
from flexattn.runtime.gpu_mods import mod_code
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


class OnHopper:
    """A tensor that says it is on the GPU this kernel is for."""

    def __init__(self, tensor):
        self._tensor = tensor
        self.is_cuda, self.device = True, SimpleNamespace(index=0, type="cuda")

    def __getattr__(self, name):
        return getattr(self._tensor, name)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(launch_hopper, "target", lambda device: Target("cuda", 90, 32))


def refusal(call, d_out):
    refused = launcher.prepare(call, Result(d_out), d_out, None)
    assert isinstance(refused, Refusal)
    return refused.reason


def test_other_devices_are_refused():
    q = torch.randn(1, 2, 64, 64)
    assert "sm_90" in refusal(Call(q, q, q, 1.0), q)


@pytest.mark.parametrize("head_dim, dtype, options, words", [
    (64, torch.float32, {}, "float32 is not a 16-bit type"),
    (96, torch.bfloat16, {}, "no tile for heads of 96"),
    (64, torch.bfloat16, {"deterministic": True}, "deterministic"),
])
def test_what_is_refused(hopper, head_dim, dtype, options, words):
    q = OnHopper(torch.randn(1, 2, 64, head_dim).to(dtype))
    assert words in refusal(Call(q, q, q, 1.0, options=options), q)


def test_tensors_that_tma_cannot_read_are_refused(hopper):
    q = OnHopper(torch.randn(1, 2, 64, 64).bfloat16())
    views = torch.randn(1, 2, 64, 65).bfloat16()[..., :64]
    assert "the output's gradient" in refusal(Call(q, q, q, 1.0), views)
    assert "key" in refusal(Call(q, views, q, 1.0), q)


def test_captured_tensors_with_gradients_are_refused(hopper):
    slopes = torch.ones(2, requires_grad=True)
    mod = specialize(trace_score_mod(lambda score, b, h, q_idx, kv_idx: score * slopes[h]))
    q = torch.randn(1, 2, 64, 64).bfloat16()
    call = Call(q, q, q, 1.0, mod)
    reason = launcher._untaken(mod_code(call, "cuda", with_gradient=True))
    assert reason == "captured tensors need gradients"
    assert launcher._untaken(mod_code(Call(q, q, q, 1.0), "cuda", with_gradient=True)) is None


@pytest.mark.parametrize("mod, wanted", [
    (lambda score, b, h, q_idx, kv_idx: 20 * torch.tanh(score / 20), True),
    (lambda score, b, h, q_idx, kv_idx: score + torch.cos((q_idx - kv_idx) * 0.1), False),
    (lambda score, b, h, q_idx, kv_idx: score * 0.5, False)])
def test_functions_of_the_score_get_the_smaller_tile(mod, wanted):
    q = torch.randn(1, 2, 64, 64).bfloat16()
    call = Call(q, q, q, 1.0, specialize(trace_score_mod(mod)))
    found = launcher.crowded(mod_code(call, "cuda", with_gradient=True))
    assert found == wanted and not launcher.crowded(mod_code(call._replace(score=None), "cuda"))
    first = backward_configs(64, 64, found)[0]
    assert first.tile_q == (64 if wanted else 128)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("head_dim, number", [(64, 0), (64, 1), (128, 0)])
def test_values_are_those_of_the_parameters(head_dim, number, sparse):
    q = torch.randn(2, 4, 300, head_dim).half()
    k = torch.randn(2, 2, 200, head_dim).half()
    block = flexattn.create_block_mask(causal, None, None, 300, 200) if sparse else None
    call = Call(q, k, k, 0.5, None, specialize(trace_mask_mod(causal)) if sparse else None, block)
    config = backward_configs(head_dim, head_dim)[number]
    plan = launcher.HopperBackwardPlan(config, mod_code(call, "cuda", with_gradient=True),
                                       torch.float16, sparse)
    binary = compiled(plan.source(), Target("cuda", 90, 32))
    state = SimpleNamespace(plan=plan, lines=8, length=384)
    memory = launcher._Backward._memory(state, call)
    values = launcher._Backward._main_values(state, call, torch.empty_like(q), memory)
    packed = [b"" if isinstance(v, Box) else v.data_ptr() if isinstance(v, torch.Tensor) else v
              for v in values]
    added_by_triton = [0, 0]
    assert len(packed) + 2 == len(gpu_driver._offsets(binary.layout))
    struct.pack(binary.layout, *packed, *added_by_triton)
    statistics = values[4 * 9].tensor
    assert statistics.shape == (1, 8, 2, 384)
    for line in range(8):
        for i, row in enumerate((line, 8 + line)):  # lse2, and delta behind all lines' lse2
            assert statistics[0, line, i].data_ptr() == memory.statistics[row].data_ptr()
