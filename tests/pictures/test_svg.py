import random
import re
from xml.etree import ElementTree

import pytest
import torch

from flexattn.errors import ShapeError
from flexattn.pictures import block_cells, element_cells, score_svg, svg
from flexattn.pictures.style import (
    EMPTY,
    FULL,
    PARTIAL,
    blend,
    diverging,
    hexadecimal,
    legend,
    short,
    ticks,
)
from tests.pictures.runs import causal_runs, runs_of

NAMESPACE = {"svg": "http://www.w3.org/2000/svg"}
RECTANGLE = re.compile(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H")


def rectangles(drawing):
    """(fill, left, top, right, bottom) of everything in the grid."""
    for path in drawing.findall(".//svg:g/svg:path", NAMESPACE):
        for x0, y0, x1, y1 in RECTANGLE.findall(path.get("d")):
            yield path.get("fill"), float(x0), float(y0), float(x1), float(y1)


@pytest.mark.parametrize("round_", range(4))
def test_every_cell_is_painted_once_in_its_colour(seed, round_):
    rng = random.Random(seed + round_)
    rows, columns = rng.randint(1, 9), rng.randint(1, 9)
    table = [[rng.randrange(3) for _ in range(columns)] for _ in range(rows)]
    q_len, kv_len = 16 * rows - rng.randrange(16), 16 * columns - rng.randrange(16)
    cells = block_cells(runs_of([[table]], 16, 16), q_len, kv_len)
    painted = list(rectangles(ElementTree.fromstring(svg(cells))))
    left, top = min(p[1] for p in painted), min(p[2] for p in painted)
    width, height = max(p[3] for p in painted) - left, max(p[4] for p in painted) - top
    for i in range(rows):
        for j in range(columns):
            x = left + width * (cells.col_edges[j] + cells.col_edges[j + 1]) / 2 / kv_len
            y = top + height * (cells.row_edges[i] + cells.row_edges[i + 1]) / 2 / q_len
            there = [p[0] for p in painted if p[1] < x < p[3] and p[2] < y < p[4]]
            assert there == [hexadecimal((EMPTY, PARTIAL, FULL)[table[i][j]])]


def test_a_million_tokens_are_a_small_drawing():
    drawing = svg(block_cells(causal_runs(1 << 20, 128), 1 << 20, 1 << 20), "causal")
    assert len(drawing) < 40_000
    assert "1M × 1M tokens, blocks of 128 × 128, 50.0 % empty" in drawing


def test_words_are_escaped_and_present():
    drawing = svg(element_cells(torch.ones(8, 8).tril().bool()), "a < b & c")
    words = [t.text for t in ElementTree.fromstring(drawing).findall(".//svg:text", NAMESPACE)]
    assert {"a < b & c", "query", "key / value", "attended", "masked", "0", "7"} <= set(words)


def test_scores_have_the_colour_of_their_share_of_the_largest():
    drawing = score_svg(torch.tensor([[0.0, -2.0, 4.0, -torch.inf]]), "alibi")
    fills = {fill for fill, *_ in rectangles(ElementTree.fromstring(drawing))}
    assert fills == {hexadecimal(c) for c in (diverging(0), diverging(-0.5), diverging(1), EMPTY)}
    assert all(word in drawing for word in (">-2<", ">4<", ">masked<", "1 × 4 tokens"))
    assert hexadecimal(diverging(0)) == "#ffffff" and diverging(float("nan")) == EMPTY
    with pytest.raises(ShapeError, match="one batch entry"):
        score_svg(torch.zeros(1, 2, 2))


def test_kinds_differ_in_grey_too():
    grey = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (FULL, PARTIAL, EMPTY)]
    assert grey[1] - grey[0] > 0.25 and grey[2] - grey[1] > 0.2
    assert blend(0, 0) == EMPTY and blend(1, 0) == FULL and blend(0, 1) == PARTIAL


def test_legend_names_what_is_shown():
    assert [word for _, word in legend(element_cells(torch.ones(1, 1)))] == ["attended", "masked"]
    blocks = block_cells(runs_of([[[[1]]]], 4, 4), 4, 4)
    assert [word for _, word in legend(blocks)] == ["full", "partial", "empty"]


def test_short():
    assert [short(n) for n in (7, 1000, 1024, 131072, 1 << 20, 100000)] == [
        "7", "1,000", "1k", "128k", "1M", "100,000"]


@pytest.mark.parametrize("length", [1, 7, 16, 100, 900, 1024, 8192, 100_000, 1 << 20, 3 << 19])
def test_ticks_are_few_and_inside(length):
    places, words = ticks(length, False)
    assert places[0] == 0 and places[-1] <= length and 2 <= len(places) <= 6
    assert len(set(words)) == len(words)


def test_every_element_of_a_tiny_mask_is_numbered():
    assert ticks(4, True) == ([0.5, 1.5, 2.5, 3.5], ["0", "1", "2", "3"])
