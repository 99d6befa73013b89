"""One attention call in torch's autograd.

In: a validated Call. Out: its Result, differentiable once in query, key, value, the tensors
captured by the score mod, and through out and lse. Rejects devices without a kernel, and second
derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexattn.errors import DerivativeError, DeviceError, message
from flexattn.runtime import launch_cpu, launch_cpu_backward
from flexattn.runtime.call import Call, Gradients, Result

Forward = Callable[[Call], Result]
Backward = Callable[[Call, Result, Tensor, Tensor | None], Gradients]
_NOTHING = torch.empty(0)


def attend(call: Call) -> Result:
    """Run the call; record it for backward where a gradient is wanted."""
    if forward_ad._current_level >= 0:
        _check_no_tangent(call)
    if torch.is_grad_enabled():
        tensors = (call.query, call.key, call.value, *(call.score.captures if call.score else ()))
        if any(t.requires_grad for t in tensors):
            return Result(*_Attention.apply(call, *tensors))
    return kernels(call.query.device.type)[0](call)


def _check_no_tangent(call: Call) -> None:
    tensors = (call.query, call.key, call.value, *(call.score.captures if call.score else ()))
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise DerivativeError(message("flexattn has no forward-mode derivatives.",
                                      expected="tensors without tangents",
                                      remedy="flexattn.reference.attention, which has them"))


@cache
def kernels(device: str) -> tuple[Forward, Backward]:
    """The launchers of forward and backward kernels for a type of device."""
    if device == "cpu":
        return launch_cpu.forward, launch_cpu_backward.backward
    if device == "cuda":
        from flexattn.runtime import launch_gpu  # not before it is needed: imports cost time

        return launch_gpu.forward, launch_gpu.backward
    raise DeviceError(message("No kernel for this device yet.", expected="cpu or cuda",
                              got=device, remedy="move the tensors to the CPU"))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        result = kernels(call.query.device.type)[0](call._replace(want_lse=True))
        # Tensors are saved torch's way, which notices changes in place and lets hooks move them.
        given = call.tensors
        ctx.call = call.with_tensors([_NOTHING] * len(given))
        ctx.save_for_backward(result.out, result.lse, *given)
        if result.max_scores is not None:
            ctx.mark_non_differentiable(result.max_scores)
        return result.out, result.lse if call.want_lse else None, result.max_scores

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None,
                 _: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        call = ctx.call.with_tensors(tensors)
        d_lse = d_lse if call.want_lse else None
        with torch.no_grad():
            grads = kernels(out.device.type)[1](call, Result(out, lse), d_out, d_lse)
        given = (grads.query, grads.key, grads.value, *grads.captures)
        if torch.is_grad_enabled():  # create_graph=True
            given = _Once.apply(len(given), *given, *tensors, d_out, d_lse)
        return None, *given


class _Once(torch.autograd.Function):
    """Gradients that depend on tensors in a way that is not known: torch's own check sees d_out
    alone, and would take the derivative in query, key and value for 0."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise DerivativeError(message(
            "flex_attention has no second derivative yet.",
            expected="one backward through a call", got="a gradient of its gradient",
            remedy="flexattn.reference.attention can be differentiated any number of times"))
