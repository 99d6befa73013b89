"""Block masks by one kernel for all blocks, on the interpreter: equal to brute force, in few
launches, and without a word to the host where a bound is given."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexattn import AuxRequest, create_block_mask, masks
from flexattn.analysis import block_sparsity
from flexattn.analysis.block_sparsity import grid_of, mask_sparsity
from flexattn.analysis.runs import all_partial, kinds_of_runs, transposed
from flexattn.errors import ArgumentError
from flexattn.reference import attention
from flexattn.runtime import (
    gpu_launch,
    gpu_tables,
    launch_block_mask,
    launch_block_runs,
    launch_gpu,
)
from flexattn.trace import specialize, trace_mask_mod
from tests.analysis.library import LIBRARY
from tests.analysis.random_masks import RandomMask
from tests.analysis.test_block_sparsity import brute_force
from tests.interpreter.attend import gradients, make_call, tensors

CPU = torch.device("cpu")
BLOCKS = (16, 32, 48, 100, 128)


def traced(mask, sizes, blocks):
    mod = specialize(trace_mask_mod(mask))
    return mod, grid_of(mod, *sizes, *blocks)


def check(mask, sizes, blocks):
    """False where the mask is refused."""
    found = launch_block_mask.runs(*traced(mask, sizes, blocks), CPU)
    if isinstance(found, str):
        return False
    columns = -(-sizes[3] // blocks[1])
    got = kinds_of_runs(found, columns).expand(*sizes[:2], -1, -1)
    assert torch.equal(got, brute_force(mask, sizes, blocks)), (sizes, blocks)
    return True


def sizes_of(rng):
    q_len = rng.randint(1, 300)
    kv_len = q_len if rng.random() < 0.5 else rng.randint(1, 300)
    return (rng.randint(1, 3), rng.randint(1, 2), q_len, kv_len), tuple(rng.choices(BLOCKS, k=2))


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks(name, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes, blocks = sizes_of(rng)
    assert check(LIBRARY[name](rng, *sizes), sizes, blocks)


@pytest.fixture
def small_chunks(monkeypatch):
    """Lines of several chunks."""
    monkeypatch.setattr(launch_block_runs, "CHUNK", 4)
    monkeypatch.setattr(launch_block_mask, "_plans", {})


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks_in_small_chunks(name, seed, small_chunks):
    test_library_masks(name, seed)


def test_random_masks_in_small_chunks(seed, small_chunks):
    test_random_masks(seed + 40)


@pytest.mark.parametrize("reach", [-16, 0, 16])
def test_runs_that_end_where_chunks_do(reach, small_chunks):
    sizes, blocks = (1, 1, 300, 300), (16, 16)
    assert check(lambda b, h, q, k: q + reach >= k, sizes, blocks)
    assert check(lambda b, h, q, k: q + reach <= k, sizes, blocks)
    assert check(lambda b, h, q, k: (q + reach) // 64 == k // 64, sizes, blocks)


def test_chunks_of_all_kinds_of_blocks(seed, small_chunks):
    torch.manual_seed(seed)
    chosen = torch.randint(0, 3, (19, 19))
    other = torch.rand(300, 300) < 0.5

    def mask(b, h, q, k):
        return (chosen[q // 16, k // 16] == 2) | ((chosen[q // 16, k // 16] == 1) & other[q, k])

    assert check(mask, (1, 1, 300, 300), (16, 16))


def test_random_masks(seed):
    taken = sum(check(RandomMask(rng), *sizes_of(rng))
                for rng in map(random.Random, range(seed, seed + 40)))
    assert taken > 12


def test_a_comparison_of_one_real_of_a_head(seed):
    """Triton's interpreter spreads such a comparison as a real."""
    torch.manual_seed(seed)
    slopes, kept = torch.randn(2), torch.rand(150) < 0.5

    def mask(b, h, q, k):
        return torch.where(kept[q], kept[k], slopes[h] > 0) & kept[q]

    assert check(mask, (1, 2, 150, 150), (16, 32))
    assert check(lambda b, h, q, k: (slopes[h] > 0) & (q >= k), (1, 2, 150, 150), (16, 32))


@pytest.mark.parametrize("divisor", [2, 97, 1 << 20])
def test_quotients_of_the_least_integer(divisor, seed):
    """It also stands for numbers without a bound in intervals."""
    torch.manual_seed(seed)
    least = torch.iinfo(torch.int64).min
    table = torch.randint(-90, 300, (300,))
    table[torch.randperm(300)[:200]] = torch.randint(least, least + 99, (200,))
    sizes, blocks = (1, 1, 300, 300), (16, 32)
    assert check(lambda b, h, q, k: table[q] // divisor + 9 < k, sizes, blocks)
    inside = table.clamp(0, 299)
    assert check(lambda b, h, q, k: inside[torch.minimum(inside[q], k)].abs() // divisor < k,
                 sizes, blocks)


def test_a_dense_mask(seed):
    torch.manual_seed(seed)
    dense = torch.rand(150, 150) < torch.rand(150, 150) ** 4
    dense[:40, 40:90], dense[60:, :50] = False, True
    assert check(lambda b, h, q, k: dense[q, k], (1, 1, 150, 150), (16, 32))


def equal(x, y):
    return all(torch.equal(getattr(x, name), getattr(y, name))
               for name in ("offsets", "start", "end", "full"))


@pytest.mark.parametrize("at_once", [1 << 28, 80, 40])
def test_table_is_that_of_the_other_way(at_once, small_chunks, monkeypatch, seed):
    """Also in strips, by columns, and without full blocks."""
    monkeypatch.setattr(launch_block_runs, "AT_ONCE", at_once)
    torch.manual_seed(seed)
    ids = torch.randint(0, 9, (2, 300)).sort(-1).values
    mod, grid = traced(masks.causal_document(ids), (2, 3, 300, 300), (32, 48))
    wanted = mask_sparsity(mod, grid, CPU).table
    assert equal(launch_block_mask.runs(mod, grid, CPU), wanted)
    merged = launch_block_mask.runs(mod, grid, CPU, separate=False)
    assert equal(merged, all_partial(wanted, grid.columns))
    turned = launch_block_mask.turned(wanted, grid.columns)
    if at_once < grid.rows * grid.columns:
        assert isinstance(turned, str)
    else:
        assert equal(turned, transposed(wanted, grid.columns))
        assert (turned.row_block, turned.col_block, turned.num_rows) == (48, 32, grid.columns)


class Counted(TorchDispatchMode):
    """Counts torch's operations, and refuses those that would wait for the device."""

    WAITING = ("item", "nonzero", "_local_scalar_dense", "masked_select", "unique", "equal")
    FREE = ("empty", "detach", "view", "slice", "unflatten", "expand", "permute", "transpose",
            "unsqueeze", "select", "reshape", "_unsafe_view", "alias", "as_strided", "new_empty")

    def __init__(self, may_wait):
        super().__init__()
        self.may_wait, self.waited, self.launches = may_wait, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in self.WAITING or (name == "index" and any(
            i is not None and i.dtype is torch.bool for i in args[1])) or "repeat_inter" in name
        assert not waits or self.may_wait, func
        self.waited += waits
        self.launches += name not in self.FREE
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch):
    """Stand for launched kernels: counts them, and runs them outside of any mode."""
    launched = []

    def interpret(source, grid, values):
        launched.append(source.kernel)
        with torch.utils._python_dispatch._disable_current_modes():
            run(source, grid, values)

    run = gpu_launch._interpret
    monkeypatch.setattr(gpu_launch, "_interpret", interpret)
    return launched


MASKS = {
    "causal": (lambda ids: masks.causal, 6),
    "window": (lambda ids: masks.and_masks(masks.causal, masks.sliding_window(40)), 6),
    "documents": (masks.causal_document, 12),
    "documents, int32": (lambda ids: masks.causal_document(ids.int()), 12),
    "documents of a batch": (lambda ids: masks.document(torch.stack([ids, ids])), 12),
}


@pytest.mark.parametrize("name", MASKS)
def test_launches(name, kernels):
    """What a mask costs once its form is known: launches of torch and of ours, waits."""
    make, most = MASKS[name]
    mod, grid = traced(make(torch.arange(300) // 40), (2, 1, 300, 300), (32, 32))
    launch_block_mask.runs(mod, grid, CPU)
    kernels.clear()
    with Counted(may_wait=True) as seen:
        launch_block_mask.runs(mod, grid, CPU)
    assert len(kernels) == 3 and seen.waited == 1
    assert seen.launches + len(kernels) <= most, (seen.launches, len(kernels))


@pytest.mark.parametrize("name", MASKS)
def test_a_bound_needs_no_wait(name, kernels):
    mod, grid = traced(MASKS[name][0](torch.arange(300) // 40), (2, 1, 300, 300), (32, 32))
    wanted = launch_block_mask.runs(mod, grid, CPU)
    with Counted(may_wait=False):
        found = launch_block_mask.runs(mod, grid, CPU, 500)
    runs = len(wanted.start)
    assert torch.equal(found.offsets, wanted.offsets) and len(found.start) == 500
    for name in ("start", "end", "full"):
        assert torch.equal(getattr(found, name)[:runs], getattr(wanted, name))
    launch_block_mask.check(CPU)


def test_too_many_runs_are_reported():
    mod, grid = traced(masks.causal, (1, 1, 300, 300), (32, 32))
    found = launch_block_mask.runs(mod, grid, CPU, 7)
    wanted = launch_block_mask.runs(mod, grid, CPU)
    assert torch.equal(found.offsets, wanted.offsets.clamp(max=7))
    with pytest.raises(ArgumentError, match=f"room for {len(wanted.start)} runs"):
        launch_block_mask.check(CPU)
    launch_block_mask.check(CPU)
    with pytest.raises(ArgumentError, match=f"room for {len(wanted.start)} runs"):
        found.exact()


@pytest.fixture
def solved_here(monkeypatch):
    """The CPU makes masks as a GPU does."""
    monkeypatch.setitem(block_sparsity.SOLVERS, "cpu", lambda: launch_block_mask)


def made(ids, **options):
    return create_block_mask(masks.causal_document(ids), None, None, len(ids), len(ids),
                             BLOCK_SIZE=32, **options)


def test_attention_of_a_mask_with_room(solved_here, kernels):
    """Mask, tables, forward and backward, without a word to the host."""
    ids = torch.arange(90) // 40
    q, k, v = tensors(1, 1, 2, 90, 90, (16, 16))
    wanted = gradients(q, k, v, None, masks.causal_document(ids), (), torch.ones_like(q), None)
    mask = made(ids, max_runs=40)
    call = make_call(q, k, v, None, mask, None, AuxRequest(True, True), {})
    with Counted(may_wait=False):
        mask.kernel_runs(16, 16), mask.kernel_runs(16, 16, by_columns=True)
        gpu_tables.tables(mask, 16, 16), gpu_tables.tables(mask, 16, 16, by_columns=True)
    result = launch_gpu.forward(call)
    out, lse, _ = attention(q, k, v, None, masks.causal_document(ids), None, torch.float64)
    torch.testing.assert_close(result.out.double(), out, rtol=2e-5, atol=2e-5)
    found = launch_gpu.backward(call, result, torch.ones_like(q), None)
    for x, y in zip((found.query, found.key, found.value), wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_public_masks(solved_here):
    ids = torch.arange(200) // 70
    mask, wanted = made(ids, max_runs=60), create_block_mask(
        masks.causal_document(ids), None, None, 200, 200, device="cpu", BLOCK_SIZE=32)
    assert equal(mask.rows(), wanted.rows()) and equal(mask.columns(), wanted.columns())
    assert "by one kernel" in str(mask.explain())
    reals = torch.randn(200)
    with pytest.raises(ArgumentError, match="floating point"):
        create_block_mask(lambda b, h, q, k: reals[q].exp() < reals[k], None, None, 200, 200,
                          max_runs=60)
    assert "step by step: floating point" in str(create_block_mask(
        lambda b, h, q, k: reals[q].exp() < reals[k], None, None, 200, 200).explain())
    short = made(ids, max_runs=3)
    with pytest.raises(ArgumentError, match="more runs than"):
        made(ids, max_runs=60)
    with pytest.raises(ArgumentError, match="more runs than"):
        short.rows()


def test_what_has_no_form_is_refused(seed):
    torch.manual_seed(seed)
    relation, reals = torch.rand(300, 300) < 0.5, torch.randn(300)
    for mask, why in ((lambda b, h, q, k: reals[q].exp() < reals[k], "floating point"),
                      (lambda b, h, q, k: relation[:0, 0][q] & (q < k), "empty")):
        assert why in launch_block_mask.runs(*traced(mask, (1, 1, 200, 200), (32, 32)), CPU)
