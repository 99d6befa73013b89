"""Each operation as an expression of the Triton language: the table of lower/triton.py.

Values of 16-bit floating types are held in float32, rounded after each operation; int64 is held
in int32 where ranges prove it (`Facts.narrow`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch

from flexattn.ir.graph import Node
from flexattn.ir.ops import FLOATS, INTEGERS, Op
from flexattn.lower.integer_ranges import Range

HALVES = frozenset({torch.float16, torch.bfloat16})
Target = Literal["cuda", "hip", "interpreter"]
TYPE_NAMES = {
    torch.bool: "int1", torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16",
    torch.int32: "int32", torch.int64: "int64", torch.float16: "float16",
    torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64",
}


@dataclass(frozen=True)
class Context:
    """What the expression of an operation may depend on besides its operands.

    fast: 16-bit attention inputs, whose rounding hides errors of 2^-11 in transcendentals.
    exact: arithmetic rounds once an operation, as `ir.evaluate` does: a mask must say of an
    element what was proved, or evaluated, of its block. On NVIDIA GPUs.
    """

    target: Target
    fast: bool
    ranges: dict[Node, Range]
    exact: bool = False

    def storage(self, n: Node) -> str:
        """The tl dtype a node's value is held in."""
        if n.dtype in HALVES:
            return "float32"
        if n.dtype is torch.int64:
            low, high = self.ranges[n]
            return "int32" if low >= -(1 << 31) and high < 1 << 31 else "int64"
        return TYPE_NAMES[n.dtype]


Entry = Callable[..., str]
_NARROW = (torch.int8, torch.uint8, torch.int16)


def literal(value: bool | int | float, dtype: torch.dtype = torch.float32) -> str:
    """A constant as source text, of its dtype. Triton reads a float as float32, so one of float64
    that is none is given by its bits."""
    if isinstance(value, float) and not math.isfinite(value):
        return 'float("nan")' if value != value else ('float("inf")' if value > 0
                                                      else '-float("inf")')
    if dtype is torch.float64 and isinstance(value, float) and not _is_single(value):
        bits, = struct.unpack("<q", struct.pack("<d", value))
        return f"tl.cast({bits}, tl.float64, bitcast=True)"
    if dtype is torch.float64:
        return f"tl.cast({value!r}, tl.float64)"
    if isinstance(value, float) and 0 < abs(value) < 2.0**-126:  # Triton would make it float64
        bits, = struct.unpack("<i", struct.pack("<f", value))
        return f"tl.cast({bits}, tl.float32, bitcast=True)"
    if dtype in _NARROW or (isinstance(value, int) and 1 << 31 <= value < 1 << 32):  # no uint32
        return f"tl.cast({value!r}, tl.{TYPE_NAMES[dtype]})"
    return repr(value)


def _is_single(value: float) -> bool:
    try:
        return bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False


def plain(text: str) -> str:
    """Without parentheses around the whole expression."""
    depth = [0]
    for letter in text:
        depth.append(depth[-1] + (letter == "(") - (letter == ")"))
    return text[1:-1] if text.startswith("(") and 0 not in depth[1:-1] else text


def _call(name: str, fast: str | None = None) -> Entry:
    def entry(c: Context, n: Node, *args: str) -> str:
        chosen = fast if fast and c.fast and n.dtype is not torch.float64 else name
        return f"{chosen}({', '.join(map(plain, args))})"

    return entry


def _wide_call(name: str, double: str, fast: str | None = None) -> Entry:
    """A function of device_math, which is made for float32; float64 takes libdevice's."""
    single = _call(name, fast)

    def entry(c: Context, n: Node, *args: str) -> str:
        if n.dtype is torch.float64 and c.target != "interpreter":
            return f"libdevice.{double}({', '.join(map(plain, args))})"
        return single(c, n, *args)

    return entry


def _infix(sign: str) -> Entry:
    return lambda c, n, x, y: f"{x} {sign} {y}"


def _compare(sign: str) -> Entry:
    """Triton's interpreter takes a comparison of reals for a real where it spreads one: there its
    result is written to a bool of its own."""
    def entry(c: Context, n: Node, x: str, y: str) -> str:
        if c.target == "interpreter" and n.args[0].dtype in FLOATS:
            return f"({x} {sign} {y}).to(tl.int8) != 0"
        return f"{x} {sign} {y}"

    return entry


def _tanh(c: Context, n: Node, x: str) -> str:
    fast = "math.tanh_approx" if c.target == "cuda" else "math.tanh_exp2"
    return _wide_call("math.tanh", "tanh", fast)(c, n, x)


def _sqrt(c: Context, n: Node, x: str) -> str:
    exact = n.dtype is torch.float32 and not c.fast
    return f"tl.sqrt_rn({x})" if exact else f"tl.sqrt({x})"


def _log(name: str) -> Entry:
    return lambda c, n, x: f"tl.{name}({x})"


def _round(c: Context, n: Node, x: str) -> str:
    magic = "6755399441055744.0" if n.dtype is torch.float64 else "12582912.0"
    return f"math.round_even({x}, {magic})"


def _negate(c: Context, n: Node, x: str) -> str:
    return f"{x} * -1.0" if n.dtype in FLOATS else f"0 - {x}"


def _sign(c: Context, n: Node, x: str) -> str:
    if n.dtype in FLOATS:
        zero = f"tl.where({x} == {x}, {x} * 0.0, 0.0)"  # torch's sign of NaN is 0
        return f"tl.where({x} > 0.0, 1.0, tl.where({x} < 0.0, -1.0, {zero}))"
    return f"({x} > 0).to(tl.{c.storage(n)}) - ({x} < 0).to(tl.{c.storage(n)})"


def _divide(c: Context, n: Node, x: str, y: str) -> str:
    """Fast: a product with the reciprocal of a constant."""
    divisor = n.args[1]
    if c.fast and n.dtype is not torch.float64 and divisor.is_const and divisor.attr:
        return f"{x} * {literal(1.0 / divisor.attr, n.dtype)}"
    if c.exact and c.target == "cuda" and n.dtype is not torch.float64:
        return f"tl.div_rn({plain(x)}, {plain(y)})"
    return f"{x} / {y}"


def _multiply(c: Context, n: Node, x: str, y: str) -> str:
    """Exact: never part of a fused multiply-add."""
    name = {torch.float32: "product", torch.float64: "double_product"}.get(n.dtype)
    if c.exact and c.target == "cuda" and name:
        return f"math.{name}({plain(x)}, {plain(y)})"
    return f"{x} * {y}"


def _floor_divide(c: Context, n: Node, x: str, y: str) -> str:
    if n.dtype in FLOATS:
        return f"math.float_floor_divide({x}, {y})"
    (low, _), (least, _) = (c.ranges[a] for a in n.args)
    if low >= 0 and least > 0:
        return f"{x} // {y}"
    if least > 0 and not n.args[0].is_const:
        return f"math.floor_divide_by_positive({plain(x)}, {plain(y)})"
    return f"math.floor_divide({plain(x)}, {plain(y)})"


def _modulo(c: Context, n: Node, x: str, y: str) -> str:
    if n.dtype in FLOATS:
        return f"math.float_modulo({x}, {y})"
    (low, _), (least, _) = (c.ranges[a] for a in n.args)
    if low >= 0 and least > 0:
        return f"{x} % {y}"
    return f"math.floor_modulo({x}, {y})"


def _power(c: Context, n: Node, x: str, y: str) -> str:
    exponent = n.args[1]
    if exponent.is_const and exponent.attr in (2, 3, 4):
        return reduce(lambda found, y: _multiply(c, n, found, y), [x] * int(exponent.attr))
    if n.dtype in INTEGERS:
        bits = max(c.ranges[exponent][1].bit_length(), 1)
        return f"math.integer_power({x}, {y}, {min(bits, 63)})"
    if c.target == "interpreter":
        return f"math.power({x}, {y})"
    return f"libdevice.pow({x}, {y})"


def _extremum(name: str) -> Entry:
    def entry(c: Context, n: Node, x: str, y: str) -> str:
        nan = ", propagate_nan=tl.PropagateNan.ALL" if n.dtype in FLOATS else ""
        return f"tl.{name}({plain(x)}, {plain(y)}{nan})"

    return entry


def _cast(c: Context, n: Node, x: str) -> str:
    if n.dtype is torch.bool:
        return _compare("!=")(c, n, x, "0")
    if n.args[0].op is Op.NUMBER:
        return f"tl.cast({x}, tl.{c.storage(n)})"
    if c.storage(n) == c.storage(n.args[0]):
        return x
    return f"{x}.to(tl.{c.storage(n)})"


def _sigmoid(c: Context, n: Node, x: str) -> str:
    if n.dtype is torch.float64:
        return f"1.0 / (1.0 + tl.exp(0.0 - {x}))"
    return _call("math.sigmoid", "math.sigmoid_exp2")(c, n, x)


def _exp(c: Context, n: Node, x: str) -> str:
    if n.dtype is torch.float64:
        return f"tl.exp({x})"
    return f"tl.exp2({x} * {math.log2(math.e)!r})" if c.fast else f"math.exp({x})"


TABLE: dict[Op, Entry] = {
    Op.CAST: _cast,
    Op.SQRT: _sqrt,
    Op.RSQRT: _call("tl.rsqrt"),
    Op.EXP: _exp,
    Op.EXP2: _call("tl.exp2"),
    Op.EXPM1: _wide_call("math.expm1", "expm1"),
    Op.LOG: _log("log"),
    Op.LOG2: _log("log2"),
    Op.LOG1P: _wide_call("math.log1p", "log1p"),
    Op.SIN: _call("tl.sin"),
    Op.COS: _call("tl.cos"),
    Op.TANH: _tanh,
    Op.SIGMOID: _sigmoid,
    Op.ERF: _call("tl.erf"),
    Op.FLOOR: _call("tl.floor"),
    Op.CEIL: _call("tl.ceil"),
    Op.TRUNC: lambda c, n, x: f"tl.where({x} < 0.0, tl.ceil({x}), tl.floor({x}))",
    Op.ROUND: _round,
    Op.NEG: _negate,
    Op.ABS: _call("tl.abs"),
    Op.SIGN: _sign,
    Op.NOT: lambda c, n, x: f"({x} ^ 255)" if n.dtype is torch.uint8 else f"(~{x})",
    Op.ADD: _infix("+"),
    Op.SUB: _infix("-"),
    Op.MUL: _multiply,
    Op.DIV: _divide,
    Op.FLOORDIV: _floor_divide,
    Op.MOD: _modulo,
    Op.POW: _power,
    Op.MIN: _extremum("minimum"),
    Op.MAX: _extremum("maximum"),
    Op.AND: _infix("&"),
    Op.OR: _infix("|"),
    Op.XOR: _infix("^"),
    Op.SHL: _infix("<<"),
    Op.SHR: _infix(">>"),
    Op.LT: _compare("<"),
    Op.LE: _compare("<="),
    Op.EQ: _compare("=="),
    Op.NE: _compare("!="),
    Op.WHERE: _call("tl.where"),
}
