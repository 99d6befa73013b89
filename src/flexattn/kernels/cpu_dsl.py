"""The language the CPU kernels are written in: a thin emitter of LLVM IR text.

In: calls like `e.fma(x, y, z)` on `Value`s. Out: the text of a module, ready for
flexattn.compile. Rejects nothing itself: ill-typed text is refused by LLVM's parser.

A `Module` holds functions; `module.function(...)` gives an `Emitter`, which writes one function
top to bottom. Types are LLVM's own spelling ("i64", "ptr", "float", "<8 x float>"). Kernels
compute in `e.real` ("float", or "double" for float64 tensors), `e.lanes` of them to a vector
`e.vector`; `e.vec("i32")` is the vector of as many i32. Conversions between that and the storage
types of tensors ("float32", "bfloat16", "float16", "float64") happen in `load_as`/`store_as`.

The register-blocked product all tiles are made of is in cpu_product.py, how a mod is injected in
cpu_sites.py. LLVM's optimisation passes are not run (they cost more time than they save, and
spill), so write loops in phi form, hoist by hand, and keep what is unrolled small.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache


class Value:
    """An SSA value or a constant: its LLVM type and how it is written as an operand."""

    __slots__ = ("type", "name")

    def __init__(self, type: str, name: str) -> None:
        self.type, self.name = type, name

    def __str__(self) -> str:
        return f"{self.type} {self.name}"


STORAGE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8,
          "double": 8, "ptr": 8}


def element(type: str) -> str:
    """The element type of a vector type, a scalar type itself."""
    return type[1:-1].split(" x ")[1] if type[0] == "<" else type


def lanes_of(type: str) -> int:
    return int(type[1:].split(" ", 1)[0]) if type[0] == "<" else 0


def vector_type(lanes: int, scalar: str) -> str:
    """<lanes x scalar>; the scalar type itself for 0 lanes."""
    return f"<{lanes} x {scalar}>" if lanes else scalar


def byte_size(type: str) -> int:
    return max(lanes_of(type), 1) * _BYTES[element(type)]


@cache
def _literal(scalar: str, value: bool | int | float) -> str:
    if scalar == "float":
        value = struct.unpack("f", struct.pack("f", value))[0]
    if scalar in ("float", "double"):
        return f"0x{struct.unpack('Q', struct.pack('d', value))[0]:016X}"
    return str(int(value))


@cache
def const(type: str, value: bool | int | float) -> Value:
    """A constant; the same one in every lane for a vector type."""
    n, scalar = lanes_of(type), element(type)
    text = _literal(scalar, value)
    return Value(type, "<" + ", ".join([f"{scalar} {text}"] * n) + ">" if n else text)


def const_vector(scalar: str, values: Sequence[bool | int | float]) -> Value:
    """A constant with a value of its own in each lane."""
    lanes = ", ".join(f"{scalar} {_literal(scalar, v)}" for v in values)
    return Value(vector_type(len(values), scalar), f"<{lanes}>")


def i64(value: int) -> Value:
    return const("i64", value)


NULL = Value("ptr", "null")


@dataclass(frozen=True)
class Function:
    """A function of a module, as its callers see it."""

    name: str
    result: str
    params: tuple[str, ...]


class Module:
    """Functions under construction; `str(module)` is the whole IR text.

    vector_bits: width of the vectors kernels are written in (512, 256 or 128).
    storage: dtype of the attention's tensors, which decides the type computed in.
    """

    def __init__(self, vector_bits: int, storage: str = "float32") -> None:
        self.storage = storage
        self.real = "double" if storage == "float64" else "float"
        self.lanes = vector_bits // (64 if self.real == "double" else 32)
        self._functions: list[Emitter] = []
        self._declared: set[str] = set()

    def function(self, name: str, params: Sequence[str], *, result: str = "void",
                 export: bool = False) -> Emitter:
        """Start a function; `e.params` are its arguments. Exported ones can be called from
        Python. Pointers are assumed not to alias within one function."""
        e = Emitter(self, Function(name, result, tuple(params)), export)
        self._functions.append(e)
        return e

    def declare(self, name: str, result: str, params: Sequence[str]) -> Function:
        """An external function or intrinsic."""
        self._declared.add(f"declare {result} @{name}({', '.join(params)})")
        return Function(name, result, tuple(params))

    def __str__(self) -> str:
        return "\n".join([*sorted(self._declared), *map(str, self._functions), ""])


class Loop:
    """What `with e.loop(...) as loop` gives: the index, the carried values, and where to put
    their next values. After the block, `loop.values` are the final ones."""

    def __init__(self, index: Value, values: list[Value]) -> None:
        self.index, self.values = index, values
        self.next: Sequence[Value] = values


class Emitter:
    """Writes one function. Every method that computes gives a new Value."""

    def __init__(self, module: Module, function: Function, export: bool) -> None:
        self.module, self.function = module, function
        self.real, self.lanes = module.real, module.lanes
        self.vector = self.vec(self.real)
        self.params = [Value(t, f"%a{i}") for i, t in enumerate(function.params)]
        args = ", ".join(f"{p.type} {'noalias ' if p.type == 'ptr' else ''}{p.name}"
                         for p in self.params)
        linkage = "" if export else "internal "
        self._lines = [f"define {linkage}{function.result} @{function.name}({args}) nounwind {{",
                       "entry:"]
        self._block = "entry"
        self._count = 0

    def __str__(self) -> str:
        return "\n".join([*self._lines, "}"])

    def scratch(self) -> Emitter:
        """An emitter whose text is thrown away."""
        return Emitter(self.module, self.function, export=False)

    # Types and constants

    def vec(self, scalar: str) -> str:
        """The type of a vector of `e.lanes` scalars."""
        return f"<{self.lanes} x {scalar}>"

    def number(self, value: float) -> Value:
        """A constant vector of the type computed in."""
        return const(self.vector, value)

    def scalar(self, value: float) -> Value:
        """A constant scalar of the type computed in."""
        return const(self.real, value)

    def const(self, type: str, value: bool | int | float) -> Value:
        """A constant of any type, for code that does not import this module."""
        return const(type, value)

    def const_vector(self, scalar: str, values: Sequence[bool | int | float]) -> Value:
        """A constant with a value of its own in each lane."""
        return const_vector(scalar, values)

    def lane_ids(self, scalar: str = "i64") -> Value:
        """<0, 1, 2, ...>."""
        return const_vector(scalar, range(self.lanes))

    # Instructions

    def _fresh(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def emit(self, type: str, text: str) -> Value:
        """Any instruction with a result: emit("i64", "add i64 %x, 1")."""
        name = self._fresh()
        self._lines.append(f"  {name} = {text}")
        return Value(type, name)

    def op(self, opcode: str, x: Value, y: Value) -> Value:
        """A binary instruction whose result has its operands' type."""
        return self.emit(x.type, f"{opcode} {x.type} {x.name}, {y.name}")

    def add(self, x: Value, y: Value) -> Value:
        return self.op("add", x, y)

    def sub(self, x: Value, y: Value) -> Value:
        return self.op("sub", x, y)

    def mul(self, x: Value, y: Value) -> Value:
        return self.op("mul", x, y)

    def fadd(self, x: Value, y: Value) -> Value:
        return self.op("fadd", x, y)

    def fsub(self, x: Value, y: Value) -> Value:
        return self.op("fsub", x, y)

    def fmul(self, x: Value, y: Value) -> Value:
        return self.op("fmul", x, y)

    def fdiv(self, x: Value, y: Value) -> Value:
        return self.op("fdiv", x, y)

    def and_(self, x: Value, y: Value) -> Value:
        return self.op("and", x, y)

    def or_(self, x: Value, y: Value) -> Value:
        return self.op("or", x, y)

    def cast(self, opcode: str, x: Value, type: str) -> Value:
        """trunc, zext, sext, fptosi, sitofp, fpext, fptrunc, bitcast, ..."""
        return self.emit(type, f"{opcode} {x} to {type}")

    def compare(self, predicate: str, x: Value, y: Value) -> Value:
        """icmp for integers ("slt", "eq", ...), fcmp for floats ("olt", "une", "uno", ...)."""
        opcode = "fcmp" if element(x.type) in ("float", "double", "half") else "icmp"
        return self.emit(vector_type(lanes_of(x.type), "i1"),
                         f"{opcode} {predicate} {x}, {y.name}")

    def select(self, condition: Value, x: Value, y: Value) -> Value:
        return self.emit(x.type, f"select {condition}, {x}, {y}")

    def intrinsic(self, name: str, result: str, *args: Value) -> Value:
        """A call of llvm.<name>, spelled with its type suffix: "sqrt.v8f32"."""
        return self.call(self.module.declare(f"llvm.{name}", result, [a.type for a in args]), *args)

    def call(self, function: Function, *args: Value) -> Value:
        text = f"call {function.result} @{function.name}({', '.join(map(str, args))})"
        if function.result == "void":
            self._lines.append("  " + text)
            return NULL
        return self.emit(function.result, text)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, fused where the machine can."""
        return self.intrinsic(f"fmuladd.{suffix(x.type)}", x.type, x, y, z)

    def max(self, x: Value, y: Value) -> Value:
        """The larger one; y where either is NaN (one instruction on x86)."""
        return self.select(self.compare("ogt" if _is_real(x) else "sgt", x, y), x, y)

    def min(self, x: Value, y: Value) -> Value:
        """The smaller one; y where either is NaN."""
        return self.select(self.compare("olt" if _is_real(x) else "slt", x, y), x, y)

    # Vectors

    def splat(self, x: Value, lanes: int | None = None) -> Value:
        """A scalar in every lane (of e.lanes, unless told)."""
        type = vector_type(lanes or self.lanes, x.type)
        one = self.emit(type, f"insertelement {type} poison, {x}, i32 0")
        return self.emit(type, f"shufflevector {one}, {type} poison, "
                               f"{vector_type(lanes_of(type), 'i32')} zeroinitializer")

    def extract(self, x: Value, lane: int) -> Value:
        return self.emit(element(x.type), f"extractelement {x}, i32 {lane}")

    def insert(self, x: Value, scalar: Value, lane: int) -> Value:
        return self.emit(x.type, f"insertelement {x}, {scalar}, i32 {lane}")

    def shuffle(self, x: Value, y: Value, picks: Sequence[int]) -> Value:
        """Lane i of the result is lane picks[i] of x and y taken as one vector."""
        return self.emit(vector_type(len(picks), element(x.type)),
                         f"shufflevector {x}, {y}, {const_vector('i32', picks)}")

    def reduce(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes combined into a scalar, in a fixed order."""
        n = lanes_of(x.type)
        while n > 1:
            n //= 2
            half = [self.shuffle(x, x, range(start, start + n)) for start in (0, n)]
            x = combine(*half)
        return self.extract(x, 0)

    def any(self, mask: Value) -> Value:
        """Whether any lane of a vector of i1 is set."""
        n = lanes_of(mask.type)
        return self.compare("ne", self.cast("bitcast", mask, f"i{n}"), Value(f"i{n}", "0"))

    def all(self, mask: Value) -> Value:
        """Whether every lane of a vector of i1 is set."""
        n = lanes_of(mask.type)
        return self.compare("eq", self.cast("bitcast", mask, f"i{n}"), Value(f"i{n}", "-1"))

    # Memory

    def at(self, pointer: Value, index: Value | int, type: str) -> Value:
        """Address of element `index` of an array of `type`."""
        where = i64(index) if isinstance(index, int) else index
        return self.emit("ptr", f"getelementptr {type}, {pointer}, {where}")

    def load(self, pointer: Value, type: str, index: Value | int | None = None) -> Value:
        """A scalar or vector at `pointer`; `index` counts elements, also for a vector."""
        return self._load("load", pointer, type, index)

    def load_to_change(self, pointer: Value, type: str, index: Value | int | None = None) -> Value:
        """A load whose value, some lanes replaced, is stored where it came from. LLVM would make
        a masked store of that, which takes AMD's processors a dozen cycles with AVX2."""
        return self._load("load volatile", pointer, type, index)

    def _load(self, opcode: str, pointer: Value, type: str, index: Value | int | None) -> Value:
        if index is not None:
            pointer = self.at(pointer, index, element(type))
        return self.emit(type, f"{opcode} {type}, {pointer}, align {_BYTES[element(type)]}")

    def store(self, x: Value, pointer: Value, index: Value | int | None = None) -> None:
        if index is not None:
            pointer = self.at(pointer, index, element(x.type))
        self._lines.append(f"  store {x}, {pointer}, align {_BYTES[element(x.type)]}")

    def load_as(self, storage: str, pointer: Value, index: Value | int | None = None, *,
                scalar: bool = False) -> Value:
        """Elements of a tensor of dtype `storage`, as the type computed in."""
        n = 0 if scalar else self.lanes
        if storage == "bfloat16":
            bits = self.cast("zext", self.load(pointer, vector_type(n, "i16"), index),
                             vector_type(n, "i32"))
            high = self.op("shl", bits, const(bits.type, 16))
            return self._real(self.cast("bitcast", high, vector_type(n, "float")))
        name = {"float32": "float", "float64": "double", "float16": "half"}[storage]
        return self._real(self.load(pointer, vector_type(n, name), index))

    def _real(self, x: Value) -> Value:
        if element(x.type) == self.real:
            return x
        opcode = "fptrunc" if element(x.type) == "double" else "fpext"
        return self.cast(opcode, x, vector_type(lanes_of(x.type), self.real))

    def store_as(self, storage: str, x: Value, pointer: Value,
                 index: Value | int | None = None) -> None:
        """Round a float or double (scalar or vector) to dtype `storage` (to nearest even)."""
        if storage == "bfloat16":
            x = self._to_bfloat16(x)
        elif storage == "float16":
            x = self.cast("fptrunc", x, vector_type(lanes_of(x.type), "half"))
        self.store(x, pointer, index)

    def _to_bfloat16(self, x: Value) -> Value:
        n = lanes_of(x.type)
        bits = self.cast("bitcast", x, vector_type(n, "i32"))
        word = bits.type
        odd = self.and_(self.op("lshr", bits, const(word, 16)), const(word, 1))
        rounded = self.add(bits, self.add(odd, const(word, 0x7FFF)))
        kept = self.select(self.compare("uno", x, x), const(word, 0x7FC00000), rounded)
        return self.cast("trunc", self.op("lshr", kept, const(word, 16)), vector_type(n, "i16"))

    def store_bits(self, mask: Value, pointer: Value) -> None:
        """A vector of up to 16 i1, as an i16."""
        bits = self.cast("bitcast", mask, f"i{lanes_of(mask.type)}")
        self.store(bits if bits.type == "i16" else self.cast("zext", bits, "i16"), pointer)

    def load_bits(self, pointer: Value) -> Value:
        """What store_bits kept, `e.lanes` of them."""
        bits = self.load(pointer, "i16")
        if byte_size(self.vector) == 64:  # AVX-512 has registers of bits
            narrow = f"i{self.lanes}"
            return self.cast("bitcast", bits if narrow == "i16" else
                             self.cast("trunc", bits, narrow), self.vec("i1"))
        word = f"i{8 * byte_size(self.real)}"
        lanes = const_vector(word, [1 << i for i in range(self.lanes)])
        mine = self.and_(self.splat(self.cast("zext", bits, word)), lanes)
        return self.compare("ne", mine, const(mine.type, 0))

    def atomic_add(self, pointer: Value, amount: int = 1) -> Value:
        """Add to an i64; gives the value before. Acquires and releases."""
        return self.emit("i64", f"atomicrmw add {pointer}, {i64(amount)} acq_rel")

    def atomic_load(self, pointer: Value) -> Value:
        return self.emit("i64", f"load atomic i64, {pointer} acquire, align 8")

    # Control flow

    def _label(self) -> str:
        self._count += 1
        return f"b{self._count}"

    def _start(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

    def _branch(self, label: str) -> None:
        self._lines.append(f"  br label %{label}")

    def ret(self, x: Value | None = None) -> None:
        self._lines.append(f"  ret {x}" if x is not None else "  ret void")

    @contextmanager
    def loop(self, start: Value | int, end: Value | int, step: Value | int = 1,
             carried: Sequence[Value] = ()) -> Iterator[Loop]:
        """for index in range(start, end, step), with carried values:

            with e.loop(0, n, 8, [total]) as loop:
                loop.next = [e.fadd(loop.values[0], ...)]
            total = loop.values[0]
        """
        first, last, by = (i64(x) if isinstance(x, int) else x for x in (start, end, step))
        head, body, done = self._label(), self._label(), self._label()
        before = self._block
        self._branch(head)
        self._start(head)
        phis = [Value(v.type, self._fresh()) for v in (first, *carried)]
        where = len(self._lines)
        self._lines.extend("" for _ in phis)
        more = self.compare("slt", phis[0], last)
        self._lines.append(f"  br {more}, label %{body}, label %{done}")
        self._start(body)
        loop = Loop(phis[0], phis[1:])
        yield loop
        following = [self.add(phis[0], by), *loop.next]
        for i, (phi, old, new) in enumerate(zip(phis, (first, *carried), following, strict=True)):
            self._lines[where + i] = (f"  {phi.name} = phi {phi.type} [ {old.name}, %{before} ], "
                                      f"[ {new.name}, %{self._block} ]")
        self._branch(head)
        self._start(done)

    @contextmanager
    def if_(self, condition: Value) -> Iterator[None]:
        """Code run only where the scalar i1 holds; values made inside stay inside."""
        then, done = self._label(), self._label()
        self._lines.append(f"  br {condition}, label %{then}, label %{done}")
        self._start(then)
        yield
        self._branch(done)
        self._start(done)

    def if_else(self, condition: Value, then: Callable[[], Sequence[Value]],
                otherwise: Callable[[], Sequence[Value]]) -> list[Value]:
        """Run one of two branches; gives the values that the one taken returned."""
        yes, no, done = self._label(), self._label(), self._label()
        self._lines.append(f"  br {condition}, label %{yes}, label %{no}")
        ends: list[tuple[str, Sequence[Value]]] = []
        for label, body in ((yes, then), (no, otherwise)):
            self._start(label)
            values = body()
            ends.append((self._block, values))
            self._branch(done)
        self._start(done)
        (one, xs), (two, ys) = ends
        return [self.emit(x.type, f"phi {x.type} [ {x.name}, %{one} ], [ {y.name}, %{two} ]")
                for x, y in zip(xs, ys, strict=True)]

    @contextmanager
    def while_(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Repeat while `condition()`, emitted at the head of the loop, gives true."""
        head, body, done = self._label(), self._label(), self._label()
        self._branch(head)
        self._start(head)
        self._lines.append(f"  br {condition()}, label %{body}, label %{done}")
        self._start(body)
        yield
        self._branch(head)
        self._start(done)

    @contextmanager
    def claim(self, counter: Value, count: Value) -> Iterator[Value]:
        """Run for units 0 .. count - 1 that no other thread sharing the counter has claimed."""
        head, body, done = self._label(), self._label(), self._label()
        self._branch(head)
        self._start(head)
        unit = self.atomic_add(counter)
        more = self.compare("slt", unit, count)
        self._lines.append(f"  br {more}, label %{body}, label %{done}")
        self._start(body)
        yield unit
        self._branch(head)
        self._start(done)

    # Mathematics

    def exp2(self, x: Value) -> Value:
        """2**x of a vector of floats or doubles, to 2 ulp; NaN stays NaN. Results far below the
        normal range are 0, so 2**-inf is exactly 0; for x up to the largest exponent."""
        m = _EXP2[element(x.type)]
        magic = const(x.type, m.magic)
        x = self.max(const(x.type, m.lowest), x)
        shifted = self.fadd(x, magic)
        fraction = self.fsub(x, self.fsub(shifted, magic))
        result = const(x.type, m.coefficients[-1])
        for c in m.coefficients[-2::-1]:
            result = self.fma(result, fraction, const(x.type, c))
        bits = vector_type(lanes_of(x.type), m.integer)
        exponent = self.op("shl", self.cast("bitcast", shifted, bits), const(bits, m.mantissa))
        return self.fmul(result, self.cast("bitcast", exponent, x.type))

    def log2(self, x: Value) -> Value:
        """log2 of a vector of positive normal floats or doubles; NaN stays NaN.

        x = 2**e * m with m in [sqrt(1/2), sqrt(2)); log2(m) = 2/ln2 * atanh((m-1)/(m+1)).
        """
        m = _EXP2[element(x.type)]
        bits = vector_type(lanes_of(x.type), m.integer)
        word = self.cast("bitcast", x, bits)
        offset = self.sub(word, const(bits, m.root_half))
        exponent = self.op("ashr", offset, const(bits, m.mantissa))
        mantissa = self.cast("bitcast", self.sub(word, self.op("shl", exponent,
                             const(bits, m.mantissa))), x.type)
        one = const(x.type, 1.0)
        ratio = self.fdiv(self.fsub(mantissa, one), self.fadd(mantissa, one))
        series = self.polynomial(self.fmul(ratio, ratio), m.atanh)
        whole = self.cast("sitofp", exponent, x.type)
        result = self.fma(ratio, series, whole)
        return self.select(self.compare("uno", x, x), x, result)

    def polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        """Sum of coefficients[i] * x**i, by Estrin's scheme (short dependency chains)."""
        terms = [const(x.type, c) for c in coefficients]
        power = x
        while len(terms) > 1:
            pairs = [self.fma(terms[i + 1], power, terms[i]) for i in range(0, len(terms) - 1, 2)]
            terms = pairs + terms[len(pairs) * 2:]
            if len(terms) > 1:
                power = self.fmul(power, power)
        return terms[0]


def _is_real(x: Value) -> bool:
    return element(x.type) in ("float", "double")


def suffix(type: str) -> str:
    """How an intrinsic's name spells a type: v8f32, f64, v4i64, p0."""
    names = {"float": "f32", "double": "f64", "half": "f16", "ptr": "p0"}
    n, scalar = lanes_of(type), element(type)
    return (f"v{n}" if n else "") + names.get(scalar, scalar)


@dataclass(frozen=True)
class _Format:
    """Constants of exp2 and log2 for one floating-point format."""

    integer: str
    mantissa: int
    magic: float  # 1.5 * 2**mantissa + bias: adding it rounds to an integer in the low bits
    lowest: float  # the exponent that stands for 0, and for all below
    root_half: int  # bits of sqrt(1/2)
    coefficients: tuple[float, ...]  # 2**x on [-1/2, 1/2]
    atanh: tuple[float, ...]  # 2/ln2 * atanh(x)/x in powers of x**2


_LN2 = 0.6931471805599453
_EXP2 = {
    "float": _Format("i32", 23, 1.5 * 2**23 + 127, -127.0, 0x3F3504F3,
                     (1.0, 0.69314698, 0.24022242, 0.055507337, 0.0096715127, 0.0013264727),
                     tuple(2 / _LN2 / (2 * i + 1) for i in range(5))),
    "double": _Format("i64", 52, 1.5 * 2**52 + 1023, -1023.0, 0x3FE6A09E667F3BCD,
                      tuple(_LN2**i / f for i, f in enumerate(
                          (1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800,
                           479001600, 6227020800))),
                      tuple(2 / _LN2 / (2 * i + 1) for i in range(12))),
}
