"""Intervals of whole graphs over tiles hold every value of every node; linear forms cancel."""

from __future__ import annotations

import random

import pytest
import torch

from flexattn.analysis.interval import TileIntervals, Tiles, ranges
from flexattn.analysis.interval_reads import aligned_span
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph
from flexattn.ir.ops import FLOATS
from flexattn.trace import specialize, trace_mask_mod
from tests.analysis.random_masks import RandomMask

SIZES = {"b": 3, "h": 3, "q_idx": 600, "kv_idx": 500}


def tile_values(mod, nodes, tile, block):
    """Every node at every position of a tile."""
    b, h, row, column = tile
    outputs = Graph(tuple((str(i), n) for i, n in enumerate(nodes)), mod.graph.captures,
                    mod.graph.numbers)
    q, kv = (torch.arange(i * block, min((i + 1) * block, SIZES[name]))
             for i, name in ((row, "q_idx"), (column, "kv_idx")))
    inputs = {"b": torch.tensor(b), "h": torch.tensor(h), "q_idx": q[:, None], "kv_idx": kv}
    return evaluate(outputs, inputs, mod.captures, mod.numbers)


@pytest.mark.parametrize("part", range(30))
def test_random_graphs(part, seed):
    rng = random.Random(seed + part)
    mod = specialize(trace_mask_mod(RandomMask(rng)))
    intervals = TileIntervals(mod.graph, mod.captures, mod.numbers, SIZES)
    block = rng.choice([1, 7, 16, 64, 100])
    tiles = [(rng.randrange(3), rng.randrange(3), rng.randrange(-(-600 // block)),
              rng.randrange(-(-500 // block))) for _ in range(6)]
    b, h, row, column = (torch.tensor(x)[:, None, None] for x in zip(*tiles, strict=True))
    values = intervals.values(Tiles(b, h, aligned_span(row, block, 600),
                                    aligned_span(column, block, 500)))
    for i, tile in enumerate(tiles):
        found = tile_values(mod, list(values), tile, block)
        for n, got in zip(values, found.values(), strict=True):
            lo, hi, nan = (torch.as_tensor(x).expand(6, 1, 1)[i].item() for x in values[n])
            if n.dtype in FLOATS:
                assert nan or not got.isnan().any(), (n, mod.graph)
                got = got[~got.isnan()].double()
            if got.numel():
                least, most = (x.item() for x in got.to(
                    torch.uint8 if got.dtype is torch.bool else got.dtype).aminmax())
                assert lo <= least and most <= hi, (n, tile, (lo, hi), (least, most), mod.graph)


def interval_of(function, q, kv):
    """The output's interval over q in [q0, q1], kv in [kv0, kv1], one tile of 64 x 64."""
    mod = specialize(trace_mask_mod(function))
    found = TileIntervals(mod.graph, mod.captures, mod.numbers, SIZES)(Tiles(
        0, 0, aligned_span(torch.tensor([[[q]]]), 64, 600),
        aligned_span(torch.tensor([[[kv]]]), 64, 500)))
    return tuple(bool(x) for x in found[:2])


@pytest.mark.parametrize("function, row, column, wanted", [
    (lambda b, h, q, k: q - q % 64 == 128, 2, 0, (True, True)),
    (lambda b, h, q, k: q - q % 64 == 128, 3, 0, (False, False)),
    (lambda b, h, q, k: q // 64 == k // 64, 1, 1, (True, True)),
    (lambda b, h, q, k: q // 64 == k // 64, 1, 2, (False, False)),
    (lambda b, h, q, k: q % 32 < 32, 1, 1, (True, True)),
    (lambda b, h, q, k: (q - k) - q < 1, 1, 1, (True, True)),
    (lambda b, h, q, k: 2 * q - (q + q) == 0, 4, 1, (True, True)),
    (lambda b, h, q, k: (q * 3 - k) - (q * 3) > 0, 1, 1, (False, False)),
    (lambda b, h, q, k: (q - k).abs() < 128, 3, 3, (True, True)),
    (lambda b, h, q, k: (q - k).abs() < 65, 5, 3, (False, False)),
    (lambda b, h, q, k: (q - k).to(torch.int8) < 0, 3, 1, (False, True)),
])
def test_what_is_proved(function, row, column, wanted):
    assert interval_of(function, row, column) == wanted


def test_ranges_without_values():
    mod = specialize(trace_mask_mod(lambda b, h, q, k: (q - k) * 2 > 5))
    bounds = {"q_idx": (0, 9), "kv_idx": (0, 4)}
    found = {n.op.name: x for n, x in ranges(mod.graph, bounds).items()}
    assert found["SUB"] == (-4, 9) and found["MUL"] == (-8, 18)
