"""The CPU forward kernel against the dense oracle in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch

from flexattn import BlockMask, compile
from flexattn.errors import IndexOutOfRangeError
from flexattn.kernels.cpu_forward import Forward
from flexattn.kernels.cpu_frame import Frame
from flexattn.kernels.tile_config import cpu_tile
from flexattn.lower.llvm_mod import LlvmMod
from flexattn.runtime import cpu_call
from flexattn.trace import specialize, trace_mask_mod
from tests.kernels.cpu_attend import alibi, attend, causal, check, close, softcap, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_DIMS = ((1, 1), (33, 7), (64, 64), (128, 128), (40, 200), (512, 512))


def some_sizes(rng, head_dims, largest=160):
    """(batch, kv heads, group, q_len, kv_len, D, Dv) with odd lengths."""
    q_len, kv_len = rng.integers(9, largest), rng.integers(1, 2 * largest)
    return tuple(map(int, (rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 4), q_len,
                           kv_len, *head_dims)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_dtypes_head_dims_and_odd_lengths(rng, dtype, head_dims):
    for _ in range(3):
        check(*tensors(some_sizes(rng, head_dims), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mods_and_masks(rng, dtype):
    for score_mod in (None, softcap, alibi):
        check(*tensors(some_sizes(rng, (32, 32)), dtype), score_mod, causal, slack=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_small_length(rng, dtype):
    for length in range(9, 140, 7):
        kv_len = int(rng.integers(1, 300))
        check(*tensors((1, 1, 1, length, kv_len, 64, 64), dtype), None, causal)


def strided(x, layout):
    """The same values behind other strides."""
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "dimension first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "slice":
        wide = torch.full((*x.shape[:3], x.shape[3] + 3), math.nan, dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    return x.flip(2)[:, :, :1].expand_as(x)  # one row for all positions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["heads last", "dimension first", "slice", "one row"])
def test_strides(rng, dtype, layout):
    q, k, v = tensors((2, 2, 2, 70, 90, 64, 64), dtype)
    result = check(*(strided(x, layout) for x in (q, k, v)), slack=3)
    if layout == "heads last":
        assert result.out.transpose(1, 2).is_contiguous(), "the output has the query's layout"


def test_one_key_and_value_for_the_whole_batch(rng):
    q, k, v = tensors((3, 2, 2, 75, 130, 64, 64))
    check(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))
    together = attend(q, k[:1], v[:1], None, causal)
    for b in range(3):
        alone = attend(q[b:b + 1], k[:1], v[:1], None, causal)
        assert torch.equal(together.out[b], alone.out[0])


@pytest.mark.parametrize("shape", [(1, 2, 0, 40), (0, 2, 40, 40), (1, 0, 40, 40), (2, 2, 40, 0)],
                         ids=str)
def test_empty_inputs(shape):
    batch, heads, q_len, kv_len = shape
    result = attend(*tensors((batch, heads, 1, q_len, kv_len, 64, 32)))
    assert result.out.shape == (batch, heads, q_len, 32)
    assert (result.out == 0).all() and (result.lse == -math.inf).all()
    assert (result.max_scores == -math.inf).all()


@pytest.mark.parametrize("block", [16, 128, (64, 256), (96, 32), 100, (1, 64), (256, 1)], ids=str)
def test_block_sizes(rng, block):
    window = int(rng.integers(1, 200))
    check(*tensors((1, 1, 2, 210, 300, 32, 32)), None,
          lambda b, h, q, kv: (q >= kv) & (q - kv < window), block=block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_by_batch_and_head(rng, dtype):
    keep = torch.rand(2, 4, 150, 170) < 0.3
    keep[0, 1, 17:40] = False
    keep[1, :, :, 64:128] = False
    result = check(*tensors((2, 2, 2, 150, 170, 64, 64), dtype), None,
                   lambda b, h, q, kv: keep[b, h, q, kv], block=64)
    assert (result.out[0, 1, 17:40] == 0).all() and (result.lse[0, 1, 17:40] == -math.inf).all()


def test_documents_and_a_captured_bias(rng):
    document = torch.randint(0, 4, (300,)).sort().values
    bias = torch.randn(2, 599)
    check(*tensors((1, 2, 1, 300, 300, 64, 64)),
          lambda s, b, h, q, kv: s + bias[h, q - kv + 299],
          lambda b, h, q, kv: (document[q] == document[kv]) & (q >= kv), slack=2)


def test_masked_keys_are_not_seen(rng):
    """Garbage beyond the mask's blocks and within masked positions' scores changes nothing."""
    q, k, v = tensors((1, 1, 1, 130, 260, 64, 64))
    clean = attend(q, k, v, None, lambda b, h, q, kv: kv < 100)
    k[:, :, 100:] = math.nan
    v[:, :, 128:] = math.nan
    assert torch.equal(attend(q, k, v, None, lambda b, h, q, kv: kv < 100).out, clean.out)


def test_nan_and_infinity_go_where_torch_puts_them(rng):
    q, k, v = tensors((1, 1, 1, 40, 300, 64, 64))
    special = torch.zeros(40, 300)
    special[3, 17], special[5, 299] = math.nan, math.inf
    special[7, :], special[9, :200] = math.nan, -math.inf
    special[13, :] = -math.inf
    result = attend(q, k, v, lambda s, b, h, q, kv: s + special[q, kv])
    score = (q.double() @ k.double().transpose(-1, -2)) / 8 + special
    expected = (torch.softmax(score, -1) @ v.double())
    expected[0, 0, 13] = 0  # as if masked
    close(result.out, expected, 3e-6, "out")
    close(result.lse, torch.logsumexp(score, -1), 3e-6, "lse")
    close(result.max_scores, score.amax(-1), 3e-6, "max_scores")


def test_large_scores(rng):
    q, k, v = tensors((1, 1, 1, 64, 200, 64, 64))
    check(q * 30, k * 30, v, slack=300)  # errors of the scores themselves are relative
    check(q, k, v, scale=0.0)
    check(q, k, v, scale=-1.0, slack=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_repeatable(rng, set_threads, threads):
    set_threads(threads)
    q, k, v = tensors((1, 4, 2, 300, 700, 64, 64))
    first = attend(q, k, v, alibi, causal)
    for _ in range(5):
        again = attend(q, k, v, alibi, causal)
        assert torch.equal(again.out, first.out) and torch.equal(again.lse, first.lse)


def test_a_new_length_compiles_nothing(rng, monkeypatch):
    attend(*tensors((1, 1, 1, 60, 60, 48, 48)))
    monkeypatch.setattr(compile, "compile_object", None)
    for length in rng.integers(9, 400, 100):
        attend(*tensors((1, 2, 1, int(length), 65, 48, 48)))


def test_out_of_range_read_is_reported_where_attended(rng):
    q, k, v = tensors((1, 1, 1, 100, 100, 64, 64))
    table = torch.randn(50)

    def windowed(s, b, h, q, kv):
        return s + table[q - kv]

    attend(q, k, v, windowed, lambda b, h, q, kv: (q >= kv) & (q - kv < 50))
    with pytest.raises(IndexOutOfRangeError, match=r"(?s)captured tensor 0 .*\[-50, 50\)"):
        attend(q, k, v, windowed, causal)


def peak_bytes(call):
    """Memory that torch allocated at most at once during a call, beyond what it had before."""
    with torch.profiler.profile(profile_memory=True, activities=[
            torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    now, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(rng, set_threads, dtype):
    set_threads(2)
    q, k, v = tensors((1, 2, 1, 2000, 2000, 64, 64), dtype)
    extra = peak_bytes(lambda: attend(q, k, v)) - q.nbytes  # the output
    assert extra <= 1.3 * (k.nbytes + v.nbytes) + 2 * 2**20, extra


@pytest.mark.parametrize("bits", [128, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_vector_widths(rng, monkeypatch, bits, dtype):
    """The kernel of other machines, as this one's instructions can run it."""
    monkeypatch.setattr(compile.Host, "vector_bits", bits)
    monkeypatch.setattr(compile.Host, "pairs", False)
    monkeypatch.setattr(cpu_call, "_plans", {})
    check(*tensors((1, 2, 1, 100, 150, 40, 40), dtype), alibi, causal, slack=4)


@pytest.mark.parametrize("host, bits, storage, product", [
    (compile.Host("aarch64-unknown-linux-gnu", "neoverse-v1", ""), 128, "float32", "fmla"),
    (compile.Host("x86_64-unknown-linux-gnu", "haswell", ""), 256, "float32", "vfmadd"),
    (compile.Host("x86_64-unknown-linux-gnu", "sapphirerapids", ""), 512, "float32", "vfmadd"),
    (compile.Host("x86_64-unknown-linux-gnu", "sapphirerapids", ""), 512, "bfloat16",
     "vdpbf16ps"),
], ids=lambda x: getattr(x, "cpu", str(x)))
def test_cross_compiled_products_stay_in_registers(host, bits, storage, product):
    """No accumulator of a product is spilt to the stack, on machines not at hand."""
    frame = Frame(storage, 64, 64, cpu_tile(storage, 64, 64, bits, product == "vdpbf16ps"))
    text = compile.assembly(Forward(frame).emit(), host)
    stack = {"aarch64": r"(str|ldr|stp|ldp)\s+q\d+.*\[sp",
             "x86_64": r"[yz]mm\d+.*rsp|rsp.*[yz]mm\d+"}[host.triple.split("-")[0]]
    for name in ("scores", "values"):
        body = text[text.index(f"\n{name}:"):]
        body = body[:body.index("\n.Lfunc_end")]
        assert not re.search(stack, body), name
        assert product in body


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stretches_of_keys(rng, dtype, block):
    """Masks whose rows attend one stretch each, empty rows and ends within a vector included."""
    for _ in range(4):
        shift, width, step = (int(rng.integers(low, 90)) for low in (-60, 1, 2))

        def window(b, h, q_idx, kv_idx, shift=shift, width=width, step=step):
            middle = q_idx - kv_idx + shift
            return (middle.abs() < width) & (kv_idx > h) & (q_idx % step != 1)

        for score_mod in (None, alibi):
            check(*tensors(some_sizes(rng, (32, 32)), dtype), score_mod, window, slack=4,
                  block=block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_that_attend_the_same(rng, dtype):
    """Documents of a few rows, keys valid for all rows, rows that all differ."""
    for _ in range(3):
        sizes = some_sizes(rng, (32, 32))
        q_len, kv_len = sizes[3:5]
        doc = torch.arange(max(q_len, kv_len)) // int(rng.integers(1, 9)) % 3
        valid, table = torch.rand(kv_len) < 0.7, torch.rand(q_len, kv_len) < 0.5
        limit = (torch.arange(q_len) // 5).double()
        limit[::7] = math.nan
        for mask in (lambda b, h, q_idx, kv_idx, doc=doc: doc[q_idx] == doc[kv_idx],
                     lambda b, h, q_idx, kv_idx, valid=valid: valid[kv_idx],
                     lambda b, h, q_idx, kv_idx, table=table: table[q_idx, kv_idx],
                     lambda b, h, q_idx, kv_idx, limit=limit: kv_idx % 9 < limit[q_idx]):
            check(*tensors(sizes, dtype), None, mask, slack=2)


def test_given_blocks_say_more_than_a_stretch(rng):
    """Full blocks that the mask would not attend, empty ones that it would."""
    q, k, v = tensors((1, 2, 1, 128, 200, 32, 32))
    partial = torch.tensor([[0, 3], [5, 6]], dtype=torch.int32)[None, None]
    full = torch.tensor([[1, 4], [2, 0]], dtype=torch.int32)[None, None]
    count = torch.full((1, 1, 2), 2, dtype=torch.int32)
    given = BlockMask.from_kv_blocks(count, partial, count, full, BLOCK_SIZE=(64, 30),
                                     mask_mod=causal, seq_lengths=(128, 200))
    assert not given.is_proved
    block = torch.arange(200) // 30
    attended = torch.arange(128)[:, None] >= torch.arange(200)
    for row in range(2):
        part = attended[64 * row:64 * (row + 1)]
        part &= (block[:, None] == partial[0, 0, row]).any(-1)
        part |= (block[:, None] == full[0, 0, row]).any(-1)
    result = attend(q, k, v, None, causal, block_mask=given)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=attended)
    close(result.out, expected, 3e-6, "given blocks")


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_many_heads_take_turns_in_the_ring(rng, set_threads, threads):
    """More heads than are packed at once, more threads than tiles: each as if it were alone."""
    set_threads(threads)
    q, k, v = tensors((3, 16, 2, 70, 90, 64, 64))
    together = attend(q, k, v, None, causal).out
    for b, h in ((0, 0), (1, 7), (2, 31)):
        alone = attend(q[b:b + 1, h:h + 1], k[b:b + 1, h // 2:h // 2 + 1],
                       v[b:b + 1, h // 2:h // 2 + 1], None, causal).out
        assert (together[b, h] - alone[0, 0]).abs().max() < 1e-6


def test_no_masked_stores():
    """They take AMD's processors a dozen cycles each with AVX2."""
    host = compile.Host("x86_64-unknown-linux-gnu", "znver3", "")
    mask = LlvmMod(specialize(trace_mask_mod(causal)).graph, 2**15)
    frame = Frame("float32", 64, 64, cpu_tile("float32", 64, 64, 256))
    text = compile.assembly(Forward(frame, None, mask).emit(), host)
    assert "vblendvps" in text and "maskmov" not in text
