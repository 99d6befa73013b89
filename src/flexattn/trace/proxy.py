"""Proxies for the scalars of a mod, and the tape they record.

In: Python operators and torch functions on `Proxy` (a traced scalar) and `View` (a captured tensor
indexed in some of its dimensions). Out: entries (op, dtype, argument positions, attribute) on the
`Tape`. Rejects operations that have no Op and no composition of Ops, and any request for a value.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexattn.errors import (
    TraceError,
    UnsupportedOpError,
    message,
    user_location,
)
from flexattn.ir.ops import COMPARISON, DTYPES, Op, dtype_name
from flexattn.trace.refusals import (
    IN_PLACE,
    RANDOM,
    check_capture,
    reject_random,
    reject_read,
    reject_write,
    unsupported,
)

NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat)  # symbolic ones: of torch.compile
_SAMPLES = {dtype: torch.ones((), dtype=dtype) for dtype in DTYPES}
_NUMBER_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def python_type(value: Any) -> type:
    """bool, int or float: the type a number counts as."""
    if isinstance(value, bool):
        return bool
    return int if isinstance(value, (int, torch.SymInt)) else float


class Tape:
    """entries: (op, dtype, args, attr); numbers: values of NUMBER's slots; captures: tensors;
    asked: see Trace."""

    def __init__(self, device: torch.device, kind: str = "score") -> None:
        self.device, self.kind = device, kind
        self.entries: list[tuple[Op, torch.dtype, tuple[int, ...], Any]] = []
        self.numbers: list[Any] = []
        self.captures: list[Tensor] = []
        self.asked: set[str] = set()
        self.running = False  # a score mod, with gradients enabled
        self._slots: dict[int, int] = {}

    def record(self, op: Op, dtype: torch.dtype, args: tuple[int, ...], attr: Any = None) -> Proxy:
        if self.running and not torch.is_grad_enabled():
            raise UnsupportedOpError(message(
                "A mod switches gradients off.",
                expected="a mod whose every value has its gradient",
                remedy="detach a captured tensor outside of the mod", where=user_location()))
        self.entries.append((op, dtype, args, attr))
        return Proxy(self, len(self.entries) - 1, dtype)

    def number(self, value: Any) -> Proxy:
        """Each occurrence of a Python number has a slot of its own."""
        self.numbers.append(value)
        dtype = _NUMBER_DTYPES.get(type(value)) or _NUMBER_DTYPES[python_type(value)]
        return self.record(Op.NUMBER, dtype, (), len(self.numbers) - 1)

    def literal(self, value: bool | int | float, dtype: torch.dtype) -> Proxy:
        """A number that is part of what is computed: another value is another mod."""
        return self.record(Op.CONST, dtype, (), value)

    def load(self, tensor: Tensor, indices: list[Proxy]) -> Proxy:
        slot = self._slots.get(id(tensor))
        if slot is None:
            check_capture(tensor, self.device, self.kind)
            slot = self._slots[id(tensor)] = len(self.captures)
            self.captures.append(tensor)
        args = tuple([self.cast(i, torch.int64).index for i in indices])
        return self.record(Op.LOAD, tensor.dtype, args, slot)

    def wrap(self, value: Any) -> Proxy:
        if isinstance(value, Proxy):
            return value
        if isinstance(value, NUMBERS):
            return self.number(value)
        if isinstance(value, np.generic):
            return self.number(value.item())
        if isinstance(value, Tensor) and value.dim() == 0:
            return self.load(value, [])
        shape = tuple(value.shape) if isinstance(value, (Tensor, View)) else type(value).__name__
        raise TraceError(message("A mod computes with something that is not a scalar.",
                                 expected="a scalar, a number or a 0-d tensor", got=str(shape),
                                 remedy="index the tensor in every dimension",
                                 where=user_location()))

    def cast(self, value: Proxy, dtype: torch.dtype) -> Proxy:
        return value if value.dtype is dtype else self.record(Op.CAST, dtype, (value.index,))

    def operands(self, *values: Any) -> tuple[list[Proxy], torch.dtype]:
        """Proxies of one dtype, promoted as torch promotes scalars and Python numbers."""
        proxies: list[Proxy] = []
        kinds: list[type | torch.dtype] = []
        for value in values:
            if type(value) is not Proxy:
                if type(value) not in _NUMBER_DTYPES and isinstance(value, np.generic):
                    value = value.item()
                if type(value) in _NUMBER_DTYPES or isinstance(value, NUMBERS):
                    proxies.append(self.number(value))
                    kinds.append(python_type(value))
                    continue
                value = self.wrap(value)
            proxies.append(value)
            kinds.append(value.dtype)
        dtype = _promote(torch.get_default_dtype(), *kinds)
        return [p if p.dtype is dtype else self.cast(p, dtype) for p in proxies], dtype

    def apply(self, op: Op, *values: Any, dtype: torch.dtype | None = None,
              at_least: torch.dtype | None = None) -> Proxy:
        """op on promoted operands; bool is promoted to `at_least` where the op needs numbers."""
        args, common = self.operands(*values)
        if at_least is not None and common is torch.bool:
            args, common = [self.cast(a, at_least) for a in args], at_least
        return self.record(op, dtype or common, tuple([a.index for a in args]))

    def float_apply(self, op: Op, *values: Any) -> Proxy:
        """op on operands promoted to floating point (integers become the default dtype)."""
        args, common = self.operands(*values)
        if not common.is_floating_point:
            common = torch.get_default_dtype()
        return self.record(op, common, tuple([self.cast(a, common).index for a in args]))


@cache
def _promote(default: torch.dtype, *kinds: type | torch.dtype) -> torch.dtype:
    """torch's rule: dtypes of tensors first, Python numbers only raise the category. `default` is
    torch's default dtype, which the rule reads."""
    samples = [kind(1) if isinstance(kind, type) else _SAMPLES[kind] for kind in kinds]
    tensors = [s for s in samples if isinstance(s, Tensor)]
    result = tensors[0].dtype if tensors else torch.result_type(samples[0], samples[-1])
    for t in tensors[1:]:
        result = torch.promote_types(result, t.dtype)
    for s in samples:
        if not isinstance(s, Tensor):
            result = torch.result_type(_SAMPLES[result], s)
    return result


def contains_proxy(values: Any) -> bool:
    for v in values:
        if isinstance(v, (Proxy, View)):
            return True
        if isinstance(v, (tuple, list)) and contains_proxy(v):
            return True
    return False


@cache
def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    """What functions and methods mean; the tables need this file's classes."""
    from flexattn.trace.torch_functions import FUNCTIONS, METHODS

    return FUNCTIONS, METHODS


def call_on_proxies(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    """A torch function with a proxy among its arguments."""
    name = getattr(func, "__name__", str(func))
    if name == "__getitem__":
        return index(tape, args[0], args[1])
    if name in IN_PLACE or (name.endswith("_") and not name.startswith("_")):
        reject_write(name)
    if kwargs.get("out") is not None:
        reject_write(f"{name}, out=")
    if name in RANDOM:
        reject_random(name)
    functions, methods = _tables()
    rule = (methods if func is torch.Tensor.where else functions).get(name)
    if rule is None:
        unsupported(f"calls {name}")
    try:
        return rule(tape, *args, **kwargs)
    except TypeError as error:
        raise UnsupportedOpError(message(f"A mod calls {name} with arguments that flexattn cannot "
                                         "trace.", got=str(error), where=user_location())) from None


def scalar_factory(tape: Tape, name: str, args: tuple, kwargs: dict) -> Proxy | None:
    """torch.tensor(2.0) and the like inside a mod are numbers, not captured tensors."""
    if name in ("tensor", "as_tensor", "scalar_tensor"):
        value = args[0] if args else kwargs.get("data", kwargs.get("s"))
    elif name == "full":
        size = args[0] if args else kwargs.get("size")
        if not isinstance(size, (tuple, list)) or len(size):
            return None
        value = args[1] if len(args) > 1 else kwargs.get("fill_value")
    elif name in ("zeros", "ones") and args and args[0] == ():
        value = 0.0 if name == "zeros" else 1.0
    else:
        return None
    if not isinstance(value, (*NUMBERS, np.generic)):
        return None
    default = torch.get_default_dtype()
    dtype = kwargs.get("dtype") or (default if isinstance(value, float) else None)
    made = tape.wrap(value)
    return tape.cast(made, dtype) if dtype else made


def index(tape: Tape, target: Any, key: Any) -> Any:
    """target[key]: a scalar when every dimension is indexed, otherwise a View."""
    if isinstance(target, Proxy):
        if key is Ellipsis or key == ():
            return target
        raise TraceError(message("A mod indexes a scalar.", got=f"[{key}]",
                                 where=user_location()))
    view = target if isinstance(target, View) else View(tape, target)
    return view.index(key if isinstance(key, tuple) else (key,))


class View:
    """A captured tensor of which some dimensions are indexed by traced scalars."""

    def __init__(self, tape: Tape, tensor: Tensor, fixed: tuple[Proxy | None, ...] = ()) -> None:
        self.tape, self.tensor = tape, tensor
        self.fixed = fixed or (None,) * tensor.dim()

    dtype = property(lambda self: self.tensor.dtype)
    device = property(lambda self: self.tape.device)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(s for s, f in zip(self.tensor.shape, self.fixed, strict=True)
                          if f is None)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        reject_read("iteration over a captured tensor")

    def __getitem__(self, key: Any) -> Any:
        return self.index(key if isinstance(key, tuple) else (key,))

    def index(self, keys: tuple) -> Any:
        free = [i for i, f in enumerate(self.fixed) if f is None]
        if Ellipsis in [k for k in keys if k is Ellipsis]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            gap = len(free) - (len(keys) - 1)
            keys = keys[:at] + (slice(None),) * gap + keys[at + 1:]
        if len(keys) > len(free):
            raise TraceError(message("A mod indexes a captured tensor in too many dimensions.",
                                     expected=f"at most {len(free)}", got=str(len(keys)),
                                     where=user_location()))
        fixed = list(self.fixed)
        for dim, key in zip(free, keys, strict=False):
            if isinstance(key, slice) and key == slice(None):
                continue
            if isinstance(key, slice) or key is None or isinstance(key, (list, str)):
                raise UnsupportedOpError(message(
                    f"A mod indexes a captured tensor with {key!r}.",
                    expected="scalars, numbers or `:`",
                    remedy="slice the tensor outside of the mod", where=user_location()))
            fixed[dim] = self._index(key)
        if any(f is None for f in fixed):
            return View(self.tape, self.tensor, tuple(fixed))
        return self.tape.load(self.tensor, fixed)  # type: ignore[arg-type]

    def _index(self, key: Any) -> Proxy:
        key = self.tape.wrap(key)
        if key.dtype.is_floating_point or key.dtype in (torch.bool, torch.uint8):
            raise TraceError(message("A mod indexes a captured tensor with a value that is not a "
                                     "signed integer.", expected="an integer",
                                     got=dtype_name(key.dtype),
                                     remedy="convert it with .long() or .to(torch.int64)",
                                     where=user_location()))
        return key

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        unsupported(f"uses .{name} of a captured tensor")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tape = next(a for a in args if isinstance(a, (Proxy, View))).tape
        return call_on_proxies(tape, func, args, kwargs or {})


class Proxy:
    """A traced scalar: behaves like a 0-d tensor."""

    __slots__ = ("tape", "index", "dtype")

    def __init__(self, tape: Tape, index: int, dtype: torch.dtype) -> None:
        self.tape, self.index, self.dtype = tape, index, dtype

    ndim = 0
    shape = torch.Size(())
    requires_grad = False
    __array_ufunc__ = None  # numpy's scalars leave their operators to ours
    device = property(lambda self: self.tape.device)

    def __repr__(self) -> str:
        return f"<traced {dtype_name(self.dtype)} scalar>"

    def dim(self) -> int:
        return 0

    def size(self, dim: int | None = None) -> Any:
        return torch.Size(())

    def numel(self) -> int:
        return 1

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tape = _tape_of(args) or _tape_of(tuple((kwargs or {}).values()))
        return call_on_proxies(tape, func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Method spellings: x.exp() is torch.exp(x)."""
        if name.startswith("__"):
            raise AttributeError(name)
        rule = _tables()[1].get(name)
        if rule is not None:
            return lambda *args, **kwargs: rule(self.tape, self, *args, **kwargs)
        if name in ("item", "tolist", "numpy", "cpu"):
            reject_read(f".{name}()")
        if name.endswith("_"):
            reject_write(f".{name}")
        if name in RANDOM:
            reject_random(f".{name}")
        unsupported(f"uses .{name}")

    def __getitem__(self, key: Any) -> Any:
        return index(self.tape, self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        reject_write("item assignment")

    def __bool__(self) -> bool:
        reject_read("if, and, or, not, bool()")
        return False

    def __int__(self) -> int:
        reject_read("int()")
        return 0

    def __float__(self) -> float:
        reject_read("float() or a math function")
        return 0.0

    def __index__(self) -> int:
        reject_read("an index into a Python list, or range()")
        return 0

    def __iter__(self) -> Any:
        reject_read("iteration")

    def __len__(self) -> int:
        reject_read("len()")
        return 0

    __hash__ = object.__hash__


def _tape_of(values: tuple) -> Any:
    for v in values:
        if isinstance(v, (Proxy, View)):
            return v.tape
        if isinstance(v, (tuple, list)) and (found := _tape_of(tuple(v))):
            return found
    return None


def compare(tape: Tape, op: Op, x: Any, y: Any) -> Proxy:
    assert op in COMPARISON
    return tape.apply(op, x, y, dtype=torch.bool)
