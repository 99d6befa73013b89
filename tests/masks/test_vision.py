from itertools import product
from math import prod

import pytest
import torch

from flexattn.errors import ArgumentError
from flexattn.masks import (
    inverse,
    morton_natten,
    morton_order,
    natten,
    sliding_tile,
    tiled_natten,
    tiled_order,
)
from tests.masks.oracle import check, dense


def window(q, size, kernel):
    """The `kernel` neighbouring positions whose start is nearest to q - kernel // 2."""
    starts = range(size - kernel + 1)
    start = min(starts, key=lambda s: abs(s - (q - kernel // 2)))
    return range(start, start + kernel)


def in_tiled_order(shape, tile):
    corners = product(*(range(0, s, t) for s, t in zip(shape, tile, strict=True)))
    return [tuple(c + i for c, i in zip(corner, inner, strict=True))
            for corner in corners for inner in product(*map(range, tile))]


def grid(rng):
    """Shape, tile that divides it, kernel that fits."""
    tile = tuple(rng.randint(1, 3) for _ in range(rng.choice([2, 2, 3])))
    shape = tuple(t * rng.randint(1, 3 if len(tile) == 2 else 2) for t in tile)
    return shape, tile, tuple(rng.randint(1, s) for s in shape)


def attends_in(cells, shape, kernel):
    def attends(b, h, q, kv):
        return all(y in window(x, s, k)
                   for x, y, s, k in zip(cells[q], cells[kv], shape, kernel, strict=True))

    return attends


def test_natten(rng):
    shape, _, kernel = grid(rng)
    cells = list(product(*map(range, shape)))
    check(natten(shape, kernel), attends_in(cells, shape, kernel), len(cells))


def test_every_query_has_a_whole_neighborhood(rng):
    shape, _, kernel = grid(rng)
    keys = dense(natten(shape, kernel), 1, 1, prod(shape), prod(shape)).sum(-1)
    assert (keys == prod(kernel)).all()


def test_tiled_natten(rng):
    shape, tile, kernel = grid(rng)
    cells = in_tiled_order(shape, tile)
    check(tiled_natten(shape, kernel, tile), attends_in(cells, shape, kernel), len(cells))


def test_morton_natten(rng):
    shape, _, kernel = grid(rng)
    bits = [[format(c, "04b") for c in cell] for cell in product(*map(range, shape))]
    codes = ["".join("".join(column) for column in zip(*cell, strict=True)) for cell in bits]
    cells = [cell for _, cell in sorted(zip(codes, product(*map(range, shape)), strict=True))]
    check(morton_natten(shape, kernel), attends_in(cells, shape, kernel), len(cells))


def test_orders_move_the_plain_mask_onto_the_others(rng):
    shape, tile, kernel = grid(rng)
    n = prod(shape)
    plain = dense(natten(shape, kernel), 1, 1, n, n)[0, 0]
    for order, mask in [(tiled_order(shape, tile), tiled_natten(shape, kernel, tile)),
                        (morton_order(shape), morton_natten(shape, kernel))]:
        assert torch.equal(plain[order][:, order], dense(mask, 1, 1, n, n)[0, 0])
        x = torch.rand(n)
        assert torch.equal(x[order][inverse(order)], x)


def test_morton_blocks_are_squares():
    order = morton_order((8, 8))
    assert order[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    for block in order.split(16):
        rows, columns = block // 8, block % 8
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == 4


def test_sliding_tile(rng):
    shape, tile, _ = grid(rng)
    tiles = [s // t for s, t in zip(shape, tile, strict=True)]
    kernel_tiles = [rng.randint(1, n) for n in tiles]
    kernel = tuple(k * t for k, t in zip(kernel_tiles, tile, strict=True))
    text = rng.randint(0, 4)
    cells = in_tiled_order(shape, tile)
    n = len(cells)

    def attends(b, h, q, kv):
        if q >= n or kv >= n:
            return kv < n + text
        return all(y // t in window(x // t, size, k) for x, y, t, size, k in
                   zip(cells[q], cells[kv], tile, tiles, kernel_tiles, strict=True))

    check(sliding_tile(shape, kernel, tile, text), attends, n + 5)


def test_errors():
    with pytest.raises(ArgumentError, match="does not fit the canvas"):
        natten((4, 4), (5, 3))
    with pytest.raises(ArgumentError, match="kernel has the wrong number of entries"):
        natten((4, 4), (3,))
    with pytest.raises(ArgumentError, match="pad the canvas"):
        tiled_natten((4, 6), (3, 3), (2, 4))
    with pytest.raises(ArgumentError, match="does not divide"):
        sliding_tile((4, 8), (3, 4), (2, 4))
    with pytest.raises(ArgumentError, match=r"shape\[1\] is too small"):
        natten((4, 0), (1, 1))
