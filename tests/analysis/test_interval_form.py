"""The interval form of a mask never contradicts brute force, and says what the rules say."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from flexattn.analysis.block_sparsity import grid_of
from flexattn.analysis.interval_form import interval_form, line_tables
from flexattn.analysis.runs import PARTIAL
from flexattn.analysis.symbols import NoSymbolError
from flexattn.ir.evaluate import evaluate
from flexattn.trace import specialize, trace_mask_mod
from tests.analysis.library import LIBRARY
from tests.analysis.random_masks import RandomMask
from tests.analysis.test_block_sparsity import brute_force, sizes_of

CPU = torch.device("cpu")
BOUND = 1 << 24


def form_and_captures(mod, sizes, blocks, factor):
    """The form for `factor` blocks of keys together, its tables made from those of one block."""
    tables = {}
    for times in (1, factor) if factor > 1 else (1,):
        grid = grid_of(mod, *sizes, blocks[0], blocks[1] * times)
        form = interval_form(mod.graph, BOUND, [None] * len(mod.numbers), grid.q_block,
                             grid.kv_block)
        tables = line_tables(form, mod, grid, CPU, tables, factor)
    return form, (*mod.captures, *chain.from_iterable(tables.values())), grid


def kinds(mask, sizes, blocks, factor=1):
    """What the form says, uint8 [B, H, rows, columns]."""
    mod = specialize(trace_mask_mod(mask))
    form, captures, grid = form_and_captures(mod, sizes, blocks, factor)
    inputs = {name: (torch.arange(count) * step).view([-1 if d == axis else 1 for d in range(4)])
              for axis, (name, count, step) in enumerate((
                  ("b", grid.batch, 1), ("h", grid.heads, 1), ("q_idx", grid.rows, grid.q_block),
                  ("kv_idx", grid.columns, grid.kv_block)))}
    found = evaluate(form.graph, inputs, captures, (*mod.numbers, sizes[2] - 1, sizes[3] - 1))
    return found["mask"].expand(*sizes[:2], grid.rows, grid.columns)


def check(mask, sizes, blocks, factor=1):
    """The share of blocks that are decided, of those that could be."""
    said = kinds(mask, sizes, blocks, factor)
    wanted = brute_force(mask, sizes, (blocks[0], blocks[1] * factor))
    decided = said != PARTIAL
    assert torch.equal(said[decided], wanted[decided].long()), (sizes, blocks, factor)
    return float(decided.sum() / max(int((wanted != PARTIAL).sum()), 1))


@pytest.mark.parametrize("part", range(4))
def test_random_masks(part, seed):
    taken = 0
    for number in range(part, 400, 4):
        rng = random.Random(seed * 400 + number)
        mask = RandomMask(rng)
        sizes, blocks = sizes_of(rng)
        try:
            check(mask, sizes, blocks, rng.choice((1, 2, 3, 8)))
            taken += 1
        except NoSymbolError:
            continue
        except AssertionError as error:
            graph = specialize(trace_mask_mod(mask)).graph
            raise AssertionError(f"seed {seed}, mask {number}:\n{graph}") from error
    assert taken > 35


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks(name, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(2):
        sizes, blocks = sizes_of(rng)
        check(LIBRARY[name](rng, *sizes), sizes, blocks)
        check(LIBRARY[name](rng, *sizes), sizes, blocks, rng.randint(2, 5))


@pytest.mark.parametrize("name", ["causal", "sliding_window,causal", "prefix_lm", "document",
                                  "causal_document", "chunked", "padding", "natten"])
def test_all_blocks_that_can_be_are_decided(name, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = (2, 2, 600, 600)
    assert check(LIBRARY[name](rng, *sizes), sizes, (32, 48)) == 1.0
    assert check(LIBRARY[name](rng, *sizes), sizes, (32, 16), 3) == 1.0


def test_a_number_that_varies_is_no_constant_of_the_form():
    forms = set()
    for width in random.sample(range(1, 1000), 3):
        def mask(b, h, q_idx, kv_idx, width=width):
            return (q_idx - kv_idx < width) & (q_idx >= kv_idx)

        mod = specialize(trace_mask_mod(mask))
        numbers = [(-BOUND, BOUND)] * len(mod.numbers)
        forms.add(interval_form(mod.graph, BOUND, numbers, 32, 32).graph)
        check(mask, (1, 1, 300, 400), (32, 32))
    assert len(forms) == 2  # with the first value, and for all of them


def test_a_table_read_by_both_is_known_where_a_block_reads_one_element(seed):
    torch.manual_seed(seed)
    kinds_of = torch.randint(0, 2, (10, 10)).bool()
    numbers = torch.randint(-1, 2, (10, 10))
    sizes = (1, 1, 320, 320)
    for mask in (lambda b, h, q, k: kinds_of[q // 32, k // 32],
                 lambda b, h, q, k: (numbers[q // 32, k // 32] > 0) | ((q < k) & (k < 0))):
        assert check(mask, sizes, (32, 16)) == 1.0
        assert check(mask, sizes, (64, 48)) < 1.0


def test_refusals():
    reals = torch.randn(300)
    for mask, why in ((lambda b, h, q, k: reals[q].exp() < reals[k], "exp"),
                      (lambda b, h, q, k: q / 7 < k, "div")):
        with pytest.raises(NoSymbolError, match=f"floating point.*{why}"):
            kinds(mask, (1, 1, 200, 200), (32, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_point_with_nan(dtype, seed):
    torch.manual_seed(seed)
    reals = torch.randn(2, 300).sort(-1).values.to(dtype)
    reals[0, torch.randint(300, ())] = torch.nan
    for mask in (lambda b, h, q, k: reals[b, q] < reals[b, k],
                 lambda b, h, q, k: ~(reals[b, q] * 2 + 1 > reals[b, k] - 0.5),
                 lambda b, h, q, k: (reals[b, q] - reals[0, 7]).abs() > k * 0.01):
        assert check(mask, (2, 1, 250, 300), (16, 32)) > 0.5
