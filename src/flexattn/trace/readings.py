"""What a mod reads, as values that say whether it has changed.

In: a mod. Out: `Readings`: a key that is equal as long as nothing that the mod reads (see
trace.reads) has changed but the contents of captured tensors, and those tensors. Numbers, names
and dtypes count by value, functions by their code and by what they read, tensors by their kind and
by which of them are one. Rejects (Unknown) what cannot be told by reading it: lists, dicts,
objects other than modules and plain instances of which attributes are taken, functions that are
not known to depend on their arguments alone.
"""

from __future__ import annotations

import functools
import math
import operator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flexattn.trace.reads import CAPTURED, GLOBAL, VALUES, reads_of
from flexattn.trace.torch_functions import FUNCTIONS

_DEEPEST, _LONGEST = 12, 1000  # of what one mod reads
_NONE = object()
_PLAIN = frozenset({int, bool, str, type(None), type(...), torch.dtype, torch.device})
_TENSORS = frozenset({Tensor, nn.Parameter})
_TORCH = (torch, torch.nn.functional, torch.special)
_OPERATORS = ("add sub mul truediv floordiv mod neg pos abs and_ or_ xor inv invert lt le eq ne gt "
              "ge pow lshift rshift getitem")
_FACTORIES = ("tensor", "as_tensor", "scalar_tensor", "full", "zeros", "ones")


class Unknown(Exception):
    """The mod has to be traced."""


class Readings:
    """key: what is read, each value after the kind of thing it is, so that no two readings look
    alike. tensors: the captured ones, each once."""

    def __init__(self, fn: Any) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._functions: dict[int, int] = {}
        self._depth = 0
        kind = type(fn)
        if kind in (FunctionType, functools.partial, MethodType):
            self._value(fn)
        elif isinstance(call := _of_class(kind, "__call__"), FunctionType):  # it is only called
            self._function(call, fn)
        else:
            raise Unknown

    def _value(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.key += (kind, value)
        elif kind in _TENSORS:
            self._tensor(value)
        elif kind is FunctionType and not _is_torch(value):
            self._which(value)
            self._function(value, _NONE)
        elif kind is float:
            self.key += (kind, value or repr(value))
        elif kind in (tuple, torch.Size):
            self.key += (kind, len(value))
            for each in value:
                self._value(each)
        elif kind is functools.partial and _is_plain(value):
            self._which(value)
            self.key += (kind, len(value.args), *value.keywords)
            for each in (value.func, *value.args, *value.keywords.values()):
                self._value(each)
        elif kind is MethodType and type(value.__func__) is FunctionType:
            self._which(value.__func__)
            self._which(value.__self__)
            self._function(value.__func__, value.__self__)
        elif _is_pure(value):
            self.key += (BuiltinFunctionType, value)
        else:
            raise Unknown
        if len(self.key) > _LONGEST:
            raise Unknown

    def _which(self, value: Any) -> None:
        """Which functions are one: a mod may compare them."""
        self.key.append(self._functions.setdefault(id(value), len(self._functions)))

    def _tensor(self, tensor: Tensor) -> None:
        place = self._places.get(id(tensor))
        if place is None:
            place = self._places[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            if tensor.layout is not torch.strided or tensor.is_neg() or not _is_plain(tensor):
                raise Unknown
        self.key += (Tensor, place, tensor.dtype, tensor.dim(), tensor.device,
                     tensor.requires_grad)

    def _function(self, fn: FunctionType, owner: Any) -> None:
        """owner: what a method is called on."""
        reads = reads_of(fn.__code__, owner is not _NONE)
        self._depth += 1
        if reads is None or self._depth > _DEEPEST or not _is_plain(fn):
            raise Unknown
        self.key.append(reads)
        for where, name, attributes in reads.all:
            if where == CAPTURED:
                value = _captured(fn, name)
            elif where == GLOBAL:
                value = fn.__globals__.get(name, _NONE)
                if value is _NONE:
                    value = fn.__builtins__.get(name, _NONE)
            else:
                value = owner
            self._value(self._attributes(value, attributes) if attributes else value)
        defaults, by_name = fn.__defaults__, fn.__kwdefaults__
        self.key.append(bool(defaults) + 2 * bool(by_name))
        if defaults:
            self._value(defaults)
        if by_name:
            self._value(tuple(by_name.items()))
        self._depth -= 1

    def _attributes(self, value: Any, names: tuple[str, ...]) -> Any:
        """Follows names through modules and objects; those of a tensor or a number are part of the
        code."""
        followed = 0
        for name in names:
            kind = type(value)
            if kind is ModuleType:
                value = value.__dict__.get(name, _NONE)
            elif kind in _TENSORS or kind is int or kind is float:
                if not VALUES.issuperset(names[followed:]):
                    raise Unknown
                break
            else:
                value = _attribute(value, name)
            followed += 1
        self.key.append(followed)
        return value


def _captured(fn: FunctionType, name: str) -> Any:
    try:
        return fn.__closure__[fn.__code__.co_freevars.index(name)].cell_contents  # type: ignore
    except ValueError:  # not assigned yet
        raise Unknown from None


def _attribute(owner: Any, name: str) -> Any:
    """owner.name, where that runs nobody's code."""
    kind = type(owner)
    own = getattr(owner, "__dict__", _NONE)
    if kind.__getattribute__ is not object.__getattribute__ or type(own) is not dict:
        raise Unknown
    shared = _of_class(kind, name)
    if shared is not _NONE and any(
            _of_class(type(shared), special) is not _NONE
            for special in ("__get__", "__set__", "__delete__")):
        raise Unknown
    if name in own:
        return own[name]
    if shared is _NONE and _of_class(kind, "__getattr__") is nn.Module.__getattr__:
        tables = [own.get(table, ()) for table in ("_parameters", "_buffers", "_modules")]
        return next((table[name] for table in tables if name in table), _NONE)
    return shared


def _is_plain(value: Any) -> bool:
    """Whether code that takes an attribute of it, which may be any of VALUES, gets none that was
    put there."""
    return not value.__dict__ or VALUES.isdisjoint(value.__dict__)


def _of_class(kind: type, name: str) -> Any:
    return next((c.__dict__[name] for c in kind.__mro__ if name in c.__dict__), _NONE)


# Functions that depend on their arguments alone, and change nothing


def _is_torch(fn: FunctionType) -> bool:
    return fn.__globals__.get("__name__", "").startswith("torch.") and fn in _pure()


def _is_pure(value: Any) -> bool:
    return type(value) in (BuiltinFunctionType, type) and value in _pure()


@functools.cache
def _pure() -> frozenset:
    """torch's that the tracer has rules for, Python's and those of math and operator. In no key is
    one that somebody put in their place: it is none of these types, or not of torch."""
    of_torch = [getattr(module, name, None) for module in _TORCH
                for name in (*FUNCTIONS, *_FACTORIES)]
    of_python = [abs, min, max, sum, pow, round, divmod, len, isinstance, all, any, zip, enumerate,
                 reversed, range, int, float, bool, tuple, list, functools.reduce]
    of_math = [fn for fn in vars(math).values() if isinstance(fn, BuiltinFunctionType)]
    return frozenset([*filter(None, of_torch), *of_python, *of_math, torch.finfo, torch.iinfo,
                      *(getattr(operator, name) for name in _OPERATORS.split())])
