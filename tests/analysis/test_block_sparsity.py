"""Sparsity by proof equals brute force: random masks, all library masks; and what it costs."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch.nn.functional import pad

from flexattn import masks
from flexattn.analysis import block_sparsity, interval_rules, undecided
from flexattn.analysis.block_sparsity import grid_of, kinds_of_runs, mask_sparsity
from flexattn.ir.ops import Op
from flexattn.trace import specialize, trace_mask_mod
from tests.analysis.library import LIBRARY, NEVER_EVALUATED, RANDOM_BY_NATURE
from tests.analysis.random_masks import RandomMask

CPU = torch.device("cpu")
GRAPHS = 520
BLOCKS = (16, 32, 48, 64, 100, 128, 256)


def found(mask, sizes, blocks):
    mod = specialize(trace_mask_mod(mask))
    return mask_sparsity(mod, grid_of(mod, *sizes, *blocks), CPU)


def brute_force(mask, sizes, blocks):
    """Kinds of blocks from the user's function on all elements, uint8 [B, H, rows, columns]."""
    dense = mask(*(torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
                   for d, n in enumerate(sizes))).expand(sizes)
    q_short, kv_short = (-n % block for n, block in zip(sizes[2:], blocks, strict=True))
    some, lacking = (pad(x, (0, kv_short, 0, q_short)).unflatten(3, (-1, blocks[1])).unflatten(
        2, (-1, blocks[0])).any(5).any(3) for x in (dense, ~dense))
    return some.to(torch.uint8) + (some & ~lacking).to(torch.uint8)


def check(mask, sizes, blocks):
    sparsity = found(mask, sizes, blocks)
    columns = -(-sizes[3] // blocks[1])
    got = kinds_of_runs(sparsity.table, columns).expand(*sizes[:2], -1, -1)
    wanted = brute_force(mask, sizes, blocks)
    assert torch.equal(got, wanted), (sizes, blocks, (got != wanted).nonzero()[:3].tolist())
    return sparsity


def sizes_of(rng):
    q_len = rng.choice([rng.randint(1, 700), rng.randint(1, 150)])
    kv_len = q_len if rng.random() < 0.5 else rng.randint(1, 700)
    return (rng.randint(1, 3), rng.randint(1, 3), q_len, kv_len), tuple(rng.choices(BLOCKS, k=2))


@pytest.mark.parametrize("part", range(8))
def test_random_masks(part, seed):
    for number in range(part, GRAPHS, 8):
        rng = random.Random(seed * GRAPHS + number)
        mask = RandomMask(rng)
        sizes, blocks = sizes_of(rng)
        try:
            check(mask, sizes, blocks)
        except AssertionError as error:
            graph = specialize(trace_mask_mod(mask)).graph
            raise AssertionError(f"seed {seed}, mask {number}:\n{graph}") from error


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks(name, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(4):
        sizes, blocks = sizes_of(rng)
        mask = LIBRARY[name](rng, *sizes)
        check(mask, sizes, blocks)


def test_every_library_mask_is_tested():
    made = {name.split(",")[0] for name in LIBRARY}
    functions = {name for name in masks.__all__ if name not in NO_MASKS}
    assert functions <= made


NO_MASKS = {"ancestor_matrix", "document_starts", "ids_to_lengths", "ids_to_offsets", "inverse",
            "lengths_to_ids", "lengths_to_offsets", "morton_order", "offsets_to_ids",
            "offsets_to_lengths", "random_lengths", "tiled_order"}


@pytest.mark.parametrize("name", [n for n in LIBRARY if n not in RANDOM_BY_NATURE])
def test_share_of_evaluated_blocks(name, seed):
    """No elements for the masks whose blocks can be proved, few for the others."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = 4096 if "natten" in name or "tile" in name else rng.randint(3000, 5000)
    sparsity = found(LIBRARY[name](rng, 2, 3, size, size), (2, 3, size, size), (128, 128))
    table = sparsity.table
    some = int((table.end - table.start).sum())
    most = 0.0 if name in NEVER_EVALUATED else 0.05
    assert sparsity.found.evaluated <= most * some, sparsity.found


def test_a_wrong_rule_is_caught(monkeypatch, seed):
    rule = interval_rules.TABLE[Op.MOD]
    monkeypatch.setitem(interval_rules.TABLE, Op.MOD, lambda n, x, y: rule(n, x, y)._replace(
        hi=x.hi % 7 if isinstance(x.hi, int) else (x.hi % 7)))
    with pytest.raises((AssertionError, RuntimeError)):
        for number in range(200):
            rng = random.Random(seed + number)
            check(RandomMask(rng), *sizes_of(rng))


def test_a_million_tokens_take_little_time_and_memory():
    length = 1 << 20
    for mask, runs in ((masks.causal, 1 << 14), (masks.prefix_lm(5000), 1 << 14)):
        start = time.perf_counter()
        table = found(mask, (1, 1, length, length), (128, 128)).table
        assert time.perf_counter() - start < 2
        assert abs(len(table.start) - runs) < 100 and table.nbytes < 1 << 20
    counts = table.end - table.start
    row = torch.arange(8192)
    assert torch.equal(counts[table.full].long().cumsum(0)[-1:],
                       torch.maximum(row, torch.tensor(5000 // 128)).sum()[None])


@pytest.mark.parametrize("plan", [(1, 2, 16, 8), (3, 2, 7, 30), (4, 5, 1 << 18, 1)])
def test_strips_and_levels(plan, monkeypatch, seed):
    """Few tiles at once: more levels, more strips, the same table."""
    monkeypatch.setitem(block_sparsity._PLANS, "cpu", block_sparsity._Plan(*plan))
    monkeypatch.setitem(undecided._ELEMENTS, "cpu", 500)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for name in ("causal_document", "and_masks", "noop_mask", "natten", "per_head"):
        sizes, _ = sizes_of(rng)
        check(LIBRARY[name](rng, *sizes), sizes, rng.choice([(16, 16), (32, 16), (24, 40)]))
    check(RandomMask(rng), sizes_of(rng)[0], (16, 32))
