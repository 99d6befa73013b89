"""TMA descriptors of tensors in a GPU's memory, encoded by the driver.

In: a tensor [batch, head, row, column] with contiguous columns, whose other strides are multiples
of 16 bytes, and the box of rows and columns that one copy brings to shared memory. Out: the
descriptor's 128 bytes. Rejects: what the driver refuses (RuntimeError with its words).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexattn.runtime.gpu_driver import driver, target

_BYTES = 128
# CUtensorMapDataType; float32 is rounded to tf32 on its way unless it is to stay exact
_TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float32: 11}
_EXACT_FLOAT32 = 7
_SWIZZLES = {32: 1, 64: 2, 128: 3}  # by the bytes of a box's row
_L2_PROMOTION_128 = 2
_MOST_ADDRESSES = 64


@cache
def _encode() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    function.argtypes = [c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64),
                         POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32), *[c_int] * 4]
    return function


class TensorMap:
    """Descriptors of tensors that differ in their address only. exact: float32 stays as it is.
    swizzled: a box's rows lie in shared memory as tensor cores read them, not one by one."""

    def __init__(self, tensor: Tensor, rows: int, columns: int, exact: bool = False,
                 swizzled: bool = True) -> None:
        size = tensor.element_size()
        self._type = _EXACT_FLOAT32 if exact and size == 4 else _TYPES[tensor.dtype]
        self._swizzle = _SWIZZLES[columns * size] if swizzled else 0
        self._shape = (c_uint64 * 4)(*reversed(tensor.shape))
        # A dimension of one element has any stride.
        strides = [stride * size if length > 1 else 16
                   for stride, length in zip(tensor.stride()[:3], tensor.shape, strict=False)]
        self._strides = (c_uint64 * 3)(*reversed(strides))
        self._box, self._steps = (c_uint32 * 4)(columns, rows, 1, 1), (c_uint32 * 4)(1, 1, 1, 1)
        self._made: dict[int, bytes] = {}

    def at(self, address: int) -> bytes:
        """The descriptor of the tensor that begins there."""
        found = self._made.get(address)
        if found is None:
            if len(self._made) >= _MOST_ADDRESSES:
                self._made.clear()
            found = self._made[address] = self._made_at(address)
        return found

    def _made_at(self, address: int) -> bytes:
        space = ctypes.create_string_buffer(_BYTES + 64)
        skip = -ctypes.addressof(space) % 64
        code = _encode()(byref(space, skip), self._type, 4, address, self._shape, self._strides,
                         self._box, self._steps, 0, self._swizzle, _L2_PROMOTION_128, 0)
        driver().check(code, "encoding a TMA descriptor")
        return space.raw[skip:skip + _BYTES]


def has_tma(device: torch.device) -> bool:
    """Hopper and what came after it."""
    found = target(device.index) if device.type == "cuda" else None
    return found is not None and isinstance(found.arch, int) and found.arch >= 90


def takes(tensor: Tensor) -> bool:
    """Whether TMA can read the tensor as it lies in memory."""
    *strides, columns = tensor.stride()
    if columns != 1 or tensor.data_ptr() % 16:
        return False
    size = tensor.element_size()
    for stride, length in zip(strides, tensor.shape, strict=False):
        if length != 1 and (not 0 < stride * size < 1 << 40 or stride * size % 16):
            return False
    return True
