"""Which torch function, method or operator means which operations of the graph.

In: the function's name as torch spells it and its arguments, some of them proxies. Out: a proxy.
`FUNCTIONS` is the whole list of what a mod may call; pointwise functions without an Op of their
own are composed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flexattn.errors import UnsupportedOpError, message, user_location
from flexattn.ir.ops import Op
from flexattn.trace.proxy import Proxy, Tape, View, compare

Rule = Callable[..., Any]


def _float(op: Op) -> Rule:
    return lambda t, input: t.float_apply(op, input)


def _rounding(op: Op) -> Rule:
    """floor, ceil, ...: the identity on integers."""
    return lambda t, input: (t.apply(op, input) if t.wrap(input).dtype.is_floating_point
                             else t.wrap(input))


def _number(op: Op) -> Rule:
    return lambda t, input: t.apply(op, input)


def _arithmetic(op: Op) -> Rule:
    return lambda t, input, other: t.apply(op, input, other, at_least=torch.int64)


def _logic_of_bool(op: Op, bool_op: Op) -> Rule:
    """mul, minimum, maximum of two bools are logic."""

    def rule(t: Tape, input: Any, other: Any) -> Proxy:
        args, dtype = t.operands(input, other)
        return t.record(bool_op if dtype is torch.bool else op, dtype, tuple(a.index for a in args))

    return rule


def _bitwise(op: Op) -> Rule:
    return lambda t, input, other: t.apply(op, input, other)


def _comparison(op: Op, swap: bool = False) -> Rule:
    if swap:
        return lambda t, input, other: compare(t, op, other, input)
    return lambda t, input, other: compare(t, op, input, other)


def _logical(op: Op) -> Rule:
    return lambda t, input, other: t.apply(op, _truth(t, input), _truth(t, other))


def _truth(t: Tape, x: Any) -> Proxy:
    return t.cast(t.wrap(x), torch.bool)


def _reflected(rule: Rule) -> Rule:
    return lambda t, input, other: rule(t, other, input)


def _scaled(rule: Rule, op: Op) -> Rule:
    """torch.add and torch.sub with their alpha."""

    def scaled(t: Tape, input: Any, other: Any, *, alpha: Any = 1) -> Proxy:
        if isinstance(alpha, int) and alpha == 1:
            return rule(t, input, other)
        return rule(t, input, _mul(t, other, alpha))

    return scaled


_mul = _logic_of_bool(Op.MUL, Op.AND)
_add = _logic_of_bool(Op.ADD, Op.OR)
_sub = _arithmetic(Op.SUB)
_min = _logic_of_bool(Op.MIN, Op.AND)
_max = _logic_of_bool(Op.MAX, Op.OR)


def _div(t: Tape, input: Any, other: Any, *, rounding_mode: str | None = None) -> Proxy:
    if rounding_mode == "floor":
        return t.apply(Op.FLOORDIV, input, other, at_least=torch.int64)
    quotient = t.float_apply(Op.DIV, input, other)
    if rounding_mode is None:
        return quotient
    (x, y), dtype = t.operands(input, other)
    if dtype.is_floating_point:
        return t.record(Op.TRUNC, quotient.dtype, (quotient.index,))
    size = t.apply(Op.FLOORDIV, t.apply(Op.ABS, x), t.apply(Op.ABS, y))
    negative = t.apply(Op.XOR, compare(t, Op.LT, x, 0), compare(t, Op.LT, y, 0))
    return _where(t, negative, t.apply(Op.NEG, size), size)


def _fmod(t: Tape, input: Any, other: Any) -> Proxy:
    """The remainder with the sign of the dividend."""
    size = t.apply(Op.MOD, t.apply(Op.ABS, input), t.apply(Op.ABS, other))
    return _where(t, compare(t, Op.LT, input, 0), t.apply(Op.NEG, size), size)


def _pow(t: Tape, input: Any, exponent: Any) -> Proxy:
    return t.apply(Op.POW, input, exponent, at_least=torch.int64)


def _where(t: Tape, condition: Any, input: Any, other: Any) -> Proxy:
    (x, y), dtype = t.operands(input, other)
    condition = _truth(t, condition)
    return t.record(Op.WHERE, dtype, (condition.index, x.index, y.index))


def _clamp(t: Tape, input: Any, min: Any = None, max: Any = None) -> Proxy:
    out = t.wrap(input)
    if min is not None:
        out = t.apply(Op.MAX, out, min)
    return out if max is None else t.apply(Op.MIN, out, max)


def _not(t: Tape, input: Any) -> Proxy:
    return t.apply(Op.NOT, input)


def _to(t: Tape, input: Any, *args: Any, **kwargs: Any) -> Proxy:
    """x.to(dtype), x.to(device), x.to(other): only the dtype matters."""
    dtypes = [a if isinstance(a, torch.dtype) else a.dtype for a in (*args, *kwargs.values())
              if isinstance(a, (torch.dtype, torch.Tensor, Proxy))]
    return t.cast(t.wrap(input), dtypes[0]) if dtypes else t.wrap(input)


def _cast_to(dtype: torch.dtype) -> Rule:
    return lambda t, input, *_, **__: t.cast(t.wrap(input), dtype)


def _filled(t: Tape, like: Any, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Proxy:
    if not isinstance(like, Proxy):
        raise UnsupportedOpError(message("A mod makes a tensor that is not a scalar.",
                                         remedy="make it outside of the mod and capture it",
                                         where=user_location()))
    return t.cast(t.wrap(value), dtype or like.dtype)


def _new(value: Any) -> Rule:
    return lambda t, like, *_, dtype=None, **__: _filled(t, like, value, dtype)


def _identity(t: Tape, input: Any, *_: Any, **__: Any) -> Any:
    return input


def _relu(t: Tape, input: Any, inplace: bool = False) -> Proxy:
    return t.apply(Op.MAX, input, 0)


def _silu(t: Tape, input: Any, inplace: bool = False) -> Proxy:
    return _mul(t, input, t.float_apply(Op.SIGMOID, input))


def _gelu(t: Tape, input: Any, approximate: str = "none") -> Proxy:
    half = _mul(t, input, 0.5)
    if approximate == "none":
        erf = t.float_apply(Op.ERF, _mul(t, input, math.sqrt(0.5)))
        return _mul(t, half, _add(t, erf, 1))
    cube = _mul(t, _mul(t, input, input), input)
    inner = _mul(t, _add(t, input, _mul(t, cube, 0.044715)), math.sqrt(2 / math.pi))
    return _mul(t, half, _add(t, t.float_apply(Op.TANH, inner), 1))


def _softplus(t: Tape, input: Any, beta: float = 1.0, threshold: float = 20.0) -> Proxy:
    scaled = _mul(t, input, beta)
    soft = _div(t, t.float_apply(Op.LOG1P, t.float_apply(Op.EXP, scaled)), beta)
    return _where(t, compare(t, Op.LT, threshold, scaled), input, soft)


def _leaky_relu(t: Tape, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Proxy:
    return _where(t, compare(t, Op.LT, 0, input), input, _mul(t, input, negative_slope))


def _elu(t: Tape, input: Any, alpha: float = 1.0, inplace: bool = False) -> Proxy:
    negative = _mul(t, t.float_apply(Op.EXPM1, input), alpha)
    return _where(t, compare(t, Op.LT, 0, input), input, negative)


def _logsigmoid(t: Tape, input: Any) -> Proxy:
    size = t.apply(Op.NEG, t.apply(Op.ABS, input))
    return _sub(t, t.apply(Op.MIN, input, 0), t.float_apply(Op.LOG1P, t.float_apply(Op.EXP, size)))


def _hyperbolic(sign: Op) -> Rule:
    def rule(t: Tape, input: Any) -> Proxy:
        up = t.float_apply(Op.EXP, input)
        down = t.float_apply(Op.EXP, t.apply(Op.NEG, input))
        return _mul(t, t.apply(sign, up, down), 0.5)

    return rule


def _isnan(t: Tape, input: Any) -> Proxy:
    return compare(t, Op.NE, input, input)


def _isinf(t: Tape, input: Any) -> Proxy:
    return compare(t, Op.EQ, t.apply(Op.ABS, input), float("inf"))


def _isfinite(t: Tape, input: Any) -> Proxy:
    return compare(t, Op.LT, t.apply(Op.ABS, input), float("inf"))


_FLOATS = {
    "sqrt": Op.SQRT, "rsqrt": Op.RSQRT, "exp": Op.EXP, "exp2": Op.EXP2, "expm1": Op.EXPM1,
    "log": Op.LOG, "log2": Op.LOG2, "log1p": Op.LOG1P, "sin": Op.SIN, "cos": Op.COS,
    "tanh": Op.TANH, "sigmoid": Op.SIGMOID, "erf": Op.ERF,
}
_ROUNDINGS = {"floor": Op.FLOOR, "ceil": Op.CEIL, "trunc": Op.TRUNC, "fix": Op.TRUNC,
              "round": Op.ROUND}
_NUMBERS = {"neg": Op.NEG, "negative": Op.NEG, "abs": Op.ABS, "absolute": Op.ABS, "sign": Op.SIGN}
_BITS = {"bitwise_and": Op.AND, "bitwise_or": Op.OR, "bitwise_xor": Op.XOR,
         "bitwise_left_shift": Op.SHL, "bitwise_right_shift": Op.SHR}
_COMPARISONS = {"lt": (Op.LT, False), "less": (Op.LT, False), "le": (Op.LE, False),
                "less_equal": (Op.LE, False), "gt": (Op.LT, True), "greater": (Op.LT, True),
                "ge": (Op.LE, True), "greater_equal": (Op.LE, True), "eq": (Op.EQ, False),
                "ne": (Op.NE, False), "not_equal": (Op.NE, False)}
_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16,
           "bfloat16": torch.bfloat16, "int": torch.int32, "long": torch.int64,
           "short": torch.int16, "char": torch.int8, "bool": torch.bool}

FUNCTIONS: dict[str, Rule] = {
    **{name: _float(op) for name, op in _FLOATS.items()},
    **{name: _rounding(op) for name, op in _ROUNDINGS.items()},
    **{name: _number(op) for name, op in _NUMBERS.items()},
    **{name: _bitwise(op) for name, op in _BITS.items()},
    **{name: _comparison(op, swap) for name, (op, swap) in _COMPARISONS.items()},
    **{name: _cast_to(dtype) for name, dtype in _DTYPES.items()},
    "add": _scaled(_add, Op.ADD),
    "sub": _scaled(_sub, Op.SUB),
    "subtract": _scaled(_sub, Op.SUB),
    "rsub": _reflected(_sub),
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "floor_divide": _arithmetic(Op.FLOORDIV),
    "remainder": _arithmetic(Op.MOD),
    "fmod": _fmod,
    "pow": _pow,
    "square": lambda t, input: _mul(t, input, input),
    "reciprocal": lambda t, input: t.float_apply(Op.DIV, 1, input),
    "minimum": _min,
    "maximum": _max,
    "min": _min,
    "max": _max,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda t, input, min: _clamp(t, input, min),
    "clamp_max": lambda t, input, max: _clamp(t, input, None, max),
    "where": _where,
    "bitwise_not": _not,
    "logical_not": lambda t, input: _not(t, _truth(t, input)),
    "logical_and": _logical(Op.AND),
    "logical_or": _logical(Op.OR),
    "logical_xor": _logical(Op.XOR),
    "masked_fill": lambda t, input, mask, value: t.cast(_where(t, mask, value, input),
                                                        t.wrap(input).dtype),
    "to": _to,
    "type_as": _to,
    "detach": _identity,
    "clone": _identity,
    "contiguous": _identity,
    "squeeze": _identity,
    "zeros_like": _new(0),
    "ones_like": _new(1),
    "full_like": _filled,
    "new_zeros": _new(0),
    "new_ones": _new(1),
    "new_full": lambda t, like, size, fill_value, dtype=None, **_: _filled(
        t, like, fill_value, dtype),
    "new_tensor": lambda t, like, data, dtype=None, **_: _filled(t, like, data, dtype),
    "isnan": _isnan,
    "isinf": _isinf,
    "isfinite": _isfinite,
    "tan": lambda t, input: _div(t, t.float_apply(Op.SIN, input), t.float_apply(Op.COS, input)),
    "sinh": _hyperbolic(Op.SUB),
    "cosh": _hyperbolic(Op.ADD),
    "log10": lambda t, input: _mul(t, t.float_apply(Op.LOG2, input), math.log10(2)),
    "logsigmoid": _logsigmoid,
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
    "softplus": _softplus,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "hardtanh": lambda t, input, min_val=-1.0, max_val=1.0, inplace=False: _clamp(
        t, input, min_val, max_val),
}

OPERATORS: dict[str, Rule] = {
    "__add__": _add, "__sub__": _sub, "__mul__": _mul, "__truediv__": _div,
    "__floordiv__": FUNCTIONS["floor_divide"], "__mod__": FUNCTIONS["remainder"], "__pow__": _pow,
    "__and__": FUNCTIONS["bitwise_and"], "__or__": FUNCTIONS["bitwise_or"],
    "__xor__": FUNCTIONS["bitwise_xor"], "__lshift__": FUNCTIONS["bitwise_left_shift"],
    "__rshift__": FUNCTIONS["bitwise_right_shift"], "__lt__": FUNCTIONS["lt"],
    "__le__": FUNCTIONS["le"], "__gt__": FUNCTIONS["gt"], "__ge__": FUNCTIONS["ge"],
    "__eq__": FUNCTIONS["eq"], "__ne__": FUNCTIONS["ne"], "__neg__": FUNCTIONS["neg"],
    "__pos__": _identity, "__invert__": _not, "__abs__": FUNCTIONS["abs"],
}
OPERATORS.update({f"__r{name[2:]}": _reflected(OPERATORS[name]) for name in (
    "__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__")})
FUNCTIONS.update(OPERATORS)


def _operator(rule: Rule) -> Callable[..., Any]:
    def method(self: Proxy | View, *args: Any) -> Any:
        return rule(self.tape, self, *args)

    return method


for _name, _rule in OPERATORS.items():
    setattr(Proxy, _name, _operator(_rule))
