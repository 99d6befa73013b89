"""Checks of factory arguments, and reads of captured tensors that may be per batch.

In: a factory's arguments, with their names. Out: the checked value, or a small function that a
mask calls with traced indices. Rejects: wrong kinds and ranks (ArgumentError, DtypeError,
ShapeError), always naming the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, DtypeError, ShapeError, message

Index = Tensor  # a traced or batched scalar: b, h, q_idx, kv_idx
MaskMod = Callable[[Index, Index, Index, Index], Tensor]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def integer(name: str, value: int, *, at_least: int = 0) -> int:
    """`value` as an int that is no smaller than `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise ArgumentError(message(f"{name} is not an integer", expected="an int", got=repr(value),
                                    remedy=f"pass {name} as a Python int"))
    if value < at_least:
        raise ArgumentError(message(f"{name} is too small", expected=f"at least {at_least}",
                                    got=str(value)))
    return value if isinstance(value, torch.SymInt) else int(value)


def integers(name: str, values: tuple[int, ...], count: int | None = None) -> tuple[int, ...]:
    """A tuple of positive ints, `count` of them where that is given."""
    values = tuple(integer(f"{name}[{i}]", v, at_least=1) for i, v in enumerate(values))
    if count is not None and len(values) != count:
        raise ArgumentError(message(f"{name} has the wrong number of entries",
                                    expected=str(count), got=f"{len(values)}: {values}"))
    return values


def index_tensor(name: str, value: Tensor, *shapes: str) -> Tensor:
    """An integer tensor whose rank is that of one of `shapes`, for example "[B, S]"."""
    if not isinstance(value, Tensor):
        raise ArgumentError(message(f"{name} is not a tensor", got=type(value).__name__,
                                    expected=f"an integer tensor of shape {' or '.join(shapes)}"))
    if value.dtype not in _INTEGERS:
        raise DtypeError(message(f"{name} has the wrong dtype", expected="an integer dtype",
                                 got=str(value.dtype), remedy=f"pass {name}.to(torch.int32)"))
    return ranked(name, value, *shapes)


def ranked(name: str, value: Tensor, *shapes: str) -> Tensor:
    """`value`, whose rank is that of one of `shapes`."""
    ranks = [0 if shape == "[]" else shape.count(",") + 1 for shape in shapes]
    if value.dim() not in ranks:
        raise ShapeError(message(f"{name} has the wrong shape", expected=" or ".join(shapes),
                                 got=str(list(value.shape))))
    return value


def by_batch(name: str, value: int | Tensor, *, at_least: int | None = 0
             ) -> Callable[[Index], Index | int]:
    """b -> value: an int and a tensor of shape [] are the same for all, [B] is read at b."""
    return _by_one_index(name, value, "[B]", at_least)


def by_head(name: str, value: int | Tensor, *, at_least: int | None = 0
            ) -> Callable[[Index], Index | int]:
    """h -> value: an int and a tensor of shape [] are the same for all, [H] is read at h."""
    return _by_one_index(name, value, "[H]", at_least)


def _by_one_index(name: str, value: int | Tensor, shape: str, at_least: int | None
                  ) -> Callable[[Index], Index | int]:
    if isinstance(value, Tensor):
        table = index_tensor(name, value, "[]", shape)
        return (lambda i: table[i]) if table.dim() == 1 else (lambda i: table)
    lowest = torch.iinfo(torch.int64).min if at_least is None else at_least
    number = integer(name, value, at_least=lowest)
    return lambda i: number


def by_token(name: str, value: Tensor) -> Callable[[Index, Index], Index]:
    """(b, position) -> value, for a table of shape [S] or [B, S]."""
    table = index_tensor(name, value, "[S]", "[B, S]")
    if table.dim() == 1:
        return lambda b, position: table[position]
    return lambda b, position: table[b, position]
