"""What every CPU kernel's launch needs: compiled plans, tables of runs and of captured tensors,
working memory, and the report of out-of-range reads.

In: parts of a runtime.call.Call. Out: addresses and sizes for a kernel's block of arguments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from flexattn import compile
from flexattn.analysis.block_sparsity import RunTable
from flexattn.ir.graph import Graph
from flexattn.lower.llvm_mod import FAULT_WORDS, LlvmMod, argument_words
from flexattn.runtime.call import Call
from flexattn.runtime.out_of_range import raise_out_of_range
from flexattn.trace import Mod

STORAGE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
           torch.float64: "float64"}
_INDEX_BOUNDS = (2**15, 2**30, 2**62)
_WORK_FOR_A_TEAM = 1 << 21  # multiply-adds below which waking threads costs more than it saves


def index_bound(call: Call) -> int:
    """The least bound that holds for all indices, those in a vector's padding included."""
    q, k = call.query.shape, call.key.shape
    largest = max(q[0], q[1], q[2], k[2]) + 64
    return next(bound for bound in _INDEX_BOUNDS if largest < bound)


def team_size(call: Call) -> int:
    """Threads worth using."""
    q, v = call.query.shape, call.value.shape
    work = q[0] * q[1] * q[2] * v[2] * (q[3] + v[3])
    return torch.get_num_threads() if work > _WORK_FOR_A_TEAM else 1


# Plans


@dataclass(frozen=True)
class Plan:
    """A compiled kernel, and sizes it says of itself. Holds its graphs, whose identity is the key
    it is found by."""

    graphs: tuple[Graph | None, ...]
    frame: Any
    function: Any
    sizes: dict[str, int]


_plans: dict[tuple, Plan] = {}


def plan(kernel: str, call: Call, emit: Callable[..., tuple[Any, Callable[[], str]]],
         sizes: Sequence[str]) -> Plan:
    """The compiled kernel of a call. emit(storage, head_dim, value_dim, score, mask) gives its
    frame and a function that emits its IR, which exports `kernel` and functions named `sizes`."""
    score, mask = (mod.graph if mod is not None else None for mod in (call.score, call.mask))
    bound = index_bound(call)
    key = (kernel, call.query.dtype, call.query.shape[-1], call.value.shape[-1], id(score),
           id(mask), bound)
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _compile(key[0], (STORAGE[key[1]], *key[2:4]), (score, mask), bound,
                                       emit, sizes)
    return found


def _compile(kernel: str, shape: tuple[str, int, int], graphs: tuple[Graph | None, ...],
             bound: int, emit: Callable[..., tuple[Any, Callable[[], str]]],
             sizes: Sequence[str]) -> Plan:
    mods = [None if graph is None else LlvmMod(graph, bound) for graph in graphs]
    frame, build = emit(*shape, *mods)
    library = compile.library(repr((kernel, frame, bound, *map(describe, graphs))), build,
                              (kernel, *sizes))
    said = {name: library.function(name, result=ctypes.c_int64)() for name in sizes}
    return Plan(graphs, frame, library.function(kernel, ctypes.c_void_p), said)


def describe(graph: Graph | None) -> str:
    """Everything of a graph that its code depends on."""
    return "" if graph is None else f"{graph}\n{graph.captures} {graph.numbers}"


# Arguments


@dataclass(frozen=True)
class Runs:
    """A table of runs as kernels read it: addresses, strides in rows of runs for b, h and q."""

    addresses: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    row_block: int
    col_block: int
    keep: Any


def runs_of(table: RunTable) -> Runs:
    return Runs(
        (table.offsets.data_ptr(), table.start.data_ptr(), table.end.data_ptr(),
         table.full.data_ptr()),
        (table.heads * table.num_rows if table.batch > 1 else 0,
         table.num_rows if table.heads > 1 else 0, 1),
        table.row_block, table.col_block, table)


_ONE_RUN: tuple[Any, ...] = ((ctypes.c_int32 * 2)(0, 1), (ctypes.c_int32 * 1)(0),
                            (ctypes.c_int32 * 1)(1))
_FULL = {full: (ctypes.c_bool * 1)(full) for full in (False, True)}


@lru_cache
def one_run(rows: int, columns: int, full: bool) -> Runs:
    """The table of a call without a block mask."""
    offsets, start, end = map(ctypes.addressof, _ONE_RUN)
    addresses = (offsets, start, end, ctypes.addressof(_FULL[full]))
    return Runs(addresses, (0, 0, 0), rows, columns, None)


class Tables:
    """Captured tensors and numbers of a call's mods where kernels read them, and the words where
    kernels report a read out of range."""

    def __init__(self, *mods: Mod | None) -> None:
        words, starts = [0] * (FAULT_WORDS * len(mods)), []
        for mod in mods:
            for values in argument_words(mod.captures, mod.numbers) if mod else ((), ()):
                starts.append(len(words))
                words += values
        self._mods = mods
        self._words = (ctypes.c_int64 * (len(words) + 1))(*words)
        first = ctypes.addressof(self._words)
        self.addresses = [first + 8 * start for start in starts]
        self.faults = [first + 8 * FAULT_WORDS * i for i in range(len(mods))]

    def check(self) -> None:
        """Raises what kernels reported."""
        for i, mod in enumerate(self._mods):
            if mod is not None and self._words[i * FAULT_WORDS]:
                raise_out_of_range(mod, self._words[i * FAULT_WORDS:(i + 1) * FAULT_WORDS])


class Memory:
    """Uninitialised working memory of several parts, each on a cache line of its own."""

    def __init__(self, *sizes: int) -> None:
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += -(-size // 64) * 64
        self._tensor = torch.empty(total + 64, dtype=torch.uint8)
        first = -(-self._tensor.data_ptr() // 64) * 64
        self.addresses = [first + start for start in starts]

    def clear(self, part: int, size: int) -> None:
        ctypes.memset(self.addresses[part], 0, size)
