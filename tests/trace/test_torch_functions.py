"""Every function, method and operator a mod may call has torch's dtype and torch's bits.

Functions with an operation of their own are compared bit for bit, for operands of every pair of
types; compositions to the rounding of their dtype. What torch refuses must be refused.
"""

import operator

import pytest
import torch
from torch.nn import functional

from flexattn.analysis.gradient import gradient
from flexattn.errors import TraceError
from flexattn.ir.evaluate import evaluate
from flexattn.trace import specialize, trace_score_mod
from flexattn.trace.compositions import COMPOSED
from flexattn.trace.torch_functions import FUNCTIONS, OPERATORS
from tests.trace.eager import check, check_or_both_refuse

# Operands by type, made of the score and an index; indices reach 41, so that int8 does not wrap.
TENSORS = {
    "float64": lambda s, i: s,
    "float32": lambda s, i: s.float(),
    "bfloat16": lambda s, i: s.bfloat16(),
    "float16": lambda s, i: s.half(),
    "int64": lambda s, i: i - 20,
    "int32": lambda s, i: (i - 20).int(),
    "int16": lambda s, i: (i - 20).short(),
    "int8": lambda s, i: (i - 20).char(),
    "uint8": lambda s, i: i.byte(),
    "bool": lambda s, i: i > 20,
}
NUMBERS = {"1.7": lambda s, i: 1.7, "3": lambda s, i: 3, "True": lambda s, i: True,
           "-inf": lambda s, i: float("-inf")}
HALF = ("bfloat16", "float16")


def words(text):
    return text.split()


UNARY = words("""exp exp2 expm1 log log2 log1p sqrt rsqrt sin cos tanh sigmoid erf floor ceil trunc
    fix
    round neg negative abs absolute sign sgn square reciprocal bitwise_not logical_not
    isnan isinf isfinite isposinf isneginf""")
BINARY = words("""add sub subtract rsub mul multiply div divide true_divide floor_divide remainder
    fmod
    pow minimum maximum min max bitwise_and bitwise_or bitwise_xor bitwise_left_shift
    bitwise_right_shift lt less le less_equal gt greater ge greater_equal eq ne not_equal
    logical_and logical_or logical_xor copysign""")
SYMBOLS = words("""add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift lt le gt ge eq
    ne""")
NEEDS_TWO_TENSORS = {"minimum", "maximum", "min", "max", "logical_and",
                     "logical_or", "logical_xor"}


def binary_cases(second_is_tensor: bool):
    """Both operands are positive where a divisor or a shift would make them undefined."""
    for x in TENSORS:
        for y in (*TENSORS, *(() if second_is_tensor else NUMBERS)):
            yield TENSORS[x], {**TENSORS, **NUMBERS}[y]


def nonzero(x):
    return torch.where(x == 0, torch.ones_like(x), x) if hasattr(x, "dtype") else x


def small(x):
    """A shift's count."""
    whole = hasattr(x, "dtype") and not x.dtype.is_floating_point and x.dtype != torch.bool
    return x & 3 if whole else x


FIT = {name: nonzero for name in ("floor_divide", "remainder", "fmod", "floordiv", "mod")}
FIT |= {name: small for name in ("bitwise_left_shift", "bitwise_right_shift", "lshift", "rshift")}


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_operand(name, seed):
    function = getattr(torch, name)
    answers = [check_or_both_refuse(lambda s, b, h, q, k, make=make: function(make(s, q)))
               for make in TENSORS.values()]
    assert any(answers)


@pytest.mark.parametrize("name", UNARY)
def test_methods_of_one_operand(name):
    for make in (TENSORS["float32"], TENSORS["int64"], TENSORS["bool"]):
        check_or_both_refuse(lambda s, b, h, q, k, make=make: getattr(make(s, q), name)())


def exponent(name, y):
    """Whole tensors raised to whole tensors must not be negative: torch would raise."""
    whole = hasattr(y, "dtype") and not y.dtype.is_floating_point and y.dtype != torch.bool
    return abs(y) % 4 if name == "pow" and whole and y.dtype != torch.uint8 else y


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_operands(name):
    function, fit = getattr(torch, name), FIT.get(name, lambda y: y)
    answers = [check_or_both_refuse(lambda s, b, h, q, k, x=x, y=y: function(
        x(s, q), exponent(name, fit(y(s * 0.7 + 1, k)))), CUBE if name == "pow" else 0.0)
        for x, y in binary_cases(name in NEEDS_TWO_TENSORS)]
    assert any(answers)


@pytest.mark.parametrize("name", SYMBOLS)
def test_operators(name):
    symbol, fit = getattr(operator, name), FIT.get(name, lambda y: y)
    for x, y in binary_cases(False):
        check_or_both_refuse(lambda s, b, h, q, k, x=x, y=y: symbol(
            x(s, q), exponent(name, fit(y(s * 0.7 + 1, k)))), CUBE if name == "pow" else 0.0)


@pytest.mark.parametrize("name", SYMBOLS)
def test_operators_with_a_number_on_the_left(name):
    symbol, fit = getattr(operator, name), FIT.get(name, lambda y: y)
    for number in (1.7, 3, True):
        for make in TENSORS.values():
            check_or_both_refuse(lambda s, b, h, q, k, make=make, number=number: symbol(
                number, exponent(name, fit(make(s, k)))))


@pytest.mark.parametrize("name", BINARY)
def test_methods_of_two_operands(name):
    if hasattr(torch.Tensor, name):
        check_or_both_refuse(lambda s, b, h, q, k: getattr(s.float(), name)(s + 1))
        check_or_both_refuse(lambda s, b, h, q, k: getattr(q, name)(k % 3 + 1))


CUBE = 8e-3  # torch rounds half ** 3 once or twice, as its vectors have it
POWERS = (0, 1, 2, 3, -1, -2, 0.5, -0.5, 4, 1.7)


@pytest.mark.parametrize("power", POWERS)
def test_powers(power):
    for kind, make in TENSORS.items():
        exact = power != 3 or kind not in HALF
        check_or_both_refuse(lambda s, b, h, q, k, make=make: make(s, q) ** power,
                             0.0 if exact else CUBE)


OTHERS = {
    "where of numbers": lambda s, b, h, q, k: torch.where(q > k, 1.0, 0),
    "where of whole numbers": lambda s, b, h, q, k: torch.where(q > k, 1, 0),
    "where with -inf": lambda s, b, h, q, k: torch.where(q >= k, s.float(), -float("inf")),
    "where, method": lambda s, b, h, q, k: s.where(q > k, s.half()),
    "masked_fill": lambda s, b, h, q, k: s.float().masked_fill(q < k, -1e9),
    "clamp": lambda s, b, h, q, k: s.clamp(-0.5, 0.5) + torch.clamp(q, min=3) + q.clamp(max=k),
    "clip": lambda s, b, h, q, k: torch.clip(s, -1, 1) + s.clamp_min(0.1) + s.clamp_max(1),
    "relu": lambda s, b, h, q, k: functional.relu(s + 0.1) + (s + 0.1).relu(),
    "add with alpha": lambda s, b, h, q, k: torch.add(s, q, alpha=2) + torch.sub(s, k, alpha=3),
    "rounded quotients": lambda s, b, h, q, k: torch.div(q - 20, 3, rounding_mode="floor")
    + torch.div(q - 20, 3, rounding_mode="trunc") + torch.div(s, 0.7, rounding_mode="trunc"),
    "round to decimals": lambda s, b, h, q, k: torch.round(s, decimals=2) + s.round(decimals=-1),
    "abs()": lambda s, b, h, q, k: abs(s) + abs(q - k),
    "unary symbols": lambda s, b, h, q, k: -s + +s + (~(q > k)) + (~q),
    "casts": lambda s, b, h, q, k: s.long() + s.int() + s.short() + s.char() + s.half()
    + s.bfloat16().float() + s.bool() + s.double() + q.float(),
    "to": lambda s, b, h, q, k: s.to(torch.float32) + q.to(s.dtype) + q.to(s.device) + q.to(s)
    + q.type(torch.int32) + q.type_as(k) + k.to(device=s.device, dtype=torch.int8),
    "dtype": lambda s, b, h, q, k: torch.where(q > k, s, torch.finfo(s.dtype).min),
    "full": lambda s, b, h, q, k: torch.full((), 2, dtype=s.dtype) + torch.tensor(3) * s,
    "tensor": lambda s, b, h, q, k: torch.tensor(0.1, dtype=torch.float32, device=s.device) + q,
    "as_tensor": lambda s, b, h, q, k: torch.as_tensor(2.5) * q + torch.scalar_tensor(1.5),
    "zeros and ones": lambda s, b, h, q, k: torch.zeros(()) + torch.ones(()) * q + torch.zeros([]),
    "like": lambda s, b, h, q, k: torch.zeros_like(s) + torch.ones_like(q) + torch.full_like(s, 7)
    + torch.zeros_like(s, dtype=torch.float32),
    "new": lambda s, b, h, q, k: s.new_zeros(()) + q.new_ones(()) + s.new_full((), 0.3)
    + q.new_tensor(3) + s.float().new_tensor(0.1) + s.new_ones([], dtype=torch.int32),
    "kept as they are": lambda s, b, h, q, k: s.clone().contiguous().squeeze() + q.detach(),
    "numbers with numbers": lambda s, b, h, q, k: torch.where(q > k, 3, 2.5) * s.float(),
    "and_masks as torch's": lambda s, b, h, q, k: torch.ones((), dtype=torch.bool) & (q > k),
    "or_masks as torch's": lambda s, b, h, q, k: b.new_zeros((), dtype=torch.bool) | (q > k),
    "special": lambda s, b, h, q, k: torch.special.expit(s) + torch.special.erf(s)
    + torch.special.exp2(s) + torch.special.expm1(s) + torch.special.log1p(s.abs()),
    "sum()": lambda s, b, h, q, k: sum([s, q, k]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    check(OTHERS[name])


INPUTS = {  # where a composition is defined; every other takes the score as it is
    "acosh": lambda s: s.abs() + 1, "atanh": lambda s: s / 20, "logit": lambda s: s.sigmoid(),
    "xlogy": lambda s: s.abs(), "tan": lambda s: s / 8,
}
CALLS = {
    "lerp": lambda f, x, y: f(x, y, 0.3),
    "addcmul": lambda f, x, y: f(x, y, y, value=0.5),
    "addcdiv": lambda f, x, y: f(x, y, y + 20, value=0.5),
    "logit": lambda f, x, y: f(x, 0.1),
    "threshold": lambda f, x, y: f(x, 0.2, 5.0),
    "nan_to_num": lambda f, x, y: f(torch.where(y > 0, x, float("nan")), 2.0, 3.0, 4.0),
    "isclose": lambda f, x, y: f(x, x + 1e-4 * y, rtol=1e-3),
    "heaviside": lambda f, x, y: f(x, torch.ones_like(x) * 0.5),
}
PAIRS = {"logaddexp", "logaddexp2", "xlogy", "hypot", "float_power", "copysign", "fmax", "fmin"}


@pytest.mark.parametrize("name", sorted(COMPOSED))
def test_compositions(name):
    function = getattr(torch, name, None) or getattr(functional, name)
    call = CALLS.get(name, lambda f, x, y: f(x, y) if name in PAIRS else f(x))
    fit = INPUTS.get(name, lambda x: x)
    rounded_often = ("lerp", "addcmul", "addcdiv")  # where torch fuses and we do not
    for kind, tolerance in (("float64", 1e-12), ("float32", 2e-6), ("bfloat16", 8e-3)):
        if kind == "bfloat16" and name in rounded_often:
            continue
        make = TENSORS[kind]
        check(lambda s, b, h, q, k, make=make: call(
            function, make(fit(s), q), make(fit(s * 0.7 + q % 3), k)), tolerance=tolerance)


def test_gelu_by_tanh_and_bounds_of_activations():
    check(lambda s, b, h, q, k: functional.gelu(s, approximate="tanh"), tolerance=1e-12)
    check(lambda s, b, h, q, k: functional.hardtanh(s, -0.3, 0.4) + functional.elu(s, 0.5)
          + functional.softplus(s, 2.0, 5.0) + functional.leaky_relu(s, 0.2), tolerance=1e-12)


SPECIAL = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 21.0, 80.0, -80.0, 89.0, -89.0, 700.0,
                        -700.0, 1e-20, -1e-20])
DERIVATIVES = {
    "sinh": lambda x: torch.sinh(x.clamp(-80, 80)), "cosh": lambda x: torch.cosh(x.clamp(-80, 80)),
    "asinh": torch.asinh, "sinc": torch.sinc, "logsigmoid": functional.logsigmoid,
    "softplus": functional.softplus, "softplus 2": lambda x: functional.softplus(x, 2.0, 5.0),
    "mish": functional.mish, "elu": functional.elu, "elu 2": lambda x: functional.elu(x, 2.0),
    "celu": lambda x: functional.celu(x, 0.5), "selu": functional.selu, "silu": functional.silu,
    "gelu": functional.gelu, "hardswish": functional.hardswish,
    "threshold": lambda x: functional.threshold(x, 1.0, 5.0),
    "logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "logaddexp2": lambda x: torch.logaddexp2(x, torch.ones_like(x)),
    "xlogy": lambda x: torch.xlogy(x, torch.full_like(x, 2.0)),
    "fmax": lambda x: torch.fmax(x, torch.ones_like(x)), "fmin": lambda x: torch.fmin(x, x * 2),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_at_0_and_far_out(name):
    f = DERIVATIVES[name]
    x = SPECIAL.clone().requires_grad_()
    wanted = torch.vmap(f)(x)
    d_wanted, = torch.autograd.grad(wanted.sum(), x)
    mod = specialize(trace_score_mod(lambda s, b, h, q, k: f(s)))
    made = gradient(mod.graph)
    inputs = {"score": SPECIAL, "grad": torch.ones_like(SPECIAL)}
    found = evaluate(mod.graph, inputs, mod.captures, mod.numbers)["score"]
    d_found = evaluate(made.graph, inputs, mod.captures, mod.numbers)["d_score"]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_found.expand_as(x), d_wanted, rtol=1e-5, atol=1e-6)


def test_every_name_is_tested():
    """The lists above and FUNCTIONS hold the same names."""
    tested = {*UNARY, *BINARY, *COMPOSED, *OPERATORS}
    elsewhere = words("""where masked_fill clamp clip clamp_min clamp_max float double half
        bfloat16 int
        long short char byte bool to type type_as detach clone contiguous squeeze zeros_like
        ones_like full_like new_zeros new_ones new_full new_tensor positive expit
        is_floating_point log_sigmoid _threshold""")
    elsewhere += [name for name in FUNCTIONS if name.startswith("special_")]
    assert set(FUNCTIONS) == tested | set(elsewhere)


def test_default_dtype_counts():
    """Whole numbers become torch's default dtype, whatever it is at the time."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        check(lambda s, b, h, q, k: torch.exp(q / 40) * torch.where(q > k, 1.0, 0.3))
    finally:
        torch.set_default_dtype(before)
    check(lambda s, b, h, q, k: torch.exp(q / 40) * torch.where(q > k, 1.0, 0.3))


@pytest.mark.parametrize("make", [
    lambda s: s.new_zeros(3), lambda s: s.new_full((2,), 1.0), lambda s: s.new_ones((1,)),
    lambda s: torch.full_like(torch.ones(3), s)], ids=["zeros", "full", "ones", "like"])
def test_tensors_made_in_a_mod_are_scalars(make):
    with pytest.raises(TraceError, match="not a scalar"):
        trace_score_mod(lambda s, b, h, q, k: make(s) + s)
