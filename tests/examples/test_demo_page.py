"""The page is one well-formed file that refers to nothing outside."""

from __future__ import annotations

import random
from xml.etree import ElementTree

from examples.demo.page import Speed, Story, page


def test_page_is_well_formed_and_self_contained() -> None:
    losses = [random.uniform(2, 6) for _ in range(30)]
    html = page(Story(
        summary="a < b & c", machine="some", losses=losses, agreement="equal",
        speeds=[Speed("ours", 200.0, 500.0), Speed("peer", 50.0, 125.0),
                Speed("eager", None, 100.0)],
        mask=[[2, 0], [1, 2]], mask_note="half", source="x <= y", graph="%0", gradient="%1",
        sample="def f(x):"))
    tree = ElementTree.fromstring(html.replace("<!doctype html>", "").replace(
        '<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width, initial-scale=1">', ""))
    assert not any("src" in e.attrib or "href" in e.attrib for e in tree.iter())
    text = "".join(tree.itertext())
    assert "a < b & c" in text and "x <= y" in text
    assert "0.25x" in text and "1.00x" in text and "0.20x" in text
    squares = [e.attrib["fill"] for e in tree.iter("rect")]
    assert squares == ["var(--full)", "var(--empty)", "var(--partial)", "var(--full)"]
    curves = [e.attrib["points"].split() for e in tree.iter("polyline")]
    assert [len(points) for points in curves] == [30, 30]
    heights = [float(point.split(",")[1]) for point in curves[0]]
    assert heights[losses.index(max(losses))] == min(heights)  # SVG's y points down
