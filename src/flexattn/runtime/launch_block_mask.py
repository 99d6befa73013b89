"""Block masks on a GPU in a few launches: one kernel decides all blocks, two write their runs.

In: a traced mask, sizes, a device, and a bound of the number of runs or none. Out: a RunTable, or
the reason why not.
Without a bound the host waits once, for the number of runs. With one it never waits; where there
are more runs, `check` raises in a later call. Rejects: masks without an interval form (see
analysis.interval_form), and more blocks than are worth looking at one by one.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.interval_form import IntervalForm, interval_form, line_tables
from flexattn.analysis.runs import FULL, PARTIAL, RunTable
from flexattn.analysis.symbols import NoSymbolError
from flexattn.analysis.undecided import Grid
from flexattn.compile_triton import Source, load, ready
from flexattn.ir.graph import Graph
from flexattn.ir.mod import Mod
from flexattn.kernels.triton_config import BlockFacts
from flexattn.lower.triton import Facts, argument_fields, argument_types, lower
from flexattn.lower.triton_facts import ModFacts, bound_of, mod_facts
from flexattn.runtime import gpu_mods
from flexattn.runtime.gpu_driver import target
from flexattn.runtime.gpu_launch import Launch, function, on, stream_of
from flexattn.runtime.gpu_mods import INTERPRETED, on_device

_MOST_BLOCKS = 1 << 31
_AT_ONCE = 1 << 28  # blocks, a byte each
_LINE_CHUNK = 1024
_MOST_PLANS = 4096


@dataclass(frozen=True)
class _Code:
    """A graph's functions, and the types of their arguments."""

    text: str
    fields: tuple[str, ...]
    types: tuple[str, ...]

    def argument_type(self) -> Any:
        return namedtuple("arguments", self.fields)(*self.types)


@dataclass(frozen=True)
class _Plan:
    """What the kernel of kinds is compiled from; `keep` holds the graph that it was found by."""

    form: IntervalForm
    tiles: _Code
    mod: _Code
    facts: BlockFacts
    keep: Graph

    @property
    def key(self) -> str:
        return repr(("block kinds", self.tiles, self.mod, self.facts))

    def source(self) -> Source:
        from flexattn.kernels.block_kinds import block_kinds

        return Source(block_kinds, {
            "found": "*i8", "sizes": ("i32",) * 7, "tile_args": self.tiles.argument_type(),
            "args": self.mod.argument_type(), "TILES": "constexpr", "MODS": "constexpr",
            "F": "constexpr"}, {"TILES": load(self.tiles.text), "MODS": load(self.mod.text),
                                "F": self.facts}, options={"num_warps": 4})


def runs(mod: Mod, grid: Grid, device: torch.device, max_runs: int | None = None,
         separate: bool = True, by_columns: bool = False, at_once: bool = False
         ) -> RunTable | str:
    """The runs of a mask, or why this is not the way to them. separate: False calls full blocks
    partial. by_columns: rows of the table are columns of blocks.

    A kernel that has to be compiled first, which takes a second, serves from the second mask of a
    form on, unless it is wanted at once or there is a bound.
    """
    mod = on_device(mod, device) or mod
    if not 0 < grid.images * grid.rows * grid.columns <= _MOST_BLOCKS:
        return f"no blocks, or more than {_MOST_BLOCKS}"
    if by_columns and grid.rows * grid.columns > _AT_ONCE:
        return f"more than {_AT_ONCE} blocks by columns"
    if any(not t.numel() for t in mod.captures):
        return "a captured tensor is empty"
    with on(device):
        found = _plan(mod, grid, device)
        if isinstance(found, str):
            return found
        at_once = at_once or max_runs is not None or INTERPRETED
        if not (at_once or _compiled(found, device)):
            return "its kernel is compiled with the next mask of this form"
        return _Solution(found, mod, grid, device, separate, by_columns).table(max_runs)


# Plans

_plans: dict[tuple, _Plan | str] = {}
_asked: set[str] = set()


def _plan(mod: Mod, grid: Grid, device: torch.device) -> _Plan | str:
    key = (mod.graph, mod.numbers, tuple((t.shape, t.stride()) for t in mod.captures), grid,
           device)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        try:
            found = _planned(mod, grid, device)
        except NoSymbolError as error:
            found = str(error)
        _plans[key] = found
    return found


def _planned(mod: Mod, grid: Grid, device: torch.device) -> _Plan:
    bound = bound_of(grid.batch, grid.heads, grid.q_len, grid.kv_len)
    lengths = {"b": grid.batch, "h": grid.heads, "q_idx": grid.q_len, "kv_idx": grid.kv_len}
    known = _signed(mod_facts(mod.graph, mod.captures, mod.numbers, lengths), mod)
    form = interval_form(mod.graph, bound, known.numbers, grid.q_block, grid.kv_block)
    tiled = _tile_mod(form, mod, grid, device)
    backend = "interpreter" if INTERPRETED else target(device.index).backend

    def code(graph: Graph, facts: ModFacts) -> _Code:
        every = Facts(backend, False, bound, mask=facts, report=False)  # type: ignore[arg-type]
        return _Code(lower(None, graph, every), argument_fields(None, graph),
                     argument_types(None, graph, every))

    tile_facts = _signed(mod_facts(form.graph, tiled.captures, tiled.numbers, lengths), tiled)
    return _Plan(form, code(form.graph, tile_facts), code(mod.graph, known),
                 BlockFacts(grid.q_block, grid.kv_block), mod.graph)


def _signed(facts: ModFacts, mod: Mod) -> ModFacts:
    """The facts, with numbers known to be positive where they are: most are, of all values."""
    ranges = [(1, r[1]) if r is not None and value > 0 else r
              for r, value in zip(facts.numbers, mod.numbers, strict=True)]
    return replace(facts, numbers=tuple(ranges))


def _tile_mod(form: IntervalForm, mod: Mod, grid: Grid, device: torch.device) -> Mod:
    """The interval form with its values."""
    return Mod(form.graph, (*mod.captures, *line_tables(form, mod, grid, device)),
               (*mod.numbers, grid.q_len - 1, grid.kv_len - 1))


def _compiled(plan: _Plan, device: torch.device) -> bool:
    """Whether the kernel needs no compiler, or is asked for again."""
    if plan.key in _asked or ready(plan.key, target(device.index)):
        return True
    _asked.add(plan.key)
    return False


# Launches


class _Solution:
    """One mask, solved in strips of lines (rows of blocks of all images, or columns)."""

    def __init__(self, plan: _Plan, mod: Mod, grid: Grid, device: torch.device, separate: bool,
                 by_columns: bool) -> None:
        self.plan, self.mod, self.grid, self.device = plan, mod, grid, device
        self.tiled = _tile_mod(plan.form, mod, grid, device)
        self.most = FULL if separate else PARTIAL
        rows, columns = grid.rows, grid.columns
        self.layout = (rows, columns, 1, columns) if by_columns else (columns, rows, columns, 1)
        width, height = self.layout[:2]
        self.lines = grid.images * height
        self.step = min(self.lines, max(_AT_ONCE // width, 1))
        if by_columns:
            self.step -= self.step % height  # whole images
        self.blocks = (grid.kv_block, grid.q_block) if by_columns else (grid.q_block, grid.kv_block)
        self.found = self._empty(self.step * width, torch.int8)
        self.counts = self._empty(self.lines + 1)
        self.stream = stream_of(self.counts)

    def _empty(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def table(self, max_runs: int | None) -> RunTable:
        for first, lines in self._strips():
            self._kinds(first, lines)
            self._launch("count_runs", _COUNT, lines,
                         [self.found, self.counts, *self.layout, first])
        offsets = self.counts.cumsum(0, dtype=torch.int32)
        room = int(offsets[-1]) if max_runs is None else max_runs
        start, end, full = self._empty(room), self._empty(room), self._empty(room, torch.bool)
        bounded = [] if max_runs is None else [self._empty(self.lines + 1),
                                               gpu_mods.room_report(self.device)]
        for first, lines in self._strips():
            if lines < self.lines:
                self._kinds(first, lines)
            values = [self.found, offsets, start, end, full, *bounded, *self.layout, first,
                      self.lines, room]
            self._launch("write_runs", _WRITE_BOUNDED if bounded else _WRITE, lines, values)
        return RunTable(bounded[0] if bounded else offsets, start, end, full, self.grid.batch,
                        self.grid.heads, self.layout[1], *self.blocks,
                        offsets[-1:] if bounded else None)

    def _strips(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.lines, self.step):
            yield first, min(self.step, self.lines - first)

    def _kinds(self, first: int, lines: int) -> None:
        """The kinds of a strip. The kernel's lines are rows, whatever the strip's are."""
        plan, grid = self.plan, self.grid
        rows = lines * self.layout[0] // grid.columns
        values = [self.found, grid.heads, grid.rows, grid.columns,
                  first * self.layout[0] // grid.columns, grid.q_len - 1, grid.kv_len - 1,
                  self.most]
        for mod in (self.tiled, self.mod):
            values.append(self.counts)  # a flag that no kernel sets: all reads are clamped
            for tensor in mod.captures:
                values += [tensor, *tensor.shape, *tensor.stride()]
            values += mod.numbers
        programs = (rows * -(-grid.columns // plan.facts.chunk), 1, 1)
        Launch(function(plan.key, self.device, plan.source), plan.source, programs, values).fresh(
            values, self.stream)

    def _launch(self, name: str, types: dict[str, Any], lines: int, values: list[Any]) -> None:
        def source() -> Source:
            return _source(name, types)

        Launch(function(repr((name, types, _LINE_CHUNK)), self.device, source), source,
               (lines, 1, 1), values).fresh(values, self.stream)


def _source(name: str, types: dict[str, Any]) -> Source:
    """A kernel that no mask is part of."""
    from flexattn.kernels import block_kinds

    constants = {"CHUNK": _LINE_CHUNK, "bounded": None, "report": None}
    return Source(getattr(block_kinds, name), types,
                  {k: v for k, v in constants.items() if types.get(k) == "constexpr"},
                  options={"num_warps": 4})


_LAYOUT = ("i32",) * 4
_COUNT = {"found": "*i8", "counts": "*i32", "layout": _LAYOUT, "first": "i32",
          "CHUNK": "constexpr"}
_WRITE = {"found": "*i8", "offsets": "*i32", "start": "*i32", "end": "*i32", "full": "*i8",
          "bounded": "constexpr", "report": "constexpr", "layout": _LAYOUT, "first": "i32",
          "lines": "i32", "room": "i32", "CHUNK": "constexpr"}
_WRITE_BOUNDED = _WRITE | {"bounded": "*i32", "report": "*i32"}


def check(device: torch.device) -> None:
    """Raises where a mask had more runs than room, as far as kernels have finished."""
    gpu_mods.check_rooms()
