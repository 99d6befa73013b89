"""The CPU backward kernel against the dense oracle's autograd in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch

from flexattn import compile
from flexattn.kernels.cpu_backward import Backward
from flexattn.kernels.cpu_backward_frame import BackwardFrame
from flexattn.kernels.tile_config import cpu_backward_tile
from flexattn.runtime import launch_cpu_backward
from flexattn.runtime.launch_cpu import forward
from flexattn.runtime.launch_cpu_backward import backward
from tests.kernels.cpu_attend import alibi, call_of, causal, softcap, tensors
from tests.kernels.cpu_gradients import check_gradients, differentiate
from tests.kernels.test_cpu_forward import DTYPES, HEAD_DIMS, peak_bytes, some_sizes, strided


@pytest.fixture(params=[1, 3], ids=["one pass", "two passes"])
def passes(request, set_threads):
    """Heads that keep one thread busy, or too few heads for three (tensors are of 1 or 2)."""
    set_threads(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_dtypes_head_dims_and_odd_lengths(rng, passes, dtype, head_dims):
    for _ in range(2):
        check_gradients(*tensors(some_sizes(rng, head_dims), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mods_and_masks(rng, passes, dtype):
    for mod in (None, softcap, alibi):
        make = mod and (lambda mod=mod: mod)
        check_gradients(*tensors(some_sizes(rng, (32, 32)), dtype), make, causal, slack=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_small_length(rng, passes, dtype):
    for length in range(1, 140, 9):
        kv_len = int(rng.integers(1, 300))
        check_gradients(*tensors((1, 1, 2, length, kv_len, 32, 32), dtype), None, causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["heads last", "dimension first", "slice", "one row"])
def test_strides(rng, passes, dtype, layout):
    q, k, v = (strided(x, layout) for x in tensors((2, 1, 2, 70, 90, 64, 48), dtype))
    check_gradients(q, k, v, slack=3)


@pytest.mark.parametrize("layout", ["heads last", "dimension first", "slice", "one row"])
def test_strides_of_the_gradient_of_out(rng, passes, layout):
    q, k, v = tensors((2, 1, 2, 70, 90, 64, 48))
    d_out = strided(torch.randn(2, 2, 70, 48), layout)
    got = differentiate(q, k, v, d_out=d_out)
    plain = differentiate(q, k, v, d_out=d_out.contiguous())
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(got, name), getattr(plain, name)), name


def test_one_key_and_value_for_the_whole_batch(rng, passes):
    q, k, v = tensors((3, 2, 2, 75, 130, 64, 64))
    together = check_gradients(q, k[:1], v[:1], None, causal)
    assert together.key.shape[0] == 1
    check_gradients(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1), None, causal)


@pytest.mark.parametrize("shape", [(1, 2, 0, 40), (0, 2, 40, 40), (1, 0, 40, 40), (2, 2, 40, 0)],
                         ids=str)
def test_empty_inputs(shape):
    q, k, v = tensors((*shape[:2], 1, *shape[2:], 64, 32))
    got = differentiate(q, k, v, lambda t: lambda s, b, h, q, kv: s + t[kv], captured=[
        torch.randn(40)])
    for x, grad in zip((q, k, v), (got.query, got.key, got.value), strict=True):
        assert grad.shape == x.shape and (grad == 0).all()
    assert (got.captures[0] == 0).all() and got.captures[0].shape == (40,)


@pytest.mark.parametrize("block", [16, 128, (64, 256), (96, 32), 100, (1, 64), (256, 1)], ids=str)
def test_block_sizes(rng, passes, block):
    window = int(rng.integers(1, 200))
    check_gradients(*tensors((1, 1, 2, 210, 300, 32, 32)), None,
                    lambda b, h, q, kv: (q >= kv) & (q - kv < window), block=block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_by_batch_and_head(rng, passes, dtype):
    keep = torch.rand(2, 4, 150, 170) < 0.3
    keep[0, 1, 17:40] = False
    keep[1, :, :, 64:128] = False
    got = check_gradients(*tensors((2, 2, 2, 150, 170, 64, 64), dtype), None,
                          lambda b, h, q, kv: keep[b, h, q, kv], block=64)
    assert (got.query[0, 1, 17:40] == 0).all()
    assert (got.key[1, :, 64:128] == 0).all() and (got.value[1, :, 64:128] == 0).all()


def test_blocks_outside_of_the_mask_are_not_seen(rng, passes):
    """Whatever lies there."""
    q, k, v = tensors((1, 1, 1, 130, 260, 64, 64))

    def mask(b, h, q, kv):
        return (kv < 100) & (q % 5 != 0)

    clean = differentiate(q, k, v, lambda: softcap, mask)
    k[:, :, 128:], v[:, :, 128:] = math.nan, math.nan
    got = differentiate(q, k, v, lambda: softcap, mask)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(got, name), getattr(clean, name)), name


def test_a_mod_that_masks(rng, passes):
    """-inf from a score mod is a mask, also for whole rows."""
    dead = torch.zeros(90)
    dead[::7] = -math.inf
    got = check_gradients(*tensors((1, 1, 1, 90, 100, 32, 32)), lambda: lambda s, b, h, q, kv:
                          torch.where(q >= kv, s, -math.inf) + dead[q])
    assert (got.query[:, :, ::7] == 0).all()


def test_large_scores_and_scales(rng, passes):
    q, k, v = tensors((1, 1, 1, 64, 200, 64, 64))
    check_gradients(q * 10, k * 10, v, slack=100)  # errors of the scores themselves are relative
    check_gradients(q, k, v, scale=0.0)
    check_gradients(q, k, v, scale=-1.0, slack=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_repeatable(rng, set_threads, threads):
    set_threads(threads)
    for heads in (1, 4):
        q, k, v = tensors((1, heads, 2, 300, 500, 64, 64))
        bias, d_out = torch.randn(1000), torch.randn(1, 2 * heads, 300, 64)

        def run(q=q, k=k, v=v, bias=bias, d_out=d_out):
            return differentiate(q, k, v, lambda t: lambda s, b, h, q, kv: s + t[q - kv + 500],
                                 causal, [bias], d_out=d_out)

        first = run()
        for _ in range(4):
            again = run()
            for name in ("query", "key", "value"):
                assert torch.equal(getattr(again, name), getattr(first, name)), name
            assert torch.equal(again.captures[0], first.captures[0])


def test_a_new_length_compiles_nothing(rng, passes, monkeypatch):
    differentiate(*tensors((1, 1, 1, 60, 60, 48, 48)))
    monkeypatch.setattr(compile, "compile_object", None)
    for length in rng.integers(9, 400, 40):
        differentiate(*tensors((1, 2, 1, int(length), 65, 48, 48)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_memory(set_threads, dtype, heads):
    set_threads(2)
    call = call_of(*tensors((1, heads, 1, 2000, 2000, 64, 64), dtype), mask_mod=causal)
    result = forward(call)
    d_out = torch.randn_like(result.out)
    extra = peak_bytes(lambda: backward(call, result, d_out, None)) - 3 * call.query.nbytes
    assert extra <= 2 * 2**20, "2 MiB, the rows' sums and d_query in float32"


@pytest.mark.parametrize("bits", [128, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_vector_widths(passes, monkeypatch, bits, dtype):
    """The kernel of other machines, as this one's instructions can run it."""
    monkeypatch.setattr(compile.Host, "vector_bits", bits)
    monkeypatch.setattr(compile.Host, "pairs", False)
    monkeypatch.setattr(launch_cpu_backward, "_plans", {})
    check_gradients(*tensors((1, 2, 1, 100, 150, 40, 40), dtype), lambda: alibi, causal, slack=2)


@pytest.mark.parametrize("host, bits, storage, product", [
    (compile.Host("aarch64-unknown-linux-gnu", "neoverse-v1", ""), 128, "float32", "fmla"),
    (compile.Host("x86_64-unknown-linux-gnu", "haswell", ""), 256, "float32", "vfmadd"),
    (compile.Host("x86_64-unknown-linux-gnu", "sapphirerapids", ""), 512, "float32", "vfmadd"),
    (compile.Host("x86_64-unknown-linux-gnu", "sapphirerapids", ""), 512, "bfloat16",
     "vdpbf16ps"),
], ids=lambda x: getattr(x, "cpu", str(x)))
def test_cross_compiled_products_stay_in_registers(host, bits, storage, product):
    """No accumulator of a product is spilt to the stack, on machines not at hand."""
    tile = cpu_backward_tile(storage, 64, 64, bits, product == "vdpbf16ps")
    text = compile.assembly(Backward(BackwardFrame(storage, 64, 64, tile)).emit(), host)
    stack = {"aarch64": r"(str|ldr|stp|ldp)\s+q\d+.*\[sp",
             "x86_64": r"[yz]mm\d+.*rsp|rsp.*[yz]mm\d+"}[host.triple.split("-")[0]]
    for name in ("scores", "d_p", "d_value", "d_key", "d_query"):
        body = text[text.index(f"\n{name}:"):]
        body = body[:body.index("\n.Lfunc_end")]
        assert not re.search(stack, body), name
        assert product in body
