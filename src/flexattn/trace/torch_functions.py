"""Which torch function, method or operator means which operations of the graph.

In: the function's name as torch spells it and its arguments, some of them proxies. Out: a proxy,
of torch's dtype. `FUNCTIONS` is the whole list of what a mod may call; pointwise functions without
an Op of their own are in compositions.py. Rejects operand types that torch rejects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexattn.errors import UnsupportedOpError, message, user_location
from flexattn.ir.ops import CLAMP, Op, dtype_name
from flexattn.trace.compositions import COMPOSED
from flexattn.trace.proxy import NUMBERS, Proxy, Tape, View, compare

Rule = Callable[..., Any]


def _refuse(dtype: torch.dtype, what: str, remedy: str) -> None:
    raise UnsupportedOpError(message(f"A mod computes {what} of {dtype_name(dtype)}, which torch "
                                     "does not define.", remedy=remedy, where=user_location()))


def _float(op: Op) -> Rule:
    return lambda t, input: t.float_apply(op, input)


def _number(op: Op) -> Rule:
    def rule(t: Tape, input: Any) -> Proxy:
        value = t.wrap(input)
        if value.dtype is torch.bool:
            _refuse(torch.bool, op.name.lower(), "convert it with .int() first")
        return t.apply(op, value)

    return rule


def _rounding(op: Op) -> Rule:
    """floor, ceil, ...: the identity on integers."""
    number = _number(op)
    return lambda t, input: (t.wrap(input) if _is_integer(t.wrap(input)) else number(t, input))


def _is_integer(x: Proxy) -> bool:
    return not x.dtype.is_floating_point and x.dtype is not torch.bool


def _round(t: Tape, input: Any, *, decimals: int = 0) -> Proxy:
    value = t.wrap(input)
    if decimals == 0 or not value.dtype.is_floating_point:
        return _rounding(Op.ROUND)(t, value)
    scale = 10.0 ** abs(decimals)
    if decimals > 0:
        return _div(t, t.apply(Op.ROUND, _mul(t, value, scale)), scale)
    return _mul(t, t.apply(Op.ROUND, _div(t, value, scale)), scale)


def _sign(t: Tape, input: Any) -> Proxy:
    value = t.wrap(input)
    return value if value.dtype is torch.bool else t.apply(Op.SIGN, value)


def _arithmetic(op: Op) -> Rule:
    def rule(t: Tape, input: Any, other: Any) -> Proxy:
        args, dtype = t.operands(input, other)
        if dtype is torch.bool:
            _refuse(dtype, op.name.lower(), "convert one with .int() first")
        return t.record(op, dtype, tuple([a.index for a in args]))

    return rule


def _logic_of_bool(op: Op, bool_op: Op) -> Rule:
    """mul, minimum, maximum of two bools are logic."""

    def rule(t: Tape, input: Any, other: Any) -> Proxy:
        args, dtype = t.operands(input, other)
        op_of_dtype = bool_op if dtype is torch.bool else op
        return t.record(op_of_dtype, dtype, tuple([a.index for a in args]))

    return rule


def _bitwise(op: Op) -> Rule:
    shift = op in (Op.SHL, Op.SHR)

    def rule(t: Tape, input: Any, other: Any) -> Proxy:
        args, dtype = t.operands(input, other)
        if dtype.is_floating_point or (shift and dtype is torch.bool):
            _refuse(dtype, op.name.lower(), "use torch.where or a comparison, or convert it")
        return t.record(op, dtype, tuple([a.index for a in args]))

    return rule


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

_min = _logic_of_bool(Op.MIN, Op.AND)
_max = _logic_of_bool(Op.MAX, Op.OR)
_power = _arithmetic(Op.POW)
_OWN_POWERS = (0.5, -0.5, 2, 3, -1, -2)


def _pow(t: Tape, input: Any, exponent: Any) -> Proxy:
    """Exponents that torch has a shorter way for are part of what is computed, not numbers that
    may vary."""
    if exponent is True:
        return t.wrap(input)
    if isinstance(exponent, (int, float)) and not isinstance(input, NUMBERS):
        _, common = t.operands(input, exponent)
        if exponent < 0 and not common.is_floating_point:
            _refuse(common, "a negative power", "convert it with .float() first")
        if exponent in _OWN_POWERS:
            exponent = t.literal(exponent, common)
    return _power(t, input, exponent)


def _sub(t: Tape, input: Any, other: Any) -> Proxy:
    for x in (input, other):
        if isinstance(x, bool) or getattr(x, "dtype", None) is torch.bool:
            _refuse(torch.bool, "sub", "use ^ or ~, or convert it with .int() first")
    return t.apply(Op.SUB, input, other)


def _div(t: Tape, input: Any, other: Any, *, rounding_mode: str | None = None) -> Proxy:
    if rounding_mode == "floor":
        return t.apply(Op.FLOORDIV, input, other, at_least=torch.int64)
    quotient = t.float_apply(Op.DIV, input, other)
    if rounding_mode is None:
        return quotient
    (x, y), dtype = t.operands(input, other)
    if dtype.is_floating_point:
        return t.record(Op.TRUNC, quotient.dtype, (quotient.index,))
    floor = t.apply(Op.FLOORDIV, x, y)
    inexact = compare(t, Op.NE, t.apply(Op.MUL, floor, y), x)
    upward = t.apply(Op.AND, _opposite(t, x, y), inexact)
    return _where(t, upward, t.apply(Op.ADD, floor, 1), floor)


def _opposite(t: Tape, x: Proxy, y: Proxy) -> Proxy:
    """Whether the signs of two integers differ."""
    return t.apply(Op.XOR, compare(t, Op.LT, x, 0), compare(t, Op.LT, y, 0))


def _fmod(t: Tape, input: Any, other: Any) -> Proxy:
    """The remainder with the sign of the dividend, that of a zero included."""
    (x, y), dtype = t.operands(input, other)
    if not dtype.is_floating_point:  # the least integer has no absolute value
        rest = _arithmetic(Op.MOD)(t, x, y)
        apart = t.apply(Op.AND, _opposite(t, x, y), compare(t, Op.NE, rest, 0))
        return _where(t, apart, t.apply(Op.SUB, rest, y), rest)
    size = _arithmetic(Op.MOD)(t, t.apply(Op.ABS, x), t.apply(Op.ABS, y))
    zero = t.apply(Op.AND, compare(t, Op.EQ, size, 0), compare(t, Op.EQ, x, 0))
    size = _where(t, zero, x, size)
    return _where(t, compare(t, Op.LT, x, 0), t.apply(Op.NEG, size), size)


def _quotient_of(t: Tape, input: Any, other: Any) -> Proxy:
    """number / x: torch multiplies with the reciprocal."""
    return _mul(t, t.float_apply(Op.DIV, 1, input), other)


def _where_method(t: Tape, input: Any, condition: Any, other: Any) -> Proxy:
    return _where(t, condition, input, other)


def _where(t: Tape, condition: Any, input: Any, other: Any) -> Proxy:
    (x, y), dtype = t.operands(input, other)
    condition = _truth(t, condition)
    return t.record(Op.WHERE, dtype, (condition.index, x.index, y.index))


def _clamp(t: Tape, input: Any, min: Any = None, max: Any = None) -> Proxy:
    out = t.wrap(input)
    for op, bound in ((Op.MAX, min), (Op.MIN, max)):
        if bound is not None:
            args, dtype = t.operands(out, bound)
            out = t.record(op, dtype, tuple([a.index for a in args]), CLAMP)
    return out


def _not(t: Tape, input: Any) -> Proxy:
    value = t.wrap(input)
    if value.dtype.is_floating_point:
        _refuse(value.dtype, "bitwise_not", "compare it first, for example x == 0")
    return t.apply(Op.NOT, value)


def _to(t: Tape, input: Any, *args: Any, **kwargs: Any) -> Proxy:
    """x.to(dtype), x.to(device), x.to(other): only the dtype matters."""
    dtypes = [a if isinstance(a, torch.dtype) else a.dtype for a in (*args, *kwargs.values())
              if isinstance(a, (torch.dtype, torch.Tensor, Proxy))]
    return t.cast(t.wrap(input), dtypes[0]) if dtypes else t.wrap(input)


def _cast_to(dtype: torch.dtype) -> Rule:
    return lambda t, input, *_, **__: t.cast(t.wrap(input), dtype)


def _filled(t: Tape, like: Any, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Proxy:
    if not isinstance(like, Proxy):
        _not_a_scalar()
    return t.cast(t.wrap(value), dtype or like.dtype)


def _not_a_scalar() -> None:
    raise UnsupportedOpError(message("A mod makes a tensor that is not a scalar.",
                                     remedy="make it outside of the mod and capture it",
                                     where=user_location()))


def _like(value: Any) -> Rule:
    return lambda t, like, dtype=None, **_: _filled(t, like, value, dtype)


def _new(value: Any) -> Rule:
    def rule(t: Tape, like: Any, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Proxy:
        if any(n != () for n in map(_as_tuple, size)):
            _not_a_scalar()
        return _filled(t, like, value, dtype)

    return rule


def _as_tuple(size: Any) -> Any:
    return tuple(size) if isinstance(size, (list, tuple)) else size


def _new_full(t: Tape, like: Any, size: Any, fill_value: Any, dtype: torch.dtype | None = None,
              **_: Any) -> Proxy:
    if _as_tuple(size) != ():
        _not_a_scalar()
    return _filled(t, like, fill_value, dtype)


def _new_tensor(t: Tape, like: Any, data: Any, dtype: torch.dtype | None = None,
                **_: Any) -> Proxy:
    """As torch.tensor: the dtype is the data's own."""
    made = t.wrap(data)
    default = torch.get_default_dtype() if isinstance(data, float) else made.dtype
    return t.cast(made, dtype or default)


def _identity(t: Tape, input: Any, *_: Any, **__: Any) -> Any:
    return input


def _detach(t: Tape, input: Any) -> Any:
    if isinstance(input, Proxy) and not input.dtype.is_floating_point:
        return input
    raise UnsupportedOpError(message(
        "A mod detaches a traced value.", expected="a mod whose every value has its gradient",
        remedy="detach a captured tensor outside of the mod", where=user_location()))


def _composed(fn: Callable) -> Rule:
    return lambda t, *args, **kwargs: fn(*args, **kwargs)


_FLOATS = {
    "sqrt": Op.SQRT, "rsqrt": Op.RSQRT, "exp": Op.EXP, "exp2": Op.EXP2, "expm1": Op.EXPM1,
    "log": Op.LOG, "log2": Op.LOG2, "log1p": Op.LOG1P, "sin": Op.SIN, "cos": Op.COS,
    "tanh": Op.TANH, "sigmoid": Op.SIGMOID, "erf": Op.ERF,
}
_ROUNDINGS = {"floor": Op.FLOOR, "ceil": Op.CEIL, "trunc": Op.TRUNC, "fix": Op.TRUNC}
_NUMBERS = {"neg": Op.NEG, "negative": Op.NEG, "abs": Op.ABS, "absolute": Op.ABS}
_BITS = {"bitwise_and": Op.AND, "bitwise_or": Op.OR, "bitwise_xor": Op.XOR,
         "bitwise_left_shift": Op.SHL, "bitwise_right_shift": Op.SHR}
_COMPARISONS = {"lt": (Op.LT, False), "less": (Op.LT, False), "le": (Op.LE, False),
                "less_equal": (Op.LE, False), "gt": (Op.LT, True), "greater": (Op.LT, True),
                "ge": (Op.LE, True), "greater_equal": (Op.LE, True), "eq": (Op.EQ, False),
                "ne": (Op.NE, False), "not_equal": (Op.NE, False)}
_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16,
           "bfloat16": torch.bfloat16, "int": torch.int32, "long": torch.int64,
           "short": torch.int16, "char": torch.int8, "byte": torch.uint8, "bool": torch.bool}

FUNCTIONS: dict[str, Rule] = {
    **{name: _composed(fn) for name, fn in COMPOSED.items()},
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
    "square": lambda t, input: t.apply(Op.MUL, input, input, at_least=torch.int64),
    "round": _round,
    "sign": _sign,
    "sgn": _sign,
    "positive": _identity,
    "expit": _float(Op.SIGMOID),
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
    "type": _to,
    "type_as": _to,
    "detach": _detach,
    "clone": _identity,
    "contiguous": _identity,
    "squeeze": _identity,
    "zeros_like": _like(0),
    "ones_like": _like(1),
    "full_like": _filled,
    "new_zeros": _new(0),
    "new_ones": _new(1),
    "new_full": _new_full,
    "new_tensor": _new_tensor,
    "is_floating_point": lambda t, input: input.dtype.is_floating_point,
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
OPERATORS["__rtruediv__"] = _quotient_of
FUNCTIONS.update(OPERATORS)
FUNCTIONS["log_sigmoid"] = FUNCTIONS["logsigmoid"]
FUNCTIONS["_threshold"] = FUNCTIONS["threshold"]  # F.threshold's name for itself
FUNCTIONS.update({f"special_{name}": FUNCTIONS[name] for name in (
    "erf", "erfc", "exp2", "expit", "expm1", "log1p", "logit", "round", "sinc", "xlogy")})
METHODS = {**FUNCTIONS, "where": _where_method}  # the condition comes second


def _operator(rule: Rule) -> Callable[..., Any]:
    def method(self: Proxy | View, *args: Any) -> Any:
        return rule(self.tape, self, *args)

    return method


for _name, _rule in OPERATORS.items():
    setattr(Proxy, _name, _operator(_rule))
    setattr(View, _name, _operator(_rule))  # refuses, naming the dimensions left
