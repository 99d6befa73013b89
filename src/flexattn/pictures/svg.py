"""Masks and scores as SVG, for notebooks and pages: cells, axes in tokens, a legend.

No dependencies. In: `Cells`, or a tensor of scores. Out: the text of one <svg> element.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from html import escape

from torch import Tensor

from flexattn.errors import ShapeError, message
from flexattn.pictures.cells import Cells
from flexattn.pictures.style import (
    EMPTY,
    FAINT,
    INK,
    Color,
    blend,
    caption,
    diverging,
    hexadecimal,
    legend,
    ticks,
)

_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 78, 16, 34
_FONT = "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""


@dataclass(frozen=True)
class _Drawing:
    """Coloured cells with edges in tokens; edges are numbered in the middle if `elements`."""

    colors: list[list[str]]
    row_edges: list[int]
    col_edges: list[int]
    elements: bool
    legend: list[tuple[Color, str]]
    remark: str = ""


def svg(cells: Cells, title: str = "block mask", side: int = 320) -> str:
    """A mask. The longer side of the grid is `side` pixels."""
    colors = [[hexadecimal(blend(f, p)) for f, p in zip(full, partial, strict=True)]
              for full, partial in zip(cells.full.tolist(), cells.partial.tolist(), strict=True)]
    drawing = _Drawing(colors, cells.row_edges, cells.col_edges, cells.blocks is None,
                       legend(cells), _remark(cells))
    return _page(drawing, title, caption(cells), side)


def _remark(cells: Cells) -> str:
    if not cells.grouped or cells.blocks is None:
        return ""
    groups = (e[1] // block for e, block in
              zip((cells.row_edges, cells.col_edges), cells.blocks, strict=True))
    return f"a cell: {' × '.join(map(str, groups))} blocks"


def score_svg(scores: Tensor, title: str = "scores", side: int = 320) -> str:
    """Scores [q_len, kv_len] of a few tokens; violet below 0, orange above, grey where masked.

    Errors: ShapeError for another rank.
    """
    if scores.dim() != 2:
        raise ShapeError(message("scores are drawn for one batch entry and head",
                                 expected="[q_len, kv_len]", got=str(list(scores.shape))))
    values = scores.detach().double().cpu()
    finite = values[values.isfinite()]
    reach = max(float(finite.abs().max()), 1e-30) if finite.numel() else 1.0
    low, high = (float(f(finite)) if finite.numel() else 0.0 for f in (Tensor.min, Tensor.max))
    colors = [[hexadecimal(diverging(v)) for v in row] for row in (values / reach).tolist()]
    meanings = [(diverging(low / reach), f"{low:.3g}"), (diverging(high / reach), f"{high:.3g}")]
    if finite.numel() < values.numel():
        meanings.append((EMPTY, "masked"))
    rows, columns = (list(range(n + 1)) for n in values.shape)
    return _page(_Drawing(colors, rows, columns, True, meanings), title,
                 f"{len(rows) - 1} × {len(columns) - 1} tokens", side)


def _page(drawing: _Drawing, title: str, subtitle: str, side: int) -> str:
    q_len, kv_len = drawing.row_edges[-1], drawing.col_edges[-1]
    scale = side / max(q_len, kv_len, 1)
    width, height = (max(n * scale, 40.0) for n in (kv_len, q_len))
    total_w, total_h = max(_LEFT + width + _RIGHT, 300), _TOP + height + _BOTTOM
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_w:.0f}" height="{total_h:.0f}" '
        f'viewBox="0 0 {total_w:.0f} {total_h:.0f}" role="img" {_FONT}>',
        f"<title>{escape(title)}: {escape(subtitle)}</title>",
        f'<rect width="{total_w:.0f}" height="{total_h:.0f}" fill="#ffffff"/>',
        _label(12, 20, title, size=14, weight=600),
        _label(12, 36, subtitle, color=FAINT),
        *_grid(drawing, width, height),
        *_axes(drawing, width, height),
        *_legend(drawing, _TOP + height + 22),
        "</svg>",
    ])


def _grid(drawing: _Drawing, width: float, height: float) -> list[str]:
    """One path per colour: a rectangle for each stretch of equal cells of a row.

    Neighbours share rounded coordinates, so that no seam shows between them.
    """
    xs = [round(x, 2) for x in _places(drawing.col_edges, drawing.col_edges[-1], _LEFT, width)]
    ys = [round(y, 2) for y in _places(drawing.row_edges, drawing.row_edges[-1], _TOP, height)]
    paths: dict[str, list[str]] = defaultdict(list)
    for i, colors in enumerate(drawing.colors):
        first = 0
        for j in range(1, len(colors) + 1):
            if j == len(colors) or colors[j] != colors[first]:
                paths[colors[first]].append(f"M{xs[first]:g} {ys[i]:g}H{xs[j]:g}"
                                            f"V{ys[i + 1]:g}H{xs[first]:g}z")
                first = j
    drawn = [f'<path fill="{color}" d="{"".join(shapes)}"/>' for color, shapes in paths.items()]
    return ['<g shape-rendering="crispEdges">', *drawn, *_lines(xs, ys), "</g>"]


def _lines(xs: list[float], ys: list[float]) -> list[str]:
    """White lines between cells, where they are large enough to be seen one by one."""
    if not (len(xs) > 1 and len(ys) > 1) or min(xs[1] - xs[0], ys[1] - ys[0]) < 8:
        return []
    down = "".join(f"M{x:g} {ys[0]:g}V{ys[-1]:g}" for x in xs[1:-1])
    across = "".join(f"M{xs[0]:g} {y:g}H{xs[-1]:g}" for y in ys[1:-1])
    return [f'<path d="{down}{across}" stroke="#ffffff" stroke-width="1" fill="none"/>']


def _axes(drawing: _Drawing, width: float, height: float) -> list[str]:
    parts = [f'<rect x="{_LEFT}" y="{_TOP}" width="{width:.5g}" height="{height:.5g}" '
             f'fill="none" stroke="{FAINT}"/>']
    length = drawing.col_edges[-1]
    numbers, words = ticks(length, drawing.elements)
    for x, word in zip(_places(numbers, length, _LEFT, width), words, strict=True):
        parts += [f'<path d="M{x:.5g} {_TOP}v-4" stroke="{FAINT}"/>',
                  _label(x, _TOP - 7, word, anchor="middle", size=9, color=FAINT)]
    length = drawing.row_edges[-1]
    numbers, words = ticks(length, drawing.elements)
    for y, word in zip(_places(numbers, length, _TOP, height), words, strict=True):
        parts += [f'<path d="M{_LEFT} {y:.5g}h-4" stroke="{FAINT}"/>',
                  _label(_LEFT - 7, y + 3, word, anchor="end", size=9, color=FAINT)]
    turned = f'transform="rotate(-90 14 {_TOP + height / 2:.5g})"'
    return [*parts,
            _label(14, _TOP + height / 2, "query", anchor="middle", extra=turned),
            _label(_LEFT + width, _TOP - 20, "key / value", anchor="end")]


def _places(numbers: list[int] | list[float], length: int, start: float, size: float
            ) -> list[float]:
    """Pixels of positions in tokens."""
    return [start + size * n / max(length, 1) for n in numbers]


def _legend(drawing: _Drawing, y: float) -> list[str]:
    parts, x = [], float(_LEFT)
    for color, meaning in drawing.legend:
        parts += [f'<rect x="{x:.5g}" y="{y - 9:.5g}" width="11" height="11" '
                  f'fill="{hexadecimal(color)}" stroke="{FAINT}" stroke-width="0.5"/>',
                  _label(x + 16, y, meaning)]
        x += 34 + 6.2 * len(meaning)
    if drawing.remark:
        parts.append(_label(x, y, drawing.remark, color=FAINT, size=10))
    return parts


def _label(x: float, y: float, words: str, *, size: int = 11, color: str = INK,
           anchor: str = "start", weight: int = 400, extra: str = "") -> str:
    return (f'<text x="{x:.5g}" y="{y:.5g}" font-size="{size}" font-weight="{weight}" '
            f'fill="{color}" text-anchor="{anchor}" {extra}>{escape(words)}</text>')
