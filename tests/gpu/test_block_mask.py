"""Block masks made on a GPU equal brute force there, and the ones made on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from flexattn import compile, compile_triton, create_block_mask, flex_attention, masks
from flexattn.analysis.block_sparsity import grid_of, kinds_of_runs, mask_sparsity
from flexattn.errors import ArgumentError
from flexattn.reference import attention
from flexattn.runtime import gpu_tables, launch_block_mask, launch_block_runs
from flexattn.trace import specialize, trace_mask_mod
from tests.analysis.library import LIBRARY
from tests.analysis.random_masks import RandomMask
from tests.analysis.test_block_sparsity import brute_force, sizes_of
from tests.gpu.pairs import error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def check(mask, sizes, blocks, by_kernel=True):
    """Step by step, and by_kernel: by one kernel for all blocks; False where it is refused."""
    mod = specialize(trace_mask_mod(mask, GPU))
    grid = grid_of(mod, *sizes, *blocks)
    wanted = brute_force(mask, sizes, blocks)
    tables = [mask_sparsity(mod, grid, GPU).table]
    if by_kernel:
        tables.append(launch_block_mask.runs(mod, grid, GPU, at_once=True))
    for table in (t for t in tables if not isinstance(t, str)):
        got = kinds_of_runs(table, -(-sizes[3] // blocks[1])).expand(*sizes[:2], -1, -1)
        assert torch.equal(got, wanted), (sizes, blocks)
    return not isinstance(tables[-1], str)


@pytest.mark.parametrize("name", LIBRARY)
def test_library_masks(name, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with torch.device(GPU):
        for by_kernel in (True, False):
            sizes, blocks = sizes_of(rng)
            assert check(LIBRARY[name](rng, *sizes), sizes, blocks, by_kernel)


@pytest.mark.parametrize("part", range(4))
def test_random_masks(part, seed):
    for number in range(part * 15, part * 15 + 15):
        rng = random.Random(seed + number)
        mask = RandomMask(rng, "cuda")
        with torch.device(GPU):
            check(mask, *sizes_of(rng), by_kernel=number % 3 == 0)


def test_long_masks_are_those_of_the_cpu():
    ids = masks.lengths_to_ids(torch.randint(300, 2000, (200,)).tolist())
    length = len(ids)
    here, there = (create_block_mask(masks.causal_document(ids.to(device)), None, None, length,
                                     length, device) for device in ("cpu", "cuda"))
    for made in (lambda mask: mask.rows(), lambda mask: mask.columns(),
                 lambda mask: mask.regrid(192, 64).rows()):
        for name in ("offsets", "start", "end", "full"):
            assert torch.equal(getattr(made(here), name), getattr(made(there), name).cpu())


@pytest.mark.parametrize("name", ["causal", "window", "documents", "prefix"])
def test_a_million_tokens(name):
    """Lines of several chunks (kernels/block_kinds.py)."""
    length = (1 << 20) - 77
    ids = masks.lengths_to_ids(torch.randint(300, 200_000, (40,)).tolist() + [length])[:length]
    mask = {"causal": masks.causal, "prefix": masks.prefix_lm(300_000),
            "window": masks.and_masks(masks.causal, masks.sliding_window(150_000)),
            "documents": masks.causal_document(ids)}[name]
    tables = []
    for device in (torch.device("cpu"), GPU):
        mod = specialize(trace_mask_mod(mask, device))
        grid = grid_of(mod, 1, 1, length, length, 128, 128)
        tables.append(launch_block_mask.runs(mod, grid, device, at_once=True)
                      if device == GPU else mask_sparsity(mod, grid, device).table)
    for field in ("offsets", "start", "end", "full"):
        assert torch.equal(getattr(tables[0], field), getattr(tables[1], field).cpu())


@pytest.fixture
def nothing_compiled(tmp_path, monkeypatch):
    """Caches on disk and in memory that are empty: those of a new user."""
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path / "cache"))
    compile.cache_directory.cache_clear()
    forget_kernels(monkeypatch)
    yield
    compile.cache_directory.cache_clear()


def forget_kernels(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(compile_triton, "_binaries", {})
    monkeypatch.setattr(launch_block_runs, "_asked", set())


def refuse(*arguments):
    raise AssertionError("must come from a cache")


def test_the_kernel_serves_from_the_second_mask_on(nothing_compiled, monkeypatch):
    """From the first one on where the disk has it."""
    ids = torch.arange(1 << 18, device=GPU) // 263
    mod = specialize(trace_mask_mod(masks.causal_document(ids), GPU))
    grid = grid_of(mod, 1, 1, 1 << 18, 1 << 18, 128, 112)
    first, second = (launch_block_mask.runs(mod, grid, GPU) for _ in range(2))
    assert isinstance(first, str) and "next mask" in first
    forget_kernels(monkeypatch)
    monkeypatch.setattr(compile_triton, "compiled", refuse)
    from_disk = launch_block_mask.runs(mod, grid, GPU)
    wanted = mask_sparsity(mod, grid, GPU).table
    for found in (second, from_disk):
        for name in ("offsets", "start", "end", "full"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))


# ptxas lost the minus of max(max(x, -y), z) and of minima: see flexattn.lower.ptx


def test_a_negation_in_the_interval_of_a_block():
    """Of the size of a position, which is at least minus the last one."""
    def mask(b, h, q_idx, kv_idx):
        return torch.maximum(abs(kv_idx), kv_idx - b) <= q_idx

    with torch.device(GPU):
        assert check(mask, (1, 1, 404, 404), (64, 100))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_negation_in_the_elements_of_a_block(dtype):
    def mask(b, h, q_idx, kv_idx):
        left = torch.maximum(torch.maximum(q_idx - 300, -kv_idx), kv_idx - 200)
        right = torch.minimum(torch.minimum(300 - q_idx, -kv_idx), 400 - kv_idx)
        return (left <= 0) | (right <= -350)

    q, k, v = (torch.randn(1, 2, 404, 64, device=GPU, dtype=dtype) for _ in range(3))
    made = create_block_mask(mask, None, None, 404, 404, GPU)
    wanted = attention(q, k, v, mask_mod=mask, dtype=torch.float64)[0]
    assert error(flex_attention(q, k, v, block_mask=made), wanted) < 3e-3


def with_room(ids, room=3000):
    return create_block_mask(masks.causal_document(ids), None, None, len(ids), len(ids), GPU,
                             max_runs=room)


@pytest.fixture
def no_waits():
    """Whatever waits for the device is an error."""
    def start():
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_bound_needs_no_wait(dtype, no_waits):
    ids = (torch.arange(1 << 14, device=GPU) // 700).to(dtype)
    with_room(ids)  # the first one compiles
    no_waits()
    mask = with_room(ids)
    turned = mask.kernel_runs(128, 64, by_columns=True)
    tables = [gpu_tables.tables(mask, 64, 64, by_columns) for by_columns in (False, True)]
    torch.cuda.set_sync_debug_mode("default")
    wanted = create_block_mask(masks.causal_document(ids), None, None, 1 << 14, 1 << 14, GPU)
    expected = [gpu_tables.tables(wanted, 64, 64, by_columns) for by_columns in (False, True)]
    for found, exact in ((mask.rows(), wanted.rows()),
                         (turned.exact(), wanted.regrid(128, 64).columns())):
        for name in ("offsets", "start", "end", "full"):
            assert torch.equal(getattr(found, name), getattr(exact, name))
    for found, exact in zip(tables, expected, strict=True):
        assert torch.equal(found.full[0], exact.full[0])
        assert torch.equal(found.partial[0], exact.partial[0])


def test_too_many_runs_are_an_error_of_a_later_call():
    ids = torch.arange(1 << 14, device=GPU) // 700
    short = with_room(ids, 100)
    torch.cuda.synchronize()
    with pytest.raises(ArgumentError, match="room for"):
        with_room(ids)
    with pytest.raises(ArgumentError, match="room for"):
        short.rows()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_in_a_cuda_graph(dtype):
    """Mask and attention of documents that change between replays."""
    ids = torch.arange(2048, device=GPU) // 300
    q, k, v = (torch.randn(1, 2, 2048, 64, device=GPU, dtype=dtype) for _ in range(3))

    def step():
        return flex_attention(q, k, v, block_mask=with_room(ids))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for size in (300, 77, 1000):
        ids.copy_(torch.arange(2048, device=GPU) // size)
        graph.replay()
        wanted = flex_attention(q, k, v, block_mask=create_block_mask(
            masks.causal_document(ids.clone()), None, None, 2048, 2048, GPU))
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)


def test_moves_there_and_back():
    mask = create_block_mask(masks.causal, None, None, 1000, 1000)
    moved = mask.to("cuda")
    assert moved.device.type == "cuda" and moved.sparsity() == mask.sparsity()
    assert torch.equal(moved.to("cpu").rows().start, mask.rows().start)
