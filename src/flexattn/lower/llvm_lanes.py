"""How the values of a mod's nodes are held in LLVM IR.

float32 and float64 are float and double; float16 and bfloat16 are float, rounded after each
operation; integers have their width, but an int64 whose range fits is held in 32-bit vector lanes
(never as a scalar); bool is i1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from flexattn.ir.graph import Node
from flexattn.ir.ops import FLOATS, INTEGERS
from flexattn.lower.integer_ranges import Range, full_range
from flexattn.lower.llvm_math import Math

Value = Any  # the emitter's value: has .type and .name

HALVES = frozenset({torch.float16, torch.bfloat16})
INTEGER_TYPES = {torch.bool: "i1", torch.int8: "i8", torch.uint8: "i8", torch.int16: "i16",
                 torch.int32: "i32", torch.int64: "i64"}


def real_type(dtype: torch.dtype) -> str:
    return "double" if dtype is torch.float64 else "float"


def width(type: str) -> int:
    """Bits of an integer type or of the elements of a vector of integers."""
    return int(type.rstrip(">").rsplit("i", 1)[1])


class Lanes:
    """Types and conversions in `count` lanes, of scalars for 0; `ranges` bounds integer nodes."""

    def __init__(self, e: Any, count: int, ranges: Mapping[Node, Range]) -> None:
        self.e, self.count, self._ranges = e, count, ranges

    # Types and constants

    def vector(self, scalar: str) -> str:
        return f"<{self.count} x {scalar}>" if self.count else scalar

    def range(self, n: Node) -> Range:
        return self._ranges.get(n) or full_range(n.dtype)

    def is_narrow(self, n: Node) -> bool:
        """An int64 that is the same in 32 bits."""
        if n.dtype is not torch.int64:
            return False
        low, high = self.range(n)
        return low >= -(2**31) and high < 2**31

    def type(self, n: Node) -> str:
        if n.dtype in FLOATS:
            return self.vector(real_type(n.dtype))
        return self.vector("i32" if self.count and self.is_narrow(n) else INTEGER_TYPES[n.dtype])

    def const(self, like: Value, value: bool | int | float) -> Value:
        return self.e.const(like.type, value)

    def constant(self, n: Node) -> Value:
        """The value of a CONST node."""
        value = n.attr
        if n.dtype in HALVES:
            value = torch.tensor(value, dtype=n.dtype).item()
        return self.e.const(self.type(n), value)

    def math(self, real: str) -> Math:
        return self._float if real == "float" else self._double

    @cached_property
    def _float(self) -> Math:
        return Math(self.e, self.count, "float")

    @cached_property
    def _double(self) -> Math:
        return Math(self.e, self.count, "double")

    # Conversions

    def resize(self, x: Value, type: str, signed: bool = True) -> Value:
        """An integer in another width."""
        have, want = width(x.type), width(type)
        if have == want:
            return x
        opcode = "trunc" if have > want else "sext" if signed else "zext"
        return self.e.cast(opcode, x, type)

    def widest(self, n: Node, *args: Value) -> list[Value]:
        """Integer arguments in the widest of their types and the node's own."""
        types = [a.type for a in args] + ([self.type(n)] if n.dtype in INTEGERS else [])
        type = max(types, key=width)
        return [self.resize(a, type) for a in args]

    def round_half(self, x: Value, dtype: torch.dtype) -> Value:
        """A float rounded to float16 or bfloat16, still as a float."""
        e = self.e
        if dtype is torch.float16:
            return e.cast("fpext", e.cast("fptrunc", x, self.vector("half")), x.type)
        bits = e.cast("bitcast", x, self.vector("i32"))
        odd = e.and_(e.op("lshr", bits, self.const(bits, 16)), self.const(bits, 1))
        rounded = e.add(bits, e.add(odd, self.const(bits, 0x7FFF)))
        rounded = e.and_(rounded, self.const(bits, -0x10000))
        return e.select(e.compare("uno", x, x), x, e.cast("bitcast", rounded, x.type))

    def half_to_float(self, x: Value, dtype: torch.dtype) -> Value:
        """The bits of a float16 or bfloat16 as a float."""
        e = self.e
        if dtype is torch.float16:
            half = e.cast("bitcast", x, self.vector("half"))
            return e.cast("fpext", half, self.vector("float"))
        bits = e.cast("zext", x, self.vector("i32"))
        return e.cast("bitcast", e.op("shl", bits, self.const(bits, 16)), self.vector("float"))
