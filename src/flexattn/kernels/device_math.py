"""Mathematics for generated mods, from operations that every backend and the interpreter have.

Scalars or tiles of any shape in, the same out; callable from Triton and Gluon kernels. Accurate
to a few units in the last place of float32, except where the name says otherwise.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # k * _LN2_HIGH is exact for |k| < 2^15
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
_TANH = tl.constexpr("tanh.approx.f32 $0, $1;")
_PRODUCT = tl.constexpr("mul.rn.f32 $0, $1, $2;")
_PRODUCT_64 = tl.constexpr("mul.rn.f64 $0, $1, $2;")
_LOAD_16 = tl.constexpr("ld.global.nc.b16 $0, [$1];")
_LOAD_32 = tl.constexpr("ld.global.nc.b32 $0, [$1];")
_LOAD_64 = tl.constexpr("ld.global.nc.b64 $0, [$1];")


@triton.jit
def round_even(x, MAGIC: tl.constexpr):
    """To the nearest integer, halves to even; MAGIC is 1.5 * 2^23 (float64: 1.5 * 2^52)."""
    size = tl.abs(x)
    near = (size + MAGIC / 1.5) - MAGIC / 1.5
    near = tl.where(x < 0.0, near * -1.0, near)
    near = tl.where(near == 0.0, x * 0.0, near)  # keeps the sign of zero
    return tl.where(size < MAGIC / 1.5, near, x)


@triton.jit
def exp(x):
    """e^x with the argument reduced in two steps, so that the error does not grow with |x|."""
    whole = round_even(tl.minimum(tl.maximum(x, -200.0), 200.0) * LOG2E, 12582912.0)
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    half = tl.floor(whole * 0.5)  # two factors, so that neither overflows before the product does
    result = tl.exp2(rest * LOG2E) * tl.exp2(half) * tl.exp2(whole - half)
    result = tl.where(x > 200.0, float("inf"), tl.where(x < -200.0, 0.0, result))
    return tl.where(x == x, result, x)


@triton.jit
def expm1(x):
    """e^x - 1 (Kahan's formula)."""
    power = exp(x)
    less = power - 1.0
    near = less * (x / tl.log(power))
    return tl.where(power == 1.0, x, tl.where((less == -1.0) | (power > 3.0e38), less, near))


@triton.jit
def log1p(x):
    """log(1 + x) (Kahan's formula)."""
    more = 1.0 + x
    near = tl.log(more) * (x / (more - 1.0))
    return tl.where(more == 1.0, x, tl.where(more > 3.0e38, more, near))


@triton.jit
def tanh(x):
    """A polynomial where 1 - 2 / (1 + e^2x) would cancel."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = series * square * x + x
    large = 1.0 - 2.0 / (1.0 + exp(2.0 * tl.abs(x)))
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def tanh_exp2(x):
    """1 - 2 / (1 + 2^(2x log2 e)): absolute error of about 1e-7."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def tanh_approx(x):
    """One instruction of NVIDIA GPUs: relative error of 2^-11, below a 16-bit score's rounding."""
    return tl.inline_asm_elementwise(_TANH, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(x, y):
    """x * y of float32 on NVIDIA GPUs, rounded: never part of a fused multiply-add."""
    return tl.inline_asm_elementwise(_PRODUCT, "=f,f,f", [x, y], dtype=tl.float32, is_pure=True,
                                     pack=1)


@triton.jit
def double_product(x, y):
    """The same of float64."""
    return tl.inline_asm_elementwise(_PRODUCT_64, "=d,d,d", [x, y], dtype=tl.float64, is_pure=True,
                                     pack=1)


@triton.jit
def gather(pointers):
    """Reads in the layout that the values are used in: for a load of its own, Triton would choose
    another, and carry a tile of values through shared memory."""
    KIND: tl.constexpr = pointers.dtype.element_ty
    if KIND.primitive_bitwidth == 16:
        bits = tl.inline_asm_elementwise(_LOAD_16, "=h,l", [pointers.to(tl.int64)],
                                         dtype=tl.int16, is_pure=True, pack=1)
        return bits.to(KIND, bitcast=True)
    elif KIND.primitive_bitwidth == 32:
        bits = tl.inline_asm_elementwise(_LOAD_32, "=r,l", [pointers.to(tl.int64)],
                                         dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(KIND, bitcast=True)
    elif KIND.primitive_bitwidth == 64:
        bits = tl.inline_asm_elementwise(_LOAD_64, "=l,l", [pointers.to(tl.int64)],
                                         dtype=tl.int64, is_pure=True, pack=1)
        return bits.to(KIND, bitcast=True)
    else:
        return tl.load(pointers)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def sigmoid_exp2(x):
    """Relative error grows with |x|: 1e-6 at 10."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def power(x, y):
    """x^y of floating-point numbers, torch's special cases included."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y) & (tl.abs(y) < 16777216.0)
    signed = tl.where(odd, -size, size)
    result = tl.where(x < 0.0, tl.where(whole, signed, float("nan")), size)
    result = tl.where((x == 0.0) & odd & (1.0 / x < 0.0), -size, result)
    result = tl.where((tl.abs(x) == 1.0) & (tl.abs(y) == float("inf")), 1.0, result)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, result)


@triton.jit
def integer_power(x, y, BITS: tl.constexpr):
    """x^y of integers for y < 2^BITS, wrapping; a negative exponent truncates towards zero."""
    result = x * 0 + 1
    square = x
    for bit in tl.static_range(BITS):
        result = tl.where((y >> bit) & 1 != 0, result * square, result)
        square = square * square
    negative = tl.where(x == 1, 1, tl.where(x == -1, 1 - 2 * (y & 1), 0))
    return tl.where(y < 0, negative.to(result.dtype), result)


@triton.jit
def floor_divide(x, y):
    """Rounds towards minus infinity (`//` of Triton rounds towards zero); any x for a zero y."""
    y = tl.where(y == 0, 1, y)
    quotient = x // y
    return tl.where((x % y != 0) & ((x < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def floor_divide_by_positive(x, y):
    """floor_divide for y > 0, in fewer instructions; also of the least integer."""
    sign = tl.where(x < 0, -1, 0).to(x.dtype)
    return ((x ^ sign) // y) ^ sign


@triton.jit
def floor_modulo(x, y):
    """The remainder of floor_divide: it has the sign of y."""
    y = tl.where(y == 0, 1, y)
    remainder = x % y
    return tl.where((remainder != 0) & ((x < 0) != (y < 0)), remainder + y, remainder)


@triton.jit
def float_modulo(x, y):
    """torch.remainder of floating-point numbers."""
    remainder = x % y
    return tl.where((remainder != 0.0) & ((remainder < 0.0) != (y < 0.0)),
                    remainder + y, remainder)


@triton.jit
def float_floor_divide(x, y):
    """torch.floor_divide of floating-point numbers."""
    remainder = x % y
    quotient = (x - remainder) / y
    adjust = (remainder != 0.0) & ((remainder < 0.0) != (y < 0.0))
    quotient = tl.where(adjust, quotient - 1.0, quotient)
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1.0, whole)
    whole = tl.where(quotient == 0.0, (x / y) * 0.0, whole)  # with torch's sign
    return tl.where(y == 0.0, x / y, whole)
