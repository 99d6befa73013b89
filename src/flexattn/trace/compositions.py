"""torch functions without an operation of their own, written with those that have one.

In: what torch's function of that name takes, scalars of a mod among it. Out: a traced scalar.
`COMPOSED` is the list. Results equal torch's to rounding; half precision is computed in float32
and rounded once, as torch's own kernels do. Derivatives are torch's at 0 and far out, too: a branch
that `where` does not take has to be finite, or its derivative times 0 is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


def _rounded_once(fn: Callable) -> Callable:
    """Whole numbers become floating point, half precision is widened and rounded at the end."""

    @wraps(fn)
    def wide(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not input.dtype.is_floating_point:
            input = input.to(torch.get_default_dtype())
        if input.dtype not in _HALF:
            return fn(input, *args, **kwargs)
        return fn(input.float(), *args, **kwargs).to(input.dtype)

    return wide


def _pair(fn: Callable) -> Callable:
    """_rounded_once for two operands, which get one dtype first."""
    rounded = _rounded_once(fn)

    @wraps(fn)
    def promoted(input: Any, other: Any) -> Any:
        dtypes = [x.dtype for x in (input, other) if hasattr(x, "dtype")]
        common = torch.promote_types(dtypes[0], dtypes[-1])
        if not common.is_floating_point:
            common = torch.get_default_dtype()
        x, y = (x.to(common) if hasattr(x, "dtype") else x
                for x in (input, other))
        if common in _HALF and hasattr(y, "dtype"):
            y = y.float()
        return rounded(x, y)

    return promoted


# Elementary functions


@_rounded_once
def tan(input: Any) -> Any:
    return torch.sin(input) / torch.cos(input)


@_rounded_once
def sinh(input: Any) -> Any:
    up, down = torch.expm1(input * 0.5), torch.expm1(input * -0.5)
    return up * 0.5 * (up + 2) - down * 0.5 * (down + 2)


@_rounded_once
def cosh(input: Any) -> Any:
    up, down = torch.exp(input * 0.5), torch.exp(input * -0.5)
    return up * 0.5 * up + down * 0.5 * down


@_rounded_once
def asinh(input: Any) -> Any:
    size = torch.where(input < 0, -input, input)  # unlike abs, with a derivative at 0
    found = torch.log1p(size + size * size / (1 + torch.sqrt(size * size + 1)))
    return torch.where(input < 0, -found, found)


@_rounded_once
def acosh(input: Any) -> Any:
    found = torch.log(input + torch.sqrt(input * input - 1))
    return torch.where(input >= 1, found, math.nan).to(found.dtype)


@_rounded_once
def atanh(input: Any) -> Any:
    return 0.5 * torch.log1p(2 * input / (1 - input))


@_rounded_once
def log10(input: Any) -> Any:
    return torch.log2(input) * math.log10(2)


@_rounded_once
def erfc(input: Any) -> Any:
    return 1 - torch.erf(input)


@_rounded_once
def sinc(input: Any) -> Any:
    angle = torch.where(input == 0, 1.0, input * math.pi).to(input.dtype)
    return torch.where(input == 0, 1.0, torch.sin(angle) / angle).to(angle.dtype)


@_rounded_once
def logit(input: Any, eps: float | None = None) -> Any:
    inside = input if eps is None else torch.clamp(input, eps, 1 - eps)
    return torch.log(inside / (1 - inside))


@_pair
def logaddexp(input: Any, other: Any) -> Any:
    same = input == other  # also where both are infinite
    apart = torch.log1p(torch.exp(-torch.abs(input - other)))
    return torch.where(same, input * 0.5 + other * 0.5 + math.log(2),
                       torch.max(input, other) + apart)


@_pair
def logaddexp2(input: Any, other: Any) -> Any:
    apart = torch.log2(1 + torch.exp2(-torch.abs(input - other)))
    return torch.where(input == other, input * 0.5 + other * 0.5 + 1,
                       torch.max(input, other) + apart)


@_pair
def xlogy(input: Any, other: Any) -> Any:
    limit = (input == 0) & ((other <= 0) | (other == math.inf))
    return input * torch.log(torch.where(limit, 1.0, other).to(input.dtype))


@_pair
def hypot(input: Any, other: Any) -> Any:
    return torch.sqrt(input * input + other * other)


def float_power(input: Any, exponent: Any) -> Any:
    base, power = (x.double() if hasattr(x, "double") else float(x) for x in (input, exponent))
    return base**power


def deg2rad(input: Any) -> Any:
    return input * (math.pi / 180)


def rad2deg(input: Any) -> Any:
    return input * (180 / math.pi)


# Parts and signs


def frac(input: Any) -> Any:
    return input - torch.trunc(input)


def signbit(input: Any) -> Any:
    return (input < 0) | ((input == 0) & (1 / input < 0))


@_pair
def copysign(input: Any, other: Any) -> Any:
    size = torch.abs(input)
    if not hasattr(other, "dtype"):
        return -size if math.copysign(1, other) < 0 else size
    return torch.where(signbit(other), -size, size)


def heaviside(input: Any, values: Any) -> Any:
    return torch.where(input == 0, values, (input > 0).to(input.dtype))


def fmax(input: Any, other: Any) -> Any:
    return torch.where((input >= other) | (other != other), input, other)


def fmin(input: Any, other: Any) -> Any:
    return torch.where((input <= other) | (other != other), input, other)


def nan_to_num(input: Any, nan: float | None = None, posinf: float | None = None,
               neginf: float | None = None) -> Any:
    if not input.dtype.is_floating_point:
        return input
    largest = torch.finfo(input.dtype).max
    known = torch.where(input != input, nan or 0.0, input)
    top = torch.where(input == math.inf, largest if posinf is None else posinf, known)
    return torch.where(input == -math.inf, -largest if neginf is None else neginf, top)


def isnan(input: Any) -> Any:
    return input != input


def isinf(input: Any) -> Any:
    return (input == math.inf) | (input == -math.inf)


def isfinite(input: Any) -> Any:
    return (input == input) & ~isinf(input)


def isposinf(input: Any) -> Any:
    return input == math.inf


def isneginf(input: Any) -> Any:
    return input == -math.inf


def isclose(input: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8,
            equal_nan: bool = False) -> Any:
    close = (input == other) | (isfinite(other) & (
        torch.abs(input - other) <= atol + rtol * torch.abs(other)))
    return close | (isnan(input) & isnan(other)) if equal_nan else close


# Several operands


def lerp(input: Any, end: Any, weight: Any) -> Any:
    return input + weight * (end - input)


def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + value * tensor1 * tensor2


def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + value * tensor1 / tensor2


# torch.nn.functional


@_rounded_once
def silu(input: Any, inplace: bool = False) -> Any:
    return input * torch.sigmoid(input)


@_rounded_once
def gelu(input: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return input * 0.5 * (1 + torch.erf(input * math.sqrt(0.5)))
    inner = math.sqrt(2 / math.pi) * (input + 0.044715 * (input * input * input))
    return 0.5 * input * (1 + torch.tanh(inner))


@_rounded_once
def softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    scaled = input * beta
    bent = torch.log1p(torch.exp(torch.clamp(scaled, max=threshold))) / beta
    return torch.where(scaled > threshold, input, bent)


@_rounded_once
def logsigmoid(input: Any) -> Any:
    return torch.min(input, torch.zeros_like(input)) - torch.log1p(torch.exp(-torch.abs(input)))


@_rounded_once
def mish(input: Any, inplace: bool = False) -> Any:
    return input * torch.tanh(softplus(input))


@_rounded_once
def elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    return torch.where(input > 0, input, alpha * torch.expm1(torch.clamp(input, max=0)))


@_rounded_once
def celu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    return torch.where(input > 0, input, alpha * torch.expm1(torch.clamp(input, max=0) / alpha))


def selu(input: Any, inplace: bool = False) -> Any:
    return 1.0507009873554805 * elu(input, 1.6732632423543772)


def relu(input: Any, inplace: bool = False) -> Any:
    return torch.where(input <= 0, 0, input).to(input.dtype)


def relu6(input: Any, inplace: bool = False) -> Any:
    return hardtanh(input, 0.0, 6.0)


def hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0,
             inplace: bool = False) -> Any:
    inside = torch.where(input >= max_val, max_val, input)
    return torch.where(input <= min_val, min_val, inside).to(input.dtype)


def leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return torch.where(input > 0, input, input * negative_slope)


@_rounded_once
def hardsigmoid(input: Any, inplace: bool = False) -> Any:
    return hardtanh(input + 3, 0.0, 6.0) / 6


@_rounded_once
def hardswish(input: Any, inplace: bool = False) -> Any:
    bent = input * (input + 3) / 6
    return torch.where(input >= 3, input, torch.where(input <= -3, 0.0, bent)).to(bent.dtype)


def hardshrink(input: Any, lambd: float = 0.5) -> Any:
    return torch.where((input >= -lambd) & (input <= lambd), 0.0, input).to(input.dtype)


def softshrink(input: Any, lambd: float = 0.5) -> Any:
    far = torch.where(input > lambd, input - lambd, torch.where(input < -lambd, input + lambd, 0.0))
    return far.to(input.dtype)


@_rounded_once
def softsign(input: Any) -> Any:
    return input / (1 + torch.abs(input))


@_rounded_once
def tanhshrink(input: Any) -> Any:
    return input - torch.tanh(input)


def threshold(input: Any, threshold: float, value: float, inplace: bool = False) -> Any:
    return torch.where(input > threshold, input, value)


COMPOSED: dict[str, Callable] = {
    fn.__name__: fn for fn in (
        tan, sinh, cosh, asinh, acosh, atanh, log10, erfc, sinc, logit, logaddexp, logaddexp2,
        xlogy, hypot, float_power, deg2rad, rad2deg, frac, signbit, copysign, heaviside, fmax,
        fmin, nan_to_num, isnan, isinf, isfinite, isposinf, isneginf, isclose, lerp, addcmul,
        addcdiv, silu, gelu, softplus, logsigmoid, mish, elu, celu, selu, relu, relu6, hardtanh,
        leaky_relu, hardsigmoid, hardswish, hardshrink, softshrink, softsign, tanhshrink,
        threshold)
}
