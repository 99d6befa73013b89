"""What goes to Hopper's kernel, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch

from flexattn.kernels.hopper_config import forward_configs
from flexattn.runtime import launch_gpu
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_launch import Refusal
from flexattn.runtime.launch_hopper import crowded, prepare, short_rows, with_boxes
from flexattn.runtime.tensor_map import takes
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod


def test_other_devices_are_refused():
    q = torch.randn(1, 2, 64, 64)
    refused = prepare(Call(q, q, q, 1.0))
    assert isinstance(refused, Refusal) and "sm_90" in refused.reason


def test_calls_of_which_another_tensor_is_copied_are_told_apart():
    room = torch.randn(2 * 64 * 64 + 1, dtype=torch.bfloat16)
    taken, copied = (room[i:i + 2 * 64 * 64].view(1, 64, 2, 64).transpose(1, 2) for i in (0, 1))
    assert takes(taken) and not takes(copied)
    first, second = Call(taken, copied, taken, 1.0), Call(copied, taken, taken, 1.0)
    assert launch_gpu._key(first) != launch_gpu._key(second)


SLOPES, DOCUMENT = torch.ones(4), torch.zeros(4096, dtype=torch.int32)


def alibi(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


def softcap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 64)


@pytest.mark.parametrize("score_mod, mask_mod, fold_scale, expected", [
    (None, None, True, False), (alibi, None, True, False), (None, causal, True, False),
    (softcap, causal, False, False), (alibi, causal, True, False), (alibi, causal, False, True),
    (None, window, True, True), (alibi, window, True, True)])
def test_mods_that_three_consumers_do_not_hold(score_mod, mask_mod, fold_scale, expected):
    q = torch.empty(1, 4, 128, 64, dtype=torch.bfloat16)
    call = Call(q, q, q, 1.0, score_mod and specialize(trace_score_mod(score_mod)),
                mask_mod and specialize(trace_mask_mod(mask_mod)))
    assert crowded(call, fold_scale) is expected
    tiles = [c.consumers for c in forward_configs(64, 64, fold_scale, expected)]
    assert tiles == ([2, 2] if expected else [3, 2, 2])


def documents(b, h, q_idx, kv_idx):
    return (DOCUMENT[q_idx] == DOCUMENT[kv_idx]) & (q_idx >= kv_idx)


def documents_or_near(b, h, q_idx, kv_idx):
    return (DOCUMENT[q_idx] == DOCUMENT[kv_idx]) | (q_idx - kv_idx < 64)


@pytest.mark.parametrize("mask_mod, kv_len, head_dim, expected", [
    (None, 512, 64, False), (causal, 2048, 64, True), (causal, 2048, 128, False),
    (causal, 4096, 64, False), (window, 4096, 64, True), (window, 4096, 128, False),
    (documents, 4096, 128, True), (documents_or_near, 4096, 128, False)])
def test_rows_of_few_blocks(mask_mod, kv_len, head_dim, expected):
    q = torch.empty(1, 4, kv_len, head_dim, dtype=torch.bfloat16)
    mask = mask_mod and specialize(trace_mask_mod(mask_mod))
    assert short_rows(Call(q, q, q, 1.0, None, mask)) is expected


@pytest.mark.parametrize("tensor, taken", [
    (torch.empty(2, 4, 100, 64, dtype=torch.bfloat16), True),
    (torch.empty(2, 100, 4, 64, dtype=torch.bfloat16).transpose(1, 2), True),
    (torch.empty(2, 4, 100, 65, dtype=torch.bfloat16)[..., :64], False),  # rows of 130 bytes
    (torch.empty(2, 4, 64, 100, dtype=torch.bfloat16).transpose(2, 3), False),
    (torch.empty(2, 1, 100, 64, dtype=torch.bfloat16).expand(-1, 4, -1, -1), False),
    (torch.empty(1, 4, 100, 72, dtype=torch.bfloat16)[..., 4:68], False),  # begins at byte 8
])
def test_what_tma_takes(tensor, taken):
    assert takes(tensor) is taken
    call = with_boxes(Call(tensor, tensor, tensor, 1.0))
    assert takes(call.query) and (call.query is tensor) is taken
