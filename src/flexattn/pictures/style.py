"""Colours, labels and ticks that all pictures share.

Blue for full, orange for partial, near white for empty: told apart with any colour vision, and by
lightness alone when printed in grey (about 70, 175 and 240 of 255). Mixed cells are blends.
"""

from __future__ import annotations

from flexattn.pictures.cells import Cells

Color = tuple[float, float, float]

EMPTY: Color = (0.937, 0.945, 0.953)
PARTIAL: Color = (0.945, 0.647, 0.169)
FULL: Color = (0.106, 0.298, 0.478)
_NEGATIVE: Color = (0.369, 0.235, 0.6)
INK = "#24292f"
FAINT = "#6e7781"


def blend(full: float, partial: float) -> Color:
    """The colour of a cell, mixed from its shares."""
    empty = max(1.0 - full - partial, 0.0)
    r, g, b = (empty * e + partial * p + full * f
               for e, p, f in zip(EMPTY, PARTIAL, FULL, strict=True))
    return r, g, b


def hexadecimal(color: Color) -> str:
    """'#1b4c7a'."""
    return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in color)


def legend(cells: Cells) -> list[tuple[Color, str]]:
    """Colour and meaning of each kind of cell."""
    if cells.blocks is None:
        return [(FULL, "attended"), (EMPTY, "masked")]
    return [(FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty")]


def diverging(value: float) -> Color:
    """Violet at -1, white at 0, orange at 1; what is no finite number has the colour of empty."""
    if value != value or value in (float("inf"), -float("inf")):
        return EMPTY
    end = _NEGATIVE if value < 0 else PARTIAL
    r, g, b = (1 + min(abs(value), 1.0) * (e - 1) for e in end)
    return r, g, b


def caption(cells: Cells) -> str:
    """Sizes and sparsity: '1M x 1M tokens, blocks of 128 x 128, 50.0 % sparse'."""
    size = f"{short(cells.q_len)} × {short(cells.kv_len)} tokens"
    empty = cells.sparsity
    percent = f"{empty:.1f}" if round(empty, 1) < 100 or empty == 100 else f"{empty:.3f}"
    if cells.blocks is None:
        return f"{size}, {percent} % masked"
    return f"{size}, blocks of {cells.blocks[0]} × {cells.blocks[1]}, {percent} % empty"


def short(tokens: int) -> str:
    """131072 -> '128k', 1048576 -> '1M', 100000 -> '100,000'."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return f"{tokens:,}"


def ticks(length: int, elements: bool) -> tuple[list[float], list[str]]:
    """Round positions from 0, and their labels: every element's middle, or a few edges."""
    if elements:
        step = 1 if length <= 16 else 8 if length % 8 == 0 else 5
        numbers = range(0, length, step)
        return [n + 0.5 for n in numbers], [str(n) for n in numbers]
    steps = [1 << i for i in range(63)] if length % 1024 == 0 else [
        m * 10**e for e in range(18) for m in (1, 2, 5)]
    step = next(s for s in steps if length <= 5 * s)
    edges = range(0, length + 1, step)
    return list(map(float, edges)), [short(n) for n in edges]
