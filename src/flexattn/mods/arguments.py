"""Checks of the arguments of mods: learned tables, numbers. Each error names the argument."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

from torch import Tensor

from flexattn.errors import ArgumentError, DtypeError, ShapeError, message

Index = Tensor  # a traced or batched scalar: b, h, q_idx, kv_idx
ScoreMod = Callable[[Tensor, Index, Index, Index, Index], Tensor]


def table(name: str, value: Tensor, *shapes: str, floating: bool = True) -> Tensor:
    """A tensor of floats (or of integers), whose rank is that of one of `shapes`: "[entries, H]".

    Errors: ArgumentError, DtypeError, ShapeError.
    """
    kind = "a floating point" if floating else "an integer"
    expected = f"{kind} tensor of shape {' or '.join(shapes)}"
    if not isinstance(value, Tensor):
        raise ArgumentError(message(f"{name} is not a tensor", expected=expected,
                                    got=type(value).__name__))
    if value.dtype.is_floating_point is not floating or value.dtype.is_complex:
        raise DtypeError(message(f"{name} has the wrong dtype", expected=expected,
                                 got=str(value.dtype)))
    ranks = [0 if shape == "[]" else shape.count(",") + 1 for shape in shapes]
    if value.dim() not in ranks:
        raise ShapeError(message(f"{name} has the wrong shape", expected=expected,
                                 got=str(list(value.shape))))
    return value


def positive(name: str, value: float) -> float:
    """A number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
        raise ArgumentError(message(f"{name} is not a positive number", expected="a number > 0",
                                    got=repr(value)))
    return float(value)


def count(name: str, value: int) -> int:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ArgumentError(message(f"{name} is not a count", expected="an int >= 1",
                                    got=repr(value)))
    return int(value)
