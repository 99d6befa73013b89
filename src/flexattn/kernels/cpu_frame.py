"""What the parts of the CPU forward kernel share: its arguments, and one thread's scratch memory.

In: the dtype and head dimensions of a kernel and its tile. Out: where each argument and each
array of a tile lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from flexattn.kernels.cpu_dsl import Emitter, Value, byte_size, i64
from flexattn.kernels.cpu_product import PAIRS
from flexattn.kernels.tile_config import CpuTile

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class Arguments:
    """Reads the fields of a block of 8-byte arguments where they are needed."""

    def __init__(self, e: Emitter, pointer: Value, names: Sequence[str]) -> None:
        self._e, self.pointer, self._names = e, pointer, names

    def get(self, name: str, type: str = "i64") -> Value:
        return self._e.load(self._e.at(self.pointer, self._names.index(name), "i64"), type)

    def address(self, name: str) -> Value:
        return self.get(name, "ptr")

    def offset(self, tensor: str, **indices: Value) -> Value:
        """Sum of index * stride: offset("query", b=..., h=..., s=...)."""
        e, total = self._e, i64(0)
        for axis, index in indices.items():
            total = e.add(total, e.mul(index, self.get(f"{tensor}_{axis}")))
        return total


@dataclass(frozen=True)
class Place:
    """Which tile of scores: queries from q_start, keys from kv_start, of head h of batch b. Of its
    `width` columns (whole panels) those from `skip` on and before `count` belong to it."""

    b: Value
    h: Value
    q_start: Value
    rows: Value
    kv_start: Value
    skip: Value
    count: Value
    width: Value

    def is_whole(self, e: Emitter) -> Value:
        """Whether all columns belong to the tile."""
        return e.and_(e.compare("eq", self.count, self.width),
                      e.compare("eq", self.skip, i64(0)))


PLACE = ("i64",) * 8


@dataclass(frozen=True)
class Frame:
    """One kernel's sizes, and its scratch memory: `frame.array(e, scratch, name)`.

    scores [tile_q][score_stride], query [tile_q][words], out [panel][tile_q][columns]; then
    one value a row: running maximum and total, the factor that rescales out, what is subtracted
    before exp2, maximum and total of the current tile of keys, first and last column with an
    attended score (i64, whole panels, one range for each panel of rows), and what cpu_stretch.py
    keeps. `attended` holds a bit for each score, `columns` what mods hoist for columns.
    """

    storage: str
    head_dim: int
    value_dim: int
    tile: CpuTile

    @property
    def real(self) -> str:
        return "double" if self.storage == "float64" else "float"

    @property
    def word(self) -> str:
        """A type as wide as an element of the tensors."""
        return {"bfloat16": "i16", "float16": "i16"}.get(self.storage, self.real)

    @cached_property
    def columns(self) -> int:
        """Columns of a packed panel."""
        return self.tile.columns(self.storage)

    @property
    def pairs(self) -> bool:
        return self.tile.pairs

    @property
    def packed(self) -> str:
        """The storage of packed panels."""
        return PAIRS if self.pairs else self.storage

    def depth(self, dim: int) -> int:
        """Elements of a packed line of `dim`: whole pairs."""
        return dim + dim % 2 if self.pairs else dim

    def words(self, dim: int) -> int:
        """How many words hold `dim` elements of an operand."""
        return self.depth(dim) // 2 if self.pairs else dim

    def in_words(self, e: Emitter, elements: Value) -> Value:
        """An even number of elements in words of an operand."""
        return e.op("lshr", elements, i64(1)) if self.pairs else elements

    @property
    def value_panels(self) -> int:
        return -(-self.value_dim // self.columns)

    @property
    def score_stride(self) -> int:
        return self.tile.tile_kv + 16  # rows do not fall on the same cache sets

    @property
    def out_panel(self) -> int:
        return self.tile.tile_q * self.columns

    @cached_property
    def _sizes(self) -> dict[str, int]:
        rows, real = self.tile.tile_q, byte_size(self.real)
        row_arrays = ("maximum", "total", "rescale", "base", "tile_maximum", "tile_total")
        return {
            "scores": rows * self.score_stride * real,
            "query": rows * self.words(self.head_dim) * real,
            "out": self.value_panels * self.out_panel * real,
            **dict.fromkeys(row_arrays, rows * real),
            **dict.fromkeys(("first", "last", "inner_first", "inner_last", "low", "high"),
                            rows * 8),
            **dict.fromkeys(("start", "end"), rows * 4),
            "hull": 2 * 8,
            "attended": rows * self.tile.tile_kv * 2,
            "columns": 0,
        }

    def array(self, e: Emitter, memory: Value, name: str, among: Sequence[str] = ()) -> Value:
        """An array of the scratch memory, or of memory that holds some of its arrays."""
        names = list(among or self._sizes)
        return e.at(memory, self.state_bytes(names[:names.index(name)]), "i8")

    def state_bytes(self, names: Sequence[str]) -> int:
        """Of memory that holds some arrays."""
        return sum(_whole_lines(self._sizes[n]) for n in names)

    def elements(self, name: str) -> int:
        """Of an array of scalars of the type computed in."""
        return self._sizes[name] // byte_size(self.real)

    @property
    def column_array_bytes(self) -> int:
        """One array of `columns`, of elements of up to 8 bytes."""
        return self.tile.tile_kv * 8

    def bytes(self, column_arrays: int) -> int:
        """Of the whole scratch."""
        return self.state_bytes(list(self._sizes)) + column_arrays * self.column_array_bytes

    def row_panels(self, e: Emitter, rows: Value, body: Callable[[Value, int], None]) -> None:
        """Rows of a tile in the panels that fit the registers: body(first row, how many)."""
        big = e.sub(rows, e.op("srem", rows, i64(self.tile.rows)))
        with e.loop(0, big, self.tile.rows) as row:
            body(row.index, self.tile.rows)
        with e.loop(big, rows, self.tile.rest) as row:
            body(row.index, self.tile.rest)


def _whole_lines(size: int) -> int:
    return -(-size // 64) * 64
