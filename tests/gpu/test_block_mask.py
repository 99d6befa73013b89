"""Block masks made on a GPU equal brute force there, and the ones made on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from flexattn import create_block_mask, masks
from flexattn.analysis.block_sparsity import kinds_of_runs, mask_sparsity
from flexattn.trace import specialize, trace_mask_mod
from tests.analysis.library import LIBRARY
from tests.analysis.random_masks import RandomMask
from tests.analysis.test_block_sparsity import brute_force, sizes_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def check(mask, sizes, blocks):
    mod = specialize(trace_mask_mod(mask, GPU))
    table = mask_sparsity(mod, *sizes, *blocks, GPU).table
    got = kinds_of_runs(table, -(-sizes[3] // blocks[1])).expand(*sizes[:2], -1, -1)
    assert torch.equal(got, brute_force(mask, sizes, blocks)), (sizes, blocks)


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks(name, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with torch.device(GPU):
        for _ in range(2):
            sizes, blocks = sizes_of(rng)
            check(LIBRARY[name](rng, *sizes), sizes, blocks)


@pytest.mark.parametrize("part", range(4))
def test_random_masks(part, seed):
    for number in range(part * 15, part * 15 + 15):
        rng = random.Random(seed + number)
        mask = RandomMask(rng, "cuda")
        with torch.device(GPU):
            check(mask, *sizes_of(rng))


def test_long_masks_are_those_of_the_cpu():
    ids = masks.lengths_to_ids(torch.randint(300, 2000, (200,)).tolist())
    length = len(ids)
    here, there = (create_block_mask(masks.causal_document(ids.to(device)), None, None, length,
                                     length, device) for device in ("cpu", "cuda"))
    for made in (lambda mask: mask.rows(), lambda mask: mask.columns(),
                 lambda mask: mask.regrid(192, 64).rows()):
        for name in ("offsets", "start", "end", "full"):
            assert torch.equal(getattr(made(here), name), getattr(made(there), name).cpu())


def test_moves_there_and_back():
    mask = create_block_mask(masks.causal, None, None, 1000, 1000)
    moved = mask.to("cuda")
    assert moved.device.type == "cuda" and moved.sparsity() == mask.sparsity()
    assert torch.equal(moved.to("cpu").rows().start, mask.rows().start)
