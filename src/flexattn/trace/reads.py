"""What a mod's code reads, by its bytecode.

In: a code object. Out: its `Reads`: every global, captured variable and attribute of `self` that
it, or a function made inside it, can look at, with the attributes taken of it at once. Rejects
(None) code whose result may depend on more, or that changes something: stores anywhere but in its
own variables, imports, `with`, `try`, attributes that are none of a traced scalar's or a tensor's
plain ones, and any instruction that is not listed here.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

from flexattn.trace.torch_functions import METHODS

_NAMES = """
    RESUME NOP CACHE EXTENDED_ARG NOT_TAKEN COPY_FREE_VARS MAKE_CELL PUSH_NULL POP_TOP POP_ITER
    COPY SWAP LOAD_CONST LOAD_SMALL_INT RETURN_CONST RETURN_VALUE LOAD_CLOSURE LOAD_FAST
    LOAD_FAST_CHECK LOAD_FAST_BORROW LOAD_FAST_AND_CLEAR LOAD_FAST_LOAD_FAST
    LOAD_FAST_BORROW_LOAD_FAST_BORROW STORE_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST
    STORE_FAST_MAYBE_NULL DELETE_FAST
    BINARY_OP BINARY_SUBSCR BINARY_SLICE UNARY_NEGATIVE UNARY_POSITIVE UNARY_INVERT UNARY_NOT
    TO_BOOL COMPARE_OP CONTAINS_OP PRECALL KW_NAMES CALL CALL_KW CALL_FUNCTION_EX
    BUILD_TUPLE BUILD_LIST BUILD_SLICE BUILD_MAP BUILD_CONST_KEY_MAP LIST_EXTEND LIST_APPEND
    LIST_TO_TUPLE DICT_MERGE UNPACK_SEQUENCE UNPACK_EX GET_ITER FOR_ITER END_FOR
    JUMP_FORWARD JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT POP_JUMP_IF_TRUE POP_JUMP_IF_FALSE
    POP_JUMP_IF_NONE POP_JUMP_IF_NOT_NONE POP_JUMP_FORWARD_IF_TRUE POP_JUMP_FORWARD_IF_FALSE
    POP_JUMP_BACKWARD_IF_TRUE POP_JUMP_BACKWARD_IF_FALSE POP_JUMP_FORWARD_IF_NONE
    POP_JUMP_FORWARD_IF_NOT_NONE POP_JUMP_BACKWARD_IF_NONE POP_JUMP_BACKWARD_IF_NOT_NONE
    JUMP_IF_TRUE_OR_POP JUMP_IF_FALSE_OR_POP LOAD_ASSERTION_ERROR RAISE_VARARGS RERAISE
    MAKE_FUNCTION SET_FUNCTION_ATTRIBUTE RETURN_GENERATOR YIELD_VALUE
"""
_HARMLESS = frozenset(_NAMES.split())
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_INTRINSICS = frozenset({3, 5, 6})  # a generator's end, +x, a list that becomes a tuple
_LOADS = frozenset({"LOAD_FAST", "LOAD_FAST_BORROW"})
_PAIRS = frozenset({"LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW"})
_OF_A_VARIABLE = frozenset({"LOAD_DEREF", "STORE_DEREF", "DELETE_DEREF"})
# Of a traced scalar, a captured tensor, a number, a torch.finfo or a list made by the mod: nothing
# that depends on what is in a tensor or where it lies, as `data_ptr` does.
VALUES = frozenset(METHODS) | {"shape", "dtype", "device", "ndim", "dim", "size", "numel",
                               "requires_grad", "eps", "tiny", "append"}
GLOBAL, CAPTURED, SELF = range(3)
Read = tuple[int, str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Reads:
    """all: (where from, name, attributes taken of it one after the other), each once; the code is
    held, since it is found by its identity."""

    code: CodeType
    all: tuple[Read, ...]


class _Unknown(Exception):
    """The code cannot be told."""


_MOST_KNOWN = 1024
_known: dict[tuple[int, bool], tuple[CodeType, Reads | None]] = {}


def reads_of(code: CodeType, method: bool = False) -> Reads | None:
    """method: the first argument is an object of which the code may only take attributes."""
    found = _known.get((id(code), method))
    if found is None or found[0] is not code:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[id(code), method] = (code, _analysed(code, method))
    return found[1]


def _analysed(code: CodeType, method: bool) -> Reads | None:
    own = code.co_varnames[0] if method and code.co_argcount else None
    try:
        if method and (own is None or own in code.co_cellvars):
            raise _Unknown
        return Reads(code, tuple(dict.fromkeys(_reads(code, frozenset(code.co_freevars), own))))
    except _Unknown:
        return None


def _reads(code: CodeType, captured: frozenset[str], own: str | None) -> Iterator[Read]:
    """captured: the variables of code outside of the mod."""
    steps = list(dis.get_instructions(code))
    taken = 0  # attributes that belong to a read before them
    for i, step in enumerate(steps):
        name = step.opname
        if taken:
            taken -= 1
            continue
        where = _where(step, captured, own)
        if where is not None:
            chain = tuple(_attributes(steps[i + 1:]))
            taken = len(chain)
            yield where, str(step.argval) if where != SELF else "", chain
        elif name in _ATTRIBUTE:
            if step.argval not in VALUES:
                raise _Unknown
        elif name == "IS_OP":  # equal numbers may be one object or two
            before = steps[i - 1]
            plain = before.opname == "LOAD_CONST" and isinstance(before.argval, bool | None)
            if step.is_jump_target or not plain:
                raise _Unknown
        elif name == "CALL_INTRINSIC_1":
            if step.arg not in _INTRINSICS:
                raise _Unknown
        elif name not in _HARMLESS and name not in _OF_A_VARIABLE:
            raise _Unknown
    for const in code.co_consts:
        if isinstance(const, CodeType):  # a function, or a comprehension, made by the mod
            yield from _reads(const, captured & frozenset(const.co_freevars), None)


def _where(step: dis.Instruction, captured: frozenset[str], own: str | None) -> int | None:
    """What kind of read an instruction is; None for one that reads nothing from outside."""
    name, variable = step.opname, step.argval
    if name == "LOAD_GLOBAL":
        return GLOBAL
    if name in _OF_A_VARIABLE and variable in captured:
        if name != "LOAD_DEREF":
            raise _Unknown
        return CAPTURED
    variables = variable if isinstance(variable, tuple) else (variable,)
    if own is None or "FAST" not in name or own not in variables:
        return None
    if name in _LOADS or (name in _PAIRS and variables[0] != own):  # the last one's are taken
        return SELF
    raise _Unknown


def _attributes(steps: list[dis.Instruction]) -> Iterator[str]:
    for step in steps:
        if step.opname not in _ATTRIBUTE or step.is_jump_target:
            return
        yield step.argval
