"""One attention call in torch's autograd.

In: a validated Call. Out: its Result, differentiable in query, key, value, the tensors captured by
the score mod, and through out and lse. Rejects devices without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexattn.errors import DeviceError, message
from flexattn.runtime import launch_cpu, launch_cpu_backward, launch_gpu
from flexattn.runtime.call import Call, Gradients, Result

Forward = Callable[[Call], Result]
Backward = Callable[[Call, Result, Tensor, Tensor | None], Gradients]
_KERNELS: dict[str, tuple[Forward, Backward]] = {
    "cpu": (launch_cpu.forward, launch_cpu_backward.backward),
    "cuda": (launch_gpu.forward, launch_gpu.backward),
}


def attend(call: Call) -> Result:
    """Run the call; record it for backward where a gradient is wanted."""
    if call.query.device.type not in _KERNELS:
        raise DeviceError(message("No kernel for this device yet.", expected="cpu or cuda",
                                  got=str(call.query.device), remedy="move the tensors to the CPU"))
    tensors = (call.query, call.key, call.value, *(call.score.captures if call.score else ()))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Result(*_Attention.apply(call, *tensors))
    return _KERNELS[call.query.device.type][0](call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        with_lse = Call(**{**vars(call), "want_lse": True})
        result = _KERNELS[call.query.device.type][0](with_lse)
        ctx.call = call
        ctx.save_for_backward(result.out, result.lse)
        if result.max_scores is not None:
            ctx.mark_non_differentiable(result.max_scores)
        return result.out, result.lse if call.want_lse else None, result.max_scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None,
                 _: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        if not ctx.call.want_lse:
            d_lse = None
        backward = _KERNELS[out.device.type][1]
        grads = backward(ctx.call, Result(out, lse), d_out, d_lse)
        return None, grads.query, grads.key, grads.value, *grads.captures
