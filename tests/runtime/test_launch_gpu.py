"""What the launcher of GPU kernels refuses before it asks for a GPU."""

from __future__ import annotations

import pytest
import torch

from flexattn.errors import ShapeError
from flexattn.runtime import launch_gpu
from flexattn.runtime.call import Call, Result


def test_a_backward_of_more_heads_than_a_grid_has_rows():
    q = torch.empty(1, 1, 1, 16).expand(70000, 1, 1, 16)
    with pytest.raises(ShapeError, match="parts of the batch"):
        launch_gpu.backward(Call(q, q, q, 1.0), Result(q), q, None)
