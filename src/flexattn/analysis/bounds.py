"""Arithmetic of bounds: each value is a Python number (the same for all tiles) or a tensor.

In: integers as int or int64 tensors, floating point as float or float64 tensors, booleans as bool
or bool tensors, in any mixture; or Symbols (analysis.symbols) in place of tensors. Out: the same.
Python numbers stay Python numbers, so that what is the same for all tiles costs no tensor
operation, and integers among them never overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn.analysis.symbols import Symbol, apply, chosen
from flexattn.ir.ops import FLOATS, Op

Bound = Any  # bool | int | float | Tensor | Symbol


class Interval(NamedTuple):
    """All values of a node over a tile lie in [lo, hi], or are NaN where `nan` says they may be.

    A bool is an interval of {False, True}: lo is "always true", hi is "true somewhere, perhaps".
    """

    lo: Bound
    hi: Bound
    nan: Bound = False

    @property
    def is_point(self) -> bool:
        """Whether it is known, without looking at tensors, to hold one value only."""
        if self.nan is not False:
            return False
        if is_number(self.lo) and is_number(self.hi):
            return bool(self.lo == self.hi)
        if isinstance(self.lo, Symbol) and isinstance(self.hi, Symbol):
            return self.lo.node is self.hi.node
        return self.lo is self.hi


def is_number(x: Bound) -> bool:
    """Whether it is a Python number, the same for all tiles."""
    return not isinstance(x, (Tensor, Symbol))


def point(value: Bound) -> Interval:
    return Interval(value, value)


def integer_range(dtype: torch.dtype) -> Interval:
    info = torch.iinfo(dtype)
    return Interval(info.min, info.max)


def unbounded(dtype: torch.dtype) -> Interval:
    """Every value of the dtype."""
    if dtype is torch.bool:
        return Interval(False, True)
    return Interval(-torch.inf, torch.inf, True) if dtype in FLOATS else integer_range(dtype)


def minimum(x: Bound, y: Bound) -> Bound:
    if isinstance(x, Symbol) or isinstance(y, Symbol):
        return apply(Op.MIN, x, y)
    if isinstance(x, Tensor):
        return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)
    return y.clamp(max=x) if isinstance(y, Tensor) else min(x, y)


def maximum(x: Bound, y: Bound) -> Bound:
    if isinstance(x, Symbol) or isinstance(y, Symbol):
        return apply(Op.MAX, x, y)
    if isinstance(x, Tensor):
        return torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp(min=y)
    return y.clamp(min=x) if isinstance(y, Tensor) else max(x, y)


def both(x: Bound, y: Bound) -> Bound:
    """Logical and."""
    if x is False or y is False:
        return False
    return y if x is True else x if y is True else x & y


def either(x: Bound, y: Bound) -> Bound:
    """Logical or."""
    if x is True or y is True:
        return True
    return y if x is False else x if y is False else x | y


def negate(x: Bound) -> Bound:
    """Logical not."""
    return not x if is_number(x) else ~x


def choose(condition: Bound, x: Bound, y: Bound) -> Bound:
    """x where the condition holds, y elsewhere."""
    if isinstance(condition, Symbol):
        return chosen(condition, x, y)
    if not isinstance(condition, Tensor):
        return x if condition else y
    if isinstance(x, float) and isinstance(y, float):  # torch would make it float32
        x = torch.tensor(x, dtype=torch.float64, device=condition.device)
    return torch.where(condition, x, y)


def to_real(x: Bound) -> Bound:
    """As floating point: rounded where it is too large."""
    return float(x) if is_number(x) else x.double()


def through_tensor(op: Callable[[Tensor], Tensor]) -> Callable[[Bound], Bound]:
    """A tensor operation on float64, for Python numbers too."""
    def function(x: Bound) -> Bound:
        if isinstance(x, Symbol):
            return x.through(op.__name__)
        return op(x) if isinstance(x, Tensor) else op(torch.tensor(x, dtype=torch.float64)).item()

    return function


def through_tensors(op: Callable[..., Tensor]) -> Callable[..., Bound]:
    """A tensor operation of two float64, for Python numbers too."""
    def function(x: Bound, y: Bound) -> Bound:
        if isinstance(x, Symbol) or isinstance(y, Symbol):
            return apply(Op[op.__name__.upper()], x, y)
        found = op(*(v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
                     for v in (x, y)))
        return found if isinstance(x, Tensor) or isinstance(y, Tensor) else found.item()

    return function


def is_nan(x: Bound) -> Bound:
    return x.isnan() if isinstance(x, Tensor) else x != x


def without_nan(x: Bound, replacement: float) -> Bound:
    """x with NaN replaced, infinities kept."""
    return choose(is_nan(x), replacement, x)


def as_dtype(x: Bound, dtype: torch.dtype) -> Bound:
    """Rounded to the nearest value of a floating-point dtype, as float64."""
    if isinstance(x, Symbol):
        return x.rounded(dtype)
    if isinstance(x, Tensor):
        return x.to(dtype).double()
    return torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else torch.int64
                        ).to(dtype).double().item()


def widen(lo: Bound, hi: Bound, dtype: torch.dtype, ulps: int) -> tuple[Bound, Bound]:
    """Bounds of what `dtype` may compute for exact results in [lo, hi].

    ulps 0: the operation is correctly rounded, so bounds that `dtype` can represent are exact.
    """
    if ulps == 0 and dtype is torch.float64:
        return lo, hi
    near_lo, near_hi = as_dtype(lo, dtype), as_dtype(hi, dtype)
    below = minimum(near_lo, _spread(near_lo, dtype, -max(ulps, 1)))
    above = maximum(near_hi, _spread(near_hi, dtype, max(ulps, 1)))
    if ulps == 0:
        return choose(near_lo == lo, lo, below), choose(near_hi == hi, hi, above)
    return below, above


def _spread(x: Bound, dtype: torch.dtype, ulps: int) -> Bound:
    info = torch.finfo(dtype)
    finite = maximum(minimum(x, info.max), info.min)
    return finite + (abs(finite) * info.eps + info.tiny) * ulps
