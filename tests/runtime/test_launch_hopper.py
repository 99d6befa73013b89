"""What goes to Hopper's kernel, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch

from flexattn.runtime.call import Call
from flexattn.runtime.gpu_launch import Refusal
from flexattn.runtime.launch_hopper import prepare, with_boxes
from flexattn.runtime.tensor_map import takes


def test_other_devices_are_refused():
    q = torch.randn(1, 2, 64, 64)
    refused = prepare(Call(q, q, q, 1.0))
    assert isinstance(refused, Refusal) and "sm_90" in refused.reason


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
