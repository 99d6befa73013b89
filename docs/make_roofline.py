"""Writes the roofline of docs/performance.md from the committed results of an H200:
`python docs/make_roofline.py`.

Attention on Hopper has two ceilings: the tensor cores, and the special-function unit, which makes
one exponential (and, in a softcap, one tanh) per score. A row of the results is a point: how much
arithmetic there is per special function, and how much of it a second is done.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/nvidia-h200"
IMAGE = Path(__file__).parent / "images/roofline_h200.svg"
CLOCKS = 132 * 1.755e9  # multiprocessors times the clock that the data sheet's rates are for
TENSOR, SPECIAL = 4096 * CLOCKS, 16 * CLOCKS  # FLOP and special functions a second
MARKS = {"ours": "#2563eb", "cudnn": "#16a34a", "torch_flex": "#dc2626"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 440, 70, 40, 150, 50
LOW, HIGH = 96, 1400  # FLOP per special function


class Point(NamedTuple):
    """case, FLOP per special function, TFLOP/s, provider."""

    case: str
    per_special: float
    rate: float
    provider: str


def points() -> Iterator[Point]:
    """Forward rows of the mods' tables."""
    for columns in (64, 128):
        lines = (RESULTS / f"gpu-mods{columns}.csv").read_text().splitlines()
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            case, _, direction = row["case"].rpartition(" ")
            if direction == "fwd":
                per_special = 4 * columns / (2 if case == "softcap" else 1)
                yield Point(case, per_special, float(row["rate"]), row["provider"])


def across(per_special: float) -> float:
    share = math.log(per_special / LOW) / math.log(HIGH / LOW)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def down(rate: float) -> float:
    return TOP + (1 - rate / 1000) * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{content}</text>'


def axes() -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for rate in range(0, 1001, 200):
        yield (f'<line x1="{LEFT}" y1="{down(rate):.0f}" x2="{right}" y2="{down(rate):.0f}" '
               'stroke="#e4e4e7"/>')
        yield text(LEFT - 8, down(rate) + 4, str(rate), "end")
    for per_special in (128, 256, 512, 1024):
        yield text(across(per_special), bottom + 18, str(per_special))
    yield text((LEFT + right) / 2, HEIGHT - 10, "FLOP per special function")
    yield text(LEFT, TOP - 18, "TFLOP/s", "start")


def roof() -> str:
    """Straight in neither axis' scale, so drawn in short pieces."""
    steps = [LOW * (HIGH / LOW) ** (i / 60) for i in range(61)]
    line = " ".join(f"{across(x):.1f},{down(min(TENSOR, SPECIAL * x) / 1e12):.1f}" for x in steps)
    return f'<polyline points="{line}" fill="none" stroke="#18181b" stroke-width="2"/>'


def drawn(found: list[Point]) -> str:
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
             'font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *axes(), roof()]
    order = sorted({p.case for p in found})
    for p in found:
        if p.provider not in MARKS:
            continue
        x = across(p.per_special) + 7 * (order.index(p.case) - len(order) / 2)
        parts.append(f'<circle cx="{x:.1f}" cy="{down(p.rate):.1f}" r="4" '
                     f'fill="{MARKS[p.provider]}" fill-opacity="0.8">'
                     f"<title>{p.provider}, {p.case}: {p.rate:.0f} TFLOP/s</title></circle>")
    seen = {p.provider for p in found}
    for i, (provider, color) in enumerate((p, c) for p, c in MARKS.items() if p in seen):
        y = TOP + 20 * i
        parts += [f'<circle cx="{WIDTH - RIGHT + 20}" cy="{y}" r="4" fill="{color}"/>',
                  text(WIDTH - RIGHT + 32, y + 4, provider, "start")]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    IMAGE.write_text(drawn(list(points())))


if __name__ == "__main__":
    main()
