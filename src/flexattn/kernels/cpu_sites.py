"""How a mod is injected into a CPU kernel: what it is told and what it must emit.

In: a `KernelMod`, given by flexattn.lower.llvm or written by hand. The kernels call its hooks
while they emit code; the hooks emit theirs in place through the same Emitter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flexattn.kernels.cpu_dsl import Emitter, Value


@dataclass(frozen=True)
class RowSite:
    """One row of scores. All scalars are i64.

    captures: i64 table; each captured tensor has, in order, its address, sizes and strides (in
    elements) - see `capture_slots`. numbers: one 8-byte slot each (i64, double; bool as i64).
    fault: eight i64 words, zero before the call, for the first out-of-range read at an attended
    position; what they mean is between the lowering and the launcher.
    """

    b: Value
    h: Value
    q_idx: Value
    captures: Value
    numbers: Value
    fault: Value


@dataclass(frozen=True)
class ColumnSite:
    """One vector of columns, whatever the row: kv_idx of lane i is `kv_base + i`."""

    b: Value
    h: Value
    kv_base: Value
    captures: Value
    numbers: Value
    fault: Value


@dataclass(frozen=True)
class VectorSite:
    """One vector of scores: a row, `e.lanes` columns from `kv_base`, what was hoisted for the
    row and for these columns, and which lanes are attended (<lanes x i1>; lanes beyond kv_len
    are not; for a score mod neither are those the mask removes)."""

    row: RowSite
    kv_base: Value
    row_values: Sequence[Value]
    column_values: Sequence[Value]
    attended: Value


class KernelMod(Protocol):
    """A score mod or mask mod as the kernels see it, emitted in place.

    per_row runs once per row and block of scores, per_column once per tile of rows and vector of
    columns (the kernel keeps its results in scratch memory: vectors of 32 or 64-bit elements);
    per_vector does the rest. A score mod gives the new score (`e.vector`) from `score`; a mask
    mod is given None and gives <lanes x i1>.
    """

    def per_row(self, e: Emitter, site: RowSite) -> Sequence[Value]: ...

    def per_column(self, e: Emitter, site: ColumnSite) -> Sequence[Value]: ...

    def per_vector(self, e: Emitter, site: VectorSite, score: Value | None) -> Value: ...

    @property
    def is_stretch(self) -> bool:
        """Whether a mask attends one stretch of keys in each row. The kernel then asks for
        row_stretch alone: its first key, and the one after its last (or any before that)."""
        ...

    def row_stretch(self, e: Emitter, site: RowSite) -> tuple[Value, Value]: ...


@dataclass(frozen=True)
class GradientSite(RowSite):
    """A row in a backward kernel. gradients: a table like captures, of the tensors that the
    gradients of captured tensors are added to."""

    gradients: Value


class GradientVector(Protocol):
    """One vector of scores in a backward kernel, asked in this order. Lanes that are not attended
    get and give zeros."""

    def score(self) -> Value: ...

    def d_score(self, grad: Value) -> Value: ...

    def accumulate(self, sums: Sequence[Value]) -> list[Value]: ...


class KernelGradient(Protocol):
    """A score mod and its gradient. Hoisting is as for a KernelMod; `accumulate` of each vector
    is given `row_sums`, or what it gave before, and `end_row` the last ones."""

    @property
    def accumulates(self) -> bool: ...

    def per_row(self, e: Emitter, site: GradientSite) -> Sequence[Value]: ...

    def per_column(self, e: Emitter, site: ColumnSite) -> Sequence[Value]: ...

    def row_sums(self, e: Emitter) -> list[Value]: ...

    def begin_vector(self, e: Emitter, site: VectorSite, score: Value) -> GradientVector: ...

    def end_row(self, e: Emitter, site: GradientSite, row_values: Sequence[Value],
                sums: Sequence[Value]) -> None: ...


def capture_slots(ranks: Sequence[int]) -> list[int]:
    """Index, in the table of i64, of each captured tensor's address; sizes and strides follow."""
    slots, at = [], 0
    for rank in ranks:
        slots.append(at)
        at += 1 + 2 * rank
    return slots
