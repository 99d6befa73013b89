"""Runs of blocks on a GPU, from a byte a block, and tables of runs turned from rows to columns.

In: a function that writes the kinds of some lines of blocks, or a RunTable; a bound of the number
of runs, or none. Out: a RunTable. Without a bound the host waits once, for the number of runs; with
one never. Rejects, with the reason: tables of more blocks than are worth a byte each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.runs import RunTable
from flexattn.compile_triton import Source, ready
from flexattn.runtime import gpu_mods
from flexattn.runtime.gpu_driver import target
from flexattn.runtime.gpu_launch import Launch, function, on, stream_of
from flexattn.runtime.gpu_mods import INTERPRETED

AT_ONCE = 1 << 28  # blocks, a byte each
CHUNK = 1024  # blocks of a line that kernels take together
_LAYOUT = ("i32",) * 4
COUNT = {"found": "*i8", "chunks": "constexpr", "counts": "*i32", "layout": _LAYOUT,
         "first": "i32", "CHUNK": "constexpr"}
WRITE = {"found": "*i8", "chunks": "constexpr", "offsets": "*i32", "start": "*i32", "end": "*i32",
         "full": "*i8", "bounded": "constexpr", "report": "constexpr", "layout": _LAYOUT,
         "first": "i32", "lines": "i32", "room": "i32", "CHUNK": "constexpr"}
CHUNKED = {"chunks": "*i8"}
BOUNDED = {"bounded": "*i32", "report": "*i32"}
PAINT = {"found": "*i8", "offsets": "*i32", "start": "*i32", "end": "*i32", "full": "*i8",
         "columns": "i32", "first": "i32", "CHUNK": "constexpr"}
Fill = Callable[[list[Tensor], int, int], None]
"""Writes the kinds of lines first, first + 1, ... first + count - 1, and of their chunks."""


@dataclass(frozen=True)
class Layout:
    """Lines of blocks as bytes: blocks of a line, lines of an image, bytes from line to line and
    from block to block; images; and block sizes, along the lines' axis and along a line."""

    columns: int
    rows: int
    line_stride: int
    stride: int
    images: int
    sizes: tuple[int, int]

    @property
    def places(self) -> tuple[int, int, int, int]:
        return self.columns, self.rows, self.line_stride, self.stride

    @property
    def lines(self) -> int:
        return self.images * self.rows


def table_of(layout: Layout, batch: int, step: int, fill: Fill, device: torch.device,
             max_runs: int | None, chunked: bool = False) -> RunTable:
    """The runs of all lines, `step` lines worked on at once. chunked: `fill` says of chunks too."""
    def empty(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    lines = layout.lines
    strips = [(first, min(step, lines - first)) for first in range(0, lines, step)]
    sizes = (layout.columns, -(-layout.columns // CHUNK))[:1 + chunked]
    kinds, counts = [empty(strips[0][1] * n, torch.int8) for n in sizes], empty(lines + 1)
    chunks: dict[str, Any] = CHUNKED if chunked else {}
    for first, count in strips:
        fill(kinds, first, count)
        _launch("count_runs", COUNT | chunks, count, [*kinds, counts, *layout.places, first])
    offsets = counts.cumsum(0, dtype=torch.int32)
    room = int(offsets[-1]) if max_runs is None else max_runs
    start, end, full = empty(room), empty(room), empty(room, torch.bool)
    bounded = [] if max_runs is None else [empty(lines + 1), gpu_mods.room_report(device)]
    types = WRITE | chunks | (BOUNDED if bounded else {})
    for first, count in strips:
        if len(strips) > 1:
            fill(kinds, first, count)
        _launch("write_runs", types, count,
                [*kinds, offsets, start, end, full, *bounded, *layout.places, first, lines, room])
    return RunTable(bounded[0] if bounded else offsets, start, end, full, batch,
                    layout.images // batch, layout.rows, *layout.sizes,
                    offsets[-1:] if bounded else None)


def turned(table: RunTable, columns: int, max_runs: int | None = None) -> RunTable | str:
    """The same blocks as rows of `columns` columns, or why not this way."""
    size, device = table.num_rows * columns, table.offsets.device
    if not 0 < size <= AT_ONCE or not table.batch * table.heads:
        return f"no blocks, or more than {AT_ONCE} of an image"
    if max_runs is None and not compiled(_key("paint", PAINT), device):
        return "its kernels are compiled with the next table"

    def fill(kinds: list[Tensor], first: int, count: int) -> None:
        found, = kinds
        found.zero_()
        rows = count // columns * table.num_rows
        _launch("paint", PAINT, rows, [found, table.offsets, table.start, table.end, table.full,
                                       columns, first // columns * table.num_rows])

    layout = Layout(table.num_rows, columns, 1, columns, table.batch * table.heads,
                    (table.col_block, table.row_block))
    with on(device):
        return table_of(layout, table.batch, columns * max(AT_ONCE // size, 1), fill, device,
                        max_runs)


# Kernels

_asked: set[str] = set()


def compiled(key: str, device: torch.device) -> bool:
    """Whether a kernel needs no compiler, which takes a second, or is asked for again."""
    if INTERPRETED or key in _asked or ready(key, target(device.index)):
        return True
    _asked.add(key)
    return False


def _launch(name: str, types: dict[str, Any], programs: int, values: list[Any]) -> None:
    def build() -> Source:
        return source(name, types)

    tensor = values[0]
    Launch(function(_key(name, types), tensor.device, build), build, (programs, 1, 1),
           values).fresh(values, stream_of(tensor))


def _key(name: str, types: dict[str, Any]) -> str:
    return repr((name, types, CHUNK))


def source(name: str, types: dict[str, Any]) -> Source:
    """A kernel that no mask is part of."""
    from flexattn.kernels import block_kinds

    constants = {"CHUNK": CHUNK, "chunks": None, "bounded": None, "report": None}
    return Source(getattr(block_kinds, name), types,
                  {k: v for k, v in constants.items() if types.get(k) == "constexpr"},
                  options={"num_warps": 4})
