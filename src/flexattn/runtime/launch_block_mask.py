"""Block masks on a GPU in a few launches: one kernel decides all blocks, two write their runs. This
module is a Solver (analysis.block_sparsity).

In: a traced mask, sizes, a device, and a bound of the number of runs or none. Out: a RunTable, or
the reason why not.
Without a bound the host waits once, for the number of runs. With one it never waits; where there
are more runs, `check` raises in a later call. Rejects: masks without an interval form (see
analysis.interval_form), and more blocks than are worth looking at one by one.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.interval_form import IntervalForm, Tables, interval_form, line_tables
from flexattn.analysis.runs import FULL, PARTIAL, RunTable
from flexattn.analysis.symbols import NoSymbolError
from flexattn.analysis.undecided import Grid
from flexattn.compile_triton import Source, load
from flexattn.ir.graph import Graph
from flexattn.ir.mod import Mod
from flexattn.kernels.triton_config import BlockFacts
from flexattn.lower.triton import Facts, argument_fields, argument_types, lower
from flexattn.lower.triton_facts import ModFacts, bound_of, mod_facts
from flexattn.runtime import gpu_mods, launch_block_runs
from flexattn.runtime.gpu_driver import target
from flexattn.runtime.gpu_launch import Launch, function, on, stream_of
from flexattn.runtime.gpu_mods import INTERPRETED, on_device
from flexattn.runtime.launch_block_runs import Layout, compiled, table_of, turned

__all__ = ["check", "runs", "turned"]
_MOST_BLOCKS = 1 << 31
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
    """What the kernel of kinds is compiled from; `keep` holds the graph that it was found by.
    forms, tiles, wide: of blocks, and of chunks of a line."""

    forms: tuple[IntervalForm, ...]
    tiles: _Code
    wide: _Code
    mod: _Code
    facts: BlockFacts
    keep: Graph

    @property
    def key(self) -> str:
        return repr(("block kinds", self.wide, self.tiles, self.mod, self.facts))

    def source(self) -> Source:
        from flexattn.kernels.block_kinds import block_kinds

        return Source(block_kinds, {
            "found": "*i8", "chunks": "*i8", "sizes": ("i32",) * 7,
            "wide_args": self.wide.argument_type(), "tile_args": self.tiles.argument_type(),
            "args": self.mod.argument_type(), "WIDE": "constexpr", "TILES": "constexpr",
            "MODS": "constexpr", "F": "constexpr"},
            {"WIDE": load(self.wide.text), "TILES": load(self.tiles.text),
             "MODS": load(self.mod.text), "F": self.facts},
            options={"num_warps": 4, "enable_fp_fusion": False})  # as torch rounds


def runs(mod: Mod, grid: Grid, device: torch.device, max_runs: int | None = None,
         separate: bool = True, at_once: bool = False) -> RunTable | str:
    """The runs of a mask, or why this is not the way to them. separate: False calls full blocks
    partial.

    A kernel that has to be compiled first, which takes a second, serves from the second mask of a
    form on, unless it is wanted at once or there is a bound.
    """
    mod = on_device(mod, device) or mod
    if not 0 < grid.images * grid.rows * grid.columns <= _MOST_BLOCKS:
        return f"no blocks, or more than {_MOST_BLOCKS}"
    if any(not t.numel() for t in mod.captures):
        return "a captured tensor is empty"
    with on(device):
        found = _plan(mod, grid, device)
        if isinstance(found, str):
            return found
        if not (at_once or max_runs is not None or compiled(found.key, device)):
            return "its kernel is compiled with the next mask of this form"
        return _Solution(found, mod, grid, device, separate).table(max_runs)


# Plans

_plans: dict[tuple, _Plan | str] = {}


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
    facts = BlockFacts(grid.q_block, grid.kv_block, launch_block_runs.CHUNK)
    backend = "interpreter" if INTERPRETED else target(device.index).backend

    def code(graph: Graph, facts: ModFacts) -> _Code:
        every = Facts(backend, False, bound, mask=facts, report=False)  # type: ignore[arg-type]
        return _Code(lower(None, graph, every), argument_fields(None, graph),
                     argument_types(None, graph, every))

    forms = tuple(interval_form(mod.graph, bound, known.numbers, grid.q_block, kv_block)
                  for kv_block in (grid.kv_block, grid.kv_block * facts.chunk))
    tiled = _tile_mods(forms, mod, grid, facts.chunk, device)
    tiles, wide = (code(m.graph, _signed(mod_facts(m.graph, m.captures, m.numbers, lengths), m))
                   for m in tiled)
    return _Plan(forms, tiles, wide, code(mod.graph, known), facts, mod.graph)


def _signed(facts: ModFacts, mod: Mod) -> ModFacts:
    """The facts, with numbers known to be positive where they are: most are, of all values."""
    ranges = [(1, r[1]) if r is not None and value > 0 else r
              for r, value in zip(facts.numbers, mod.numbers, strict=True)]
    return facts._replace(numbers=tuple(ranges))


def _tile_mods(forms: Sequence[IntervalForm], mod: Mod, grid: Grid, chunk: int,
               device: torch.device) -> list[Mod]:
    """The interval forms with their values."""
    tables: Tables = {}
    found = []
    for form, of in zip(forms, (grid, replace(grid, kv_block=grid.kv_block * chunk)),
                        strict=True):
        tables = line_tables(form, mod, of, device, tables, chunk)
        captures = (*mod.captures, *chain.from_iterable(tables.values()))
        found.append(Mod(form.graph, captures, (*mod.numbers, grid.q_len - 1, grid.kv_len - 1)))
    return found


# Launches


class _Solution:
    """One mask: what writes the kinds of its blocks."""

    def __init__(self, plan: _Plan, mod: Mod, grid: Grid, device: torch.device, separate: bool
                 ) -> None:
        self.plan, self.mod, self.grid, self.device = plan, mod, grid, device
        self.tiled, self.wide = _tile_mods(plan.forms, mod, grid, plan.facts.chunk, device)
        self.most = FULL if separate else PARTIAL

    def table(self, max_runs: int | None) -> RunTable:
        grid = self.grid
        layout = Layout(grid.columns, grid.rows, grid.columns, 1, grid.images,
                        (grid.q_block, grid.kv_block))
        step = max(launch_block_runs.AT_ONCE // grid.columns, 1)
        return table_of(layout, grid.batch, step, self._kinds, self.device, max_runs,
                        chunked=True)

    def _kinds(self, kinds: list[Tensor], first: int, lines: int) -> None:
        plan, grid = self.plan, self.grid
        found, chunks = kinds
        values = [found, chunks, grid.heads, grid.rows, grid.columns, first, grid.q_len - 1,
                  grid.kv_len - 1, self.most]
        for mod in (self.wide, self.tiled, self.mod):
            values.append(found)  # stands for a flag that is never set: all reads are clamped
            for tensor in mod.captures:
                values += [tensor, *tensor.shape, *tensor.stride()]
            values += mod.numbers
        programs = (lines * -(-grid.columns // plan.facts.chunk), 1, 1)
        Launch(function(plan.key, self.device, plan.source), plan.source, programs, values).fresh(
            values, stream_of(found))


def check(device: torch.device) -> None:
    """Raises where a mask had more runs than room, as far as kernels have finished."""
    gpu_mods.check_rooms()
