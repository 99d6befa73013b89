"""What callers pass: sizes, block sizes and indices, checked.

In: arguments as given. Out: ints, pairs and positions. Rejects, with ArgumentError: sizes that are
negative, block sizes that are none, indices that leave the mask or tear a ragged block out of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message

MaskMod = Callable[[Any, Any, Any, Any], Any]
BlockSize = int | tuple[int, int]


def checked_block_size(size: BlockSize) -> tuple[int, int]:
    """(q, kv) in tokens."""
    given = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    pair = tuple(map(_as_int, given))
    if len(pair) != 2 or any(n is None or n <= 0 for n in pair):
        raise ArgumentError(message("BLOCK_SIZE is not a block size.", got=repr(size),
                                    expected="a positive int, or a pair (q, kv) of them",
                                    remedy="BLOCK_SIZE=128"))
    return pair  # type: ignore[return-value]


def _as_int(value: Any) -> int | None:
    """An int of Python's, numpy's or a tensor's; None for anything else."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        return None


def checked_size(function: str, name: str, size: Any) -> int:
    found = _as_int(size)
    if found is None or found < 0:
        raise ArgumentError(message(f"{function}: {name} is not a size.",
                                    expected="a non-negative int", got=repr(size)))
    return found


def check_options(function: str, options: Iterable[str]) -> None:
    """PyTorch's further options begin with compute_ or dq_; anything else is a mistake."""
    unknown = [name for name in options if not name.startswith(("compute_", "dq_"))]
    if unknown:
        raise ArgumentError(message(f"{function} has no such option.", got=", ".join(unknown),
                                    expected="the names that its documentation gives"))


def device_of(device: torch.device | str | None) -> torch.device:
    if device is not None:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return found
    if torch.compiler.is_compiling():  # which cannot read the default device
        return torch.empty(0).device
    return torch.get_default_device()


def positions(index: Any, sizes: tuple[int, int, int]) -> list[Tensor]:
    """Positions int64 of batch entries, heads and rows that mask[index] takes, on the CPU. An int
    keeps its dimension; an index beyond three is an error."""
    keys = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
        at = keys.index(Ellipsis)
        keys = keys[:at] + (slice(None),) * (4 - len(keys)) + keys[at + 1:]
    if len(keys) > 3:
        raise ArgumentError(message("too many indices for a block mask", got=str(len(keys)),
                                    expected="at most 3: batch, head, row of query blocks"))
    keys += (slice(None),) * (3 - len(keys))
    return [_taken(key, size) for key, size in zip(keys, sizes, strict=True)]


def _taken(key: Any, size: int) -> Tensor:
    if isinstance(key, int):
        if not -size <= key < size:
            raise ArgumentError(message("an index leaves the block mask", got=str(key),
                                        expected=f"{-size} to {size - 1}"))
        key = slice(key, key + 1 or None)
    found = torch.arange(size)[key.cpu() if isinstance(key, Tensor) else key]
    return found.reshape(-1)
