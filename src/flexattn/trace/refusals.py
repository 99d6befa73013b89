"""What a mod must not do, and the errors that say so.

In: what the mod did. Out: an error with the user's line and the remedy; none of these return.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from flexattn.errors import (
    ControlFlowError,
    DeviceError,
    DtypeError,
    TraceError,
    UnsupportedOpError,
    message,
    user_location,
)
from flexattn.ir.ops import DTYPES, dtype_name

RANDOM = frozenset({"rand", "randn", "randint", "rand_like", "randn_like", "randint_like",
                    "bernoulli", "dropout", "multinomial", "normal", "randperm", "uniform_"})
IN_PLACE = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "copy_",
                      "__iand__", "__ior__", "__ixor__", "__ifloordiv__", "__imod__", "__ipow__"})


def reject_read(what: str) -> NoReturn:
    raise ControlFlowError(message(
        f"A mod asks for the Python value of a tensor ({what}).",
        expected="tensor operations only: the function runs once for all positions",
        remedy="use torch.where instead of if, & | ~ instead of and/or/not, torch.exp instead of "
        "math.exp; read captured values outside of the mod", where=user_location()))


def unsupported(what: str) -> NoReturn:
    raise UnsupportedOpError(message(
        f"A mod {what}, which flexattn cannot trace.", expected="elementwise operations on scalars",
        remedy="compose it of arithmetic, comparisons, torch.where, exp, log, ... or compute it "
        "outside of the mod and capture the result", where=user_location()))


def reject_write(what: str) -> NoReturn:
    raise TraceError(message(f"A mod writes into a tensor ({what}).",
                             remedy="compute a new value, for example with torch.where",
                             where=user_location()))


def reject_random(what: str) -> NoReturn:
    raise TraceError(message(f"A mod draws random numbers ({what}).", remedy="make the random "
                             "tensor outside of the mod and capture it", where=user_location()))


def check_capture(tensor: Tensor, device: torch.device, kind: str) -> None:
    """Of a score or mask mod on a device. A CPU scalar may be captured by a mod of another device,
    as in torch."""
    if tensor.device != device and (tensor.dim() or tensor.device.type != "cpu"):
        raise DeviceError(message(_captured(tensor) + "that is on another device.",
                                  expected=str(device), got=str(tensor.device),
                                  remedy=f"move it with .to('{device}')", where=user_location()))
    if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
        raise DtypeError(message(_captured(tensor) + "of a type that mods cannot read.",
                                 expected="a dense tensor of " + ", ".join(
                                     sorted(map(dtype_name, DTYPES))),
                                 got=f"{dtype_name(tensor.dtype)}, {tensor.layout}",
                                 remedy="convert it outside of the mod", where=user_location()))
    if tensor.is_neg():
        raise DtypeError(message(_captured(tensor) + "that is a negated view (as the imaginary "
                                 "part of a conjugate is).", remedy="capture tensor.resolve_neg()",
                                 where=user_location()))
    if tensor.requires_grad and kind == "mask":
        raise TraceError(message(_captured(tensor, "mask_mod") + "that requires grad, but a mask "
                                 "has no gradient.", remedy="capture tensor.detach(), or use a "
                                 "score_mod", where=user_location()))


def _captured(tensor: Tensor, mod: str = "mod") -> str:
    return f"A {mod} captures a tensor of shape {tuple(tensor.shape)} "
