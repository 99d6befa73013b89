"""A mask as text, for terminals: two characters per cell, so that cells are about square."""

from __future__ import annotations

from flexattn.pictures.cells import Cells

EMPTY, PARTIAL, FULL = "··", "▒▒", "██"
_SHADES = ("░░", "▒▒", "▓▓")  # of cells that hold different blocks


def text(cells: Cells, title: str = "") -> str:
    """The grid, one line per row of cells, with a title above and a legend below."""
    rows = ["".join(_characters(f, p, cells.grouped) for f, p in zip(*shares, strict=True))
            for shares in zip(cells.full.tolist(), cells.partial.tolist(), strict=True)]
    return "\n".join([*([title] if title else []), *rows, _legend(cells)])


def _characters(full: float, partial: float, grouped: bool) -> str:
    if full >= 1:
        return FULL
    if full == 0 and partial == 0:
        return EMPTY
    return _SHADES[min(int(3 * (full + partial / 2)), 2)] if grouped else PARTIAL


def _legend(cells: Cells) -> str:
    if cells.blocks is None:
        return f"{FULL} attended  {EMPTY} masked"
    if cells.grouped:
        rows, columns = (e[1] - e[0] for e in (cells.row_edges, cells.col_edges))
        return (f"{FULL} full  {' '.join(_SHADES)} mixed  {EMPTY} empty, "
                f"{rows:,} x {columns:,} tokens per cell")
    return f"{FULL} full  {PARTIAL} partial  {EMPTY} empty"
