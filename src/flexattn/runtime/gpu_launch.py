"""What the launchers of GPU kernels share: a prepared call, a refusal, and a launch in which only
the addresses of tensors change from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flexattn.compile_triton import Source, binary
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.runtime.gpu_driver import Function, target
from flexattn.runtime.gpu_mods import INTERPRETED
from flexattn.runtime.tensor_map import TensorMap

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
         torch.int32: "i32", torch.int64: "i64"}
Grid = tuple[int, int, int]
_HERE = nullcontext()


class Tiled(Protocol):
    """tile: what was chosen of its kernels' tiles. functions: its kernels, the main ones first;
    empty where Triton's interpreter runs them."""

    @property
    def tile(self) -> dict[str, int]: ...

    @property
    def functions(self) -> list[Function]: ...


@runtime_checkable
class Prepared(Tiled, Protocol):
    """A kernel chosen and compiled for calls that agree in everything but values."""

    def run(self, call: Call) -> Result: ...


@runtime_checkable
class PreparedBackward(Tiled, Protocol):
    """The same of a backward."""

    def run(self, call: Call, result: Result, d_out: Tensor,
            d_lse: Tensor | None) -> Gradients: ...


@dataclass(frozen=True)
class Refusal:
    """Why a kernel does not take a call."""

    reason: str


_WIDEST_BOX = 128  # bytes of a row that one copy of TMA brings


class Box(NamedTuple):
    """A tensor that a kernel reads or writes through a TMA descriptor, tile by tile; exact and
    swizzled as in TensorMap."""

    tensor: Tensor
    rows: int
    columns: int
    exact: bool = False
    swizzled: bool = True

    def map(self) -> TensorMap:
        widest = _WIDEST_BOX // self.tensor.element_size() if self.swizzled else self.columns
        return TensorMap(self.tensor, self.rows, min(self.columns, widest), self.exact,
                         self.swizzled)

    @property
    def values(self) -> list[Any]:
        """A launch's values: Triton wants sizes and strides beside a descriptor."""
        return [self, *self.tensor.shape, *self.tensor.stride()]


def tensor_type(dtype: torch.dtype, rows: int, columns: int, boxed: bool) -> tuple[str, ...]:
    """Of a tensor [batch, head, row, column] in a kernel's signature."""
    if boxed:
        return (f"tensordesc<{TYPES[dtype]}[1, 1, {rows}, {columns}]>",)
    return (f"*{TYPES[dtype]}", "i64", "i64", "i64")


def tensor_values(tensor: Tensor, rows: int, columns: int, boxed: bool) -> list[Any]:
    """A launch's values for such a tensor."""
    if boxed:
        return Box(tensor, rows, columns).values
    return [tensor, *tensor.stride()[:3]]


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """Those among a launch's values, boxed ones too."""
    return [v.tensor if isinstance(v, Box) else v for v in values
            if isinstance(v, Tensor | Box)]


# What a launch is given of a tensor: its address; the interpreter takes it as it is.
pointer: Callable[[Tensor], Any] = (lambda tensor: tensor) if INTERPRETED else Tensor.data_ptr


class Kernel:
    """A kernel on a device, each launch of which is given a grid and the values of all
    parameters, in order, pointers as `pointer` gives them."""

    def __init__(self, key: str, device: torch.device, build: Callable[[], Source]) -> None:
        self.function, self._build = function(key, device, build), build

    def __call__(self, grid: Grid, values: list[Any], stream: int) -> None:
        if self.function is None:
            _interpret(self._build(), grid, values)
        else:
            values += [0] * (self.function.parameters - len(values))  # what Triton adds
            self.function.launch(grid, values, stream)


class Launch:
    """One kernel's launch. values: those of its parameters, in order, with tensors where it takes
    pointers and boxes where it takes descriptors; a call gives tensors in the same order. early:
    see Function.launch."""

    def __init__(self, function: Function | None, build: Callable[[], Source], grid: Grid,
                 values: Sequence[Any], early: bool = False) -> None:
        self._function, self._build, self._grid, self._early = function, build, grid, early
        self._slots = [i for i, v in enumerate(values) if isinstance(v, Tensor | Box)]
        self._values = [0 if isinstance(v, Tensor | Box) else v for v in values]
        self._maps = {i: v.map() for i, v in enumerate(values) if isinstance(v, Box)}
        if function is not None:
            self._values += [0] * (function.parameters - len(values))  # what Triton adds

    @property
    def functions(self) -> list[Function]:
        return [self._function] if self._function else []

    def fresh(self, values: Sequence[Any], stream: int) -> None:
        """A launch with the tensors among these values."""
        self(tensors_of(values), stream)

    def __call__(self, tensors: Sequence[Tensor], stream: int) -> None:
        values = self._values.copy()
        if self._function is None:
            for slot, tensor in zip(self._slots, tensors, strict=True):
                values[slot] = tensor
            _interpret(self._build(), self._grid, values)
        else:
            for slot, tensor in zip(self._slots, tensors, strict=True):
                values[slot] = tensor.data_ptr()
            for slot, made in self._maps.items():
                values[slot] = made.at(values[slot])
            self._function.launch(self._grid, values, stream, self._early)


_functions: dict[tuple[int, int], Function] = {}


def function(key: str, device: torch.device, build: Callable[[], Source]) -> Function | None:
    """The kernel on a device; None where Triton's interpreter runs it."""
    if INTERPRETED:
        return None
    code = binary(key, target(device.index), build)
    found = _functions.get((id(code), device.index))
    if found is None:
        found = _functions[id(code), device.index] = Function(code, device.index)
    return found


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one where it is not."""
    if device.type == "cpu" or device.index == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(device)


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


def _interpret(source: Source, grid: Grid, values: Sequence[Any]) -> None:
    rest = iter(values)
    arguments = [source.constants[name] if t == "constexpr" else _nested(t, rest)
                 for name, t in source.signature.items()]
    source.kernel[grid](*arguments)


def _nested(types: Any, values: Iterator[Any]) -> Any:
    if not isinstance(types, tuple):
        return next(values)
    items = [_nested(t, values) for t in types]
    return type(types)(*items) if hasattr(types, "_fields") else tuple(items)
