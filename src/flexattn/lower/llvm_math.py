"""Elementary functions of float32 and float64 vectors (and scalars) as polynomials in LLVM IR.

In: an emitter of LLVM IR (flexattn.kernels.cpu_dsl.Emitter) and values of type float, double or
vectors of them. Out: values of the same type. Rejects nothing.

LLVM turns llvm.exp and its like on vectors into one libm call per lane; these stay in vector
registers. float32 results are within 2 ulp (sigmoid: 2.3, tanh: 6), float64 within 4 ulp;
infinities, NaN and (for exp, exp2) denormal results included. sin and cos keep that accuracy for
|x| up to 2**50 (float32) and 2**30 (float64); beyond, they give a number in [-1, 1]. Quotients of
fmod beyond 2**52 give a number smaller than the divisor.

Rounding by `magic` (adding and subtracting 1.5 * 2**mantissa) must never be reassociated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flexattn.lower.llvm_math_formats import FORMATS, HALF_PI, POW_TAIL, TWO_THIRDS

Value = Any  # the emitter's value: has .type and .name
Pair = tuple[Value, Value]  # a number as the unevaluated sum of two, the second much smaller


class Math:
    """The functions, for vectors of `lanes` numbers of type `real` (scalars for 0 lanes)."""

    def __init__(self, e: Any, lanes: int, real: str) -> None:
        self.e, self.lanes, self.real = e, lanes, real
        self.format = FORMATS[real]
        self.type = self._vector(real)
        self.integer = self._vector(self.format.integer)

    # Building blocks

    def _vector(self, scalar: str) -> str:
        return f"<{self.lanes} x {scalar}>" if self.lanes else scalar

    def _suffix(self, real: str) -> str:
        return (f"v{self.lanes}" if self.lanes else "") + {"float": "f32", "double": "f64"}[real]

    def number(self, value: float) -> Value:
        return self.e.const(self.type, value)

    def _int(self, value: int) -> Value:
        return self.e.const(self.integer, value)

    def intrinsic(self, name: str, *args: Value) -> Value:
        """llvm.<name> on values of this type; only those that are one or two instructions."""
        return self.e.intrinsic(f"{name}.{self._suffix(self.real)}", self.type, *args)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z with one rounding: some of what follows relies on it."""
        return self.intrinsic("fma", x, y, z)

    def abs(self, x: Value) -> Value:
        return self.intrinsic("fabs", x)

    def _neg(self, x: Value) -> Value:
        return self.e.emit(x.type, f"fneg {x}")

    def _not(self, condition: Value) -> Value:
        return self.e.op("xor", condition, self.e.const(self._vector("i1"), True))

    def _compare(self, predicate: str, x: Value, value: float) -> Value:
        return self.e.compare(predicate, x, self.number(value))

    def _clamp(self, x: Value, low: float, high: float) -> Value:
        """x in [low, high]; NaN stays NaN."""
        e = self.e
        x = e.select(self._compare("ogt", x, high), self.number(high), x)
        return e.select(self._compare("olt", x, low), self.number(low), x)

    def _horner(self, x: Value, coefficients: Sequence[float]) -> Value:
        result = self.number(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = self.fma(result, x, self.number(c))
        return result

    def _polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        """Even and odd powers apart: half the latency of Horner's scheme."""
        if len(coefficients) < 4:
            return self._horner(x, coefficients)
        square = self.e.fmul(x, x)
        even, odd = (self._horner(square, coefficients[i::2]) for i in (0, 1))
        return self.fma(odd, x, even)

    def _round(self, x: Value) -> Pair:
        """x rounded to an integer: as a float, and as an integer; |x| < 2**(mantissa - 1)."""
        e, magic = self.e, self.number(self.format.magic)
        shifted = e.fadd(x, magic)
        bits = e.cast("bitcast", shifted, self.integer)
        return e.fsub(shifted, magic), e.sub(bits, self._int(self.format.magic_bits))

    def _to_real(self, n: Value) -> Value:
        """A small integer as a float."""
        e = self.e
        bits = e.add(n, self._int(self.format.magic_bits))
        return e.fsub(e.cast("bitcast", bits, self.type), self.number(self.format.magic))

    def _power_of_two(self, n: Value) -> Value:
        """2**n for n in the range of normal exponents."""
        e, f = self.e, self.format
        bits = e.op("shl", e.add(n, self._int(f.bias)), self._int(f.mantissa))
        return e.cast("bitcast", bits, self.type)

    def _scale(self, x: Value, n: Value) -> Value:
        """x * 2**n in two steps, so that denormals and infinity come out right."""
        e = self.e
        half = e.op("ashr", n, self._int(1))
        return e.fmul(e.fmul(x, self._power_of_two(half)), self._power_of_two(e.sub(n, half)))

    # Exponentials

    def _expm1_reduced(self, r: Value) -> Value:
        """e**r - 1 for |r| <= ln(2)/2."""
        return self.fma(self.e.fmul(r, r), self._polynomial(r, self.format.exp), r)

    def _reduce(self, x: Value) -> Pair:
        """n and e**r - 1 with x = n * ln2 + r."""
        high, low = self.format.ln2
        whole, n = self._round(self.e.fmul(x, self.number(self.format.log2e[0])))
        r = self.fma(whole, self.number(-low), self.fma(whole, self.number(-high), x))
        return n, self._expm1_reduced(r)

    def exp(self, x: Value) -> Value:
        n, y = self._reduce(self._clamp(x, *self.format.exp_range))
        return self._scale(self.e.fadd(y, self.number(1.0)), n)

    def exp2(self, x: Value) -> Value:
        x = self._clamp(x, *self.format.exp2_range)
        whole, n = self._round(x)
        r = self.e.fmul(self.e.fsub(x, whole), self.number(self.format.ln2[0]))
        return self._scale(self.e.fadd(self._expm1_reduced(r), self.number(1.0)), n)

    def expm1(self, x: Value) -> Value:
        e = self.e
        clamped = self._clamp(x, self.format.one_minus, self.format.exp_range[1])
        n, y = self._reduce(clamped)
        half = self._power_of_two(e.sub(n, self._int(1)))  # 2**n itself may overflow
        half_result = self.fma(half, y, e.fsub(half, self.number(0.5)))
        return e.select(self._compare("oeq", x, 0.0), x, e.fadd(half_result, half_result))

    def tanh(self, x: Value) -> Value:
        if not self.format.tanh:
            return self._tanh_by_exp(x)
        limit = self.format.tanh_one
        x = self._clamp(x, -limit, limit)
        square = self.e.fmul(x, x)
        above, below = (self._horner(square, c) for c in self.format.tanh)
        return self.e.fdiv(self.e.fmul(x, above), below)

    def _tanh_by_exp(self, x: Value) -> Value:
        """With t = e**(-2|x|) - 1: |tanh(x)| = -t / (t + 2), most of what t + 2 loses put back."""
        e, two = self.e, self.number(2.0)
        twice = e.fmul(self.abs(x), self.number(-2.0))
        low = self.number(self.format.one_minus)
        n, y = self._reduce(e.select(e.compare("olt", twice, low), low, twice))
        power = self._power_of_two(n)
        t = self.fma(power, y, e.fsub(power, self.number(1.0)))
        divisor = e.fadd(t, two)
        ratio = e.fdiv(t, divisor)
        lost = e.fmul(e.fsub(t, e.fsub(divisor, two)), ratio)
        return self.intrinsic("copysign", self.fma(lost, self.number(-0.72), ratio), x)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + e**-x)."""
        one = self.number(1.0)
        return self.e.fdiv(one, self.e.fadd(one, self.exp(self._neg(x))))

    # Logarithms

    def _split(self, x: Value) -> Pair:
        """n and m with x = m * 2**n, sqrt(1/2) <= m < sqrt(2); x positive and normal."""
        e, f = self.e, self.format
        bits = e.cast("bitcast", x, self.integer)
        n = e.op("ashr", e.sub(bits, self._int(f.root_half_bits)), self._int(f.mantissa))
        m = e.sub(bits, e.op("shl", n, self._int(f.mantissa)))
        return n, e.cast("bitcast", m, self.type)

    def _split_any(self, x: Value) -> Pair:
        """`_split` with n as a float, for any positive x."""
        e, f = self.e, self.format
        tiny = self._compare("olt", x, f.smallest_normal)
        lift = self.number(2.0 ** (f.mantissa + 1))
        n, m = self._split(e.select(tiny, e.fmul(x, lift), x))
        shift = e.select(tiny, self.number(f.mantissa + 1), self.number(0.0))
        return e.fsub(self._to_real(n), shift), m

    def _log_parts(self, f: Value) -> Pair:
        """log(1 + f) = f - (a - b) for 1 + f in [sqrt(1/2), sqrt(2)]: a and b."""
        e = self.e
        s = e.fdiv(f, e.fadd(f, self.number(2.0)))
        z = e.fmul(s, s)
        series = e.fmul(z, self._polynomial(z, self.format.log))
        a = e.fmul(self.number(0.5), e.fmul(f, f))
        return a, e.fmul(s, e.fadd(a, series))

    def _log_sum(self, n: Value, f: Value) -> Value:
        """n * ln2 + log(1 + f)."""
        e = self.e
        high, low = self.format.ln2_short
        a, b = self._log_parts(f)
        inner = e.fsub(a, self.fma(n, self.number(low), b))
        return self.fma(n, self.number(high), e.fsub(f, inner))

    def _log_special(self, result: Value, x: Value, pole: float) -> Value:
        """`result` for finite x > pole, -inf at the pole, NaN below, inf and NaN themselves."""
        e = self.e
        result = e.select(self._compare("olt", x, math.inf), result, x)
        result = e.select(self._compare("oeq", x, pole), self.number(-math.inf), result)
        return e.select(self._compare("olt", x, pole), self.number(math.nan), result)

    def log(self, x: Value) -> Value:
        n, m = self._split_any(x)
        return self._log_special(self._log_sum(n, self.e.fsub(m, self.number(1.0))), x, 0.0)

    def log2(self, x: Value) -> Value:
        e = self.e
        n, m = self._split_any(x)
        f = e.fsub(m, self.number(1.0))
        a, b = self._log_parts(f)
        natural = e.fsub(f, e.fsub(a, b))
        high, low = (self.number(c) for c in self.format.log2e)
        result = e.fadd(self.fma(natural, high, e.fmul(natural, low)), n)
        return self._log_special(result, x, 0.0)

    def log1p(self, x: Value) -> Value:
        """log(u) for u = 1 + x rounded, its mantissa corrected by what the rounding lost."""
        e, one = self.e, self.number(1.0)
        u = e.fadd(x, one)
        lost = e.select(self._compare("ogt", x, 1.0), e.fsub(one, e.fsub(u, x)),
                        e.fsub(x, e.fsub(u, one)))
        n, m = self._split(u)
        shift = e.max(e.sub(self._int(0), n), self._int(1 - self.format.bias))
        lost = e.fmul(lost, self._power_of_two(shift))
        result = self._log_sum(self._to_real(n), e.fadd(e.fsub(m, one), lost))
        result = e.select(self._compare("oeq", x, 0.0), x, result)
        return self._log_special(result, x, -1.0)

    # Trigonometry

    def _quadrant(self, x: Value) -> Pair:
        """r and q with x = q * pi/2 + r, |r| <= pi/4; only the last two bits of q count."""
        wide = self._double()
        x = self._convert(x, wide)
        whole = wide.intrinsic("roundeven", wide.e.fmul(x, wide.number(2 / math.pi)))
        r = x
        for part in HALF_PI:
            r = wide.fma(whole, wide.number(-part), r)
        r = wide._clamp(r, -0.8, 0.8)
        shifted = wide.e.fadd(wide._clamp(whole, -2.0**50, 2.0**50), wide.number(wide.format.magic))
        q = wide.e.cast("bitcast", shifted, wide.integer)
        if self.integer != wide.integer:
            q = self.e.cast("trunc", q, self.integer)
        return wide._convert(r, self), q

    def _sine(self, x: Value, quarter_turns: int) -> Value:
        e = self.e
        r, q = self._quadrant(x)
        q = e.add(q, self._int(quarter_turns))
        z = e.fmul(r, r)
        sine = self.fma(e.fmul(r, z), self._horner(z, self.format.sin), r)
        tail = self.fma(e.fmul(z, z), self._horner(z, self.format.cos),
                        e.fmul(z, self.number(-0.5)))
        cosine = e.fadd(self.number(1.0), tail)
        odd, minus = (e.compare("ne", e.and_(q, self._int(bit)), self._int(0)) for bit in (1, 2))
        result = e.select(odd, cosine, sine)
        return e.select(minus, self._neg(result), result)

    def sin(self, x: Value) -> Value:
        return self._sine(x, 0)

    def cos(self, x: Value) -> Value:
        return self._sine(x, 1)

    # Others

    def erf(self, x: Value) -> Value:
        """x + x*P(x**2) for |x| < 1, 1 - e**(-x**2) * erfcx(|x|) beyond."""
        e, f = self.e, self.format
        small = self.fma(x, self._polynomial(e.fmul(x, x), f.erf), x)
        size = self.abs(x)
        size = e.select(self._compare("ogt", size, f.erf_one), self.number(f.erf_one), size)
        two = self.number(2.0)
        ratio = e.fdiv(e.fsub(size, two), e.fadd(size, two))
        tail = e.fmul(self.exp(self._neg(e.fmul(size, size))), self._polynomial(ratio, f.erfcx))
        big = self.intrinsic("copysign", e.fsub(self.number(1.0), tail), x)
        return e.select(self._compare("olt", size, 1.0), small, big)

    def fmod(self, x: Value, y: Value) -> Value:
        """The remainder of x / y rounded towards zero; it has the sign of x."""
        wide = self._double()
        a, b = (wide.abs(self._convert(v, wide)) for v in (x, y))
        r = wide._remainder(a, b)
        return self.intrinsic("copysign", wide._convert(r, self), x)

    def _remainder(self, a: Value, b: Value) -> Value:
        """a mod b for a, b >= 0; the rounded quotient can be off by one."""
        e = self.e
        quotient = self.intrinsic("trunc", e.fdiv(a, b))
        finite = e.compare("olt", a, self.number(math.inf))
        by = e.select(self._compare("olt", b, math.inf), b, self.number(0.0))
        r = self.fma(self._neg(quotient), by, a)
        r = e.select(self._compare("olt", r, 0.0), e.fadd(r, b), r)
        r = e.select(e.compare("oge", r, b), e.fsub(r, b), r)
        r = e.select(e.compare("olt", a, b), a, r)
        valid = e.and_(finite, self._compare("ogt", b, 0.0))
        return e.select(valid, r, self.number(math.nan))

    def pow(self, x: Value, y: Value) -> Value:
        """2**(y * log2|x|), the product in two doubles, then C's special cases."""
        wide = self._double()
        magnitude = wide._power(wide.abs(self._convert(x, wide)), self._convert(y, wide))
        return self._power_sign(wide._convert(magnitude, self), x, y)

    def _power_sign(self, size: Value, x: Value, y: Value) -> Value:
        e = self.e
        whole = e.compare("oeq", self.intrinsic("floor", y), y)
        half = e.fmul(y, self.number(0.5))
        even_half = e.compare("oeq", self.intrinsic("floor", half), half)
        odd = e.and_(whole, self._not(even_half))
        sign = self.intrinsic("copysign", size, x)
        finite = self._compare("one", x, -math.inf)
        undefined = e.and_(self._not(whole), e.and_(finite, self._compare("olt", x, 0.0)))
        result = e.select(undefined, self.number(math.nan), e.select(odd, sign, size))
        always_one = e.or_(self._compare("oeq", x, 1.0), self._compare("oeq", y, 0.0))
        return e.select(always_one, self.number(1.0), result)

    def _power(self, x: Value, y: Value) -> Value:
        """x**y in double, x >= 0."""
        e = self.e
        high, low = self._log2_pair(x)
        product = e.fmul(y, high)
        rest = self.fma(y, low, self.fma(y, high, self._neg(product)))
        small = e.compare("olt", self.abs(product), self.number(2000.0))
        rest = e.select(small, rest, self.number(0.0))
        product = e.select(self._compare("oeq", x, 1.0), self.number(0.0), product)
        product = self._clamp(product, *self.format.exp2_range)
        whole, n = self._round(product)
        r = e.fmul(e.fadd(e.fsub(product, whole), rest), self.number(self.format.ln2[0]))
        return self._scale(e.fadd(self._expm1_reduced(r), self.number(1.0)), n)

    def _log2_pair(self, x: Value) -> Pair:
        """log2(x) in two doubles: 2*atanh(s) with s = f / (2 + f), times log2(e), plus n."""
        e = self.e
        n, m = self._split_any(x)
        f = e.fsub(m, self.number(1.0))
        s = self._ratio_pair(f)
        z = self._times(s, s)
        tail = e.fmul(z[0], self._polynomial(z[0], POW_TAIL))
        third = self._plus(self.number(TWO_THIRDS[0]), (tail, self.number(TWO_THIRDS[1])))
        series = self._plus(self.number(2.0), self._times(z, third))
        log2e = (self.number(self.format.log2e[0]), self.number(self.format.log2e[1]))
        high, low = self._plus(n, self._times(self._times(s, series), log2e))
        return self._log_special(high, x, 0.0), low

    def _ratio_pair(self, f: Value) -> Pair:
        """f / (2 + f) in two doubles."""
        e = self.e
        divisor = e.fadd(f, self.number(2.0))
        lost = e.fsub(f, e.fsub(divisor, self.number(2.0)))
        high = e.fdiv(f, divisor)
        minus = self._neg(high)
        rest = self.fma(minus, lost, self.fma(minus, divisor, f))
        return high, e.fdiv(rest, divisor)

    def _times(self, x: Pair, y: Pair) -> Pair:
        e = self.e
        high = e.fmul(x[0], y[0])
        low = self.fma(x[0], y[0], self._neg(high))
        return high, self.fma(x[0], y[1], self.fma(x[1], y[0], low))

    def _plus(self, x: Value, y: Pair) -> Pair:
        """x + y for |x| >= |y| or x = 0."""
        e = self.e
        high = e.fadd(x, y[0])
        return high, e.fadd(e.fadd(e.fsub(x, high), y[0]), y[1])

    # The same lanes in double precision

    def _double(self) -> Math:
        return self if self.real == "double" else Math(self.e, self.lanes, "double")

    def _convert(self, x: Value, to: Math) -> Value:
        if to.real == self.real:
            return x
        return self.e.cast("fpext" if to.real == "double" else "fptrunc", x, to.type)
