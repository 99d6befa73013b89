"""torch.compile with fullgraph=True: no graph break, few compiles, the eager results."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from flexattn import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
    masks,
    mods,
)
from flexattn.block_mask import undivided
from flexattn.runtime import operator
from flexattn.trace import trace_mask_mod
from flexattn.trace.written import write


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(length=20, heads=4, kv_heads=None, dim=16, grad=True, dtype=torch.float32):
    shapes = [(2, heads, length, dim)] + [(2, kv_heads or heads, length + 3, dim)] * 2
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


def same(compiled, eager, inputs, *more, exact=True):
    """Outputs and gradients have the same bits, whatever launches the kernels; nearly where a
    number is a constant of one kernel and an argument of the other."""
    results = []
    for fn in (eager, compiled):
        out = fn(*more)
        leaves = [t for t in inputs if t.requires_grad]
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True) \
            if leaves else ()
        results.append((out, *grads))
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got is None) == (expected is None)
        if got is not None and exact:
            assert torch.equal(got, expected)
        elif got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


slopes = torch.rand(4, requires_grad=True)
table = torch.randn(4, 64, requires_grad=True)
documents = torch.randint(0, 3, (64,)).sort().values
offset = torch.tensor(2)
MODS = {
    "none": None,
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
    "relative": lambda s, b, h, q, k: s + table[h, q - k + 32],
    "two reads": lambda s, b, h, q, k: s * table[h, q] + table[h, k].sigmoid(),
    "computed of a capture": lambda s, b, h, q, k: s + torch.exp(table * 0.1)[h, q] * slopes.sum(),
    "of the library": mods.softcap(7.0),
    "partial": functools.partial(lambda factor, s, b, h, q, k: s * factor, 0.5),
    "by a captured scalar": lambda s, b, h, q, k: s + table[h, offset] + table[1, offset + 1] * q,
    "numbers and factories": lambda s, b, h, q, k: torch.where(
        q >= k, s, torch.full((), -5.0)) + torch.zeros_like(s) + torch.tensor(0.5),
    "composed": lambda s, b, h, q, k: nn.functional.gelu(s) + nn.functional.softplus(s),
    "step by step": lambda s, b, h, q, k: s + table[h][q] + table[..., k][h],
}
MASKS = {
    "none": None,
    "causal": masks.causal,
    "documents": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
    "window": flexattn.and_masks(masks.causal, masks.sliding_window(8)),
}


@pytest.mark.parametrize("name", MODS)
def test_score_mods(name):
    q, k, v = tensors()
    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    same(compiled, flex_attention, [q, k, v, slopes, table], q, k, v, MODS[name],
         exact=name not in ("of the library", "partial"))


@pytest.mark.parametrize("name", MASKS)
def test_block_masks_made_outside(name):
    q, k, v = tensors()
    mask = MASKS[name] and create_block_mask(MASKS[name], None, None, 20, 23, BLOCK_SIZE=16)
    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    same(compiled, flex_attention, [q, k, v, slopes], q, k, v, MODS["alibi"], mask)


@pytest.mark.parametrize("name", ["causal", "documents", "window"])
def test_block_masks_made_inside(name):
    q, k, v = tensors()

    def attend(q, k, v):
        mask = create_block_mask(MASKS[name], None, None, q.shape[2], k.shape[2], BLOCK_SIZE=16)
        return flex_attention(q, k, v, MODS["relative"], mask)

    same(torch.compile(attend, backend="aot_eager", fullgraph=True), attend, [q, k, v, table],
         q, k, v)


@pytest.mark.parametrize("form", ["made by torch", "without full blocks", "not the mod's blocks"])
def test_torch_block_masks(form):
    """Given from outside; blocks that contradict their mask_mod count, as in eager mode."""
    kept = torch.rand(300) < 0.7

    def mask_mod(b, h, i, j):
        return (i >= j) & kept[j] | (j < 3)

    mask = torch_flex.create_block_mask(mask_mod, 2, None, 300, 300, device="cpu",
                                        **SEPARATE if form == "without full blocks" else {})
    if form == "not the mod's blocks":
        mask = torch_flex.BlockMask.from_kv_blocks(
            mask.kv_num_blocks.clamp(max=1), mask.kv_indices, mask_mod=mask_mod,
            seq_lengths=(300, 300))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
    for _ in range(2):
        q, k, v = (torch.randn(2, 2, 300, 16, requires_grad=True) for _ in range(3))
        same(lambda *a: compiled(*a, block_mask=mask), lambda *a: flex_attention(
            *a, block_mask=mask), [q, k, v], q, k, v)
    assert counter.frame_count == 1


SEPARATE = {"separate_full_blocks": False} if "separate_full_blocks" in inspect.signature(
    torch_flex.create_block_mask).parameters else {}


def test_masks_that_share_a_table_keep_their_own_mods():
    """Decoding's masks: nobody looked at their blocks, and the tables of two steps are the same."""
    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(2, 2, 1, 16)
    k, v = torch.randn(2, 2, 2, 300, 16)
    found = []
    for _ in range(3):
        real = torch.rand(2, 300) < 0.5
        mask = undivided(lambda b, h, i, j, real=real: real[b, j], 2, 1, 300, "cpu")
        found.append(mask.rows().offsets)
        wanted = nn.functional.scaled_dot_product_attention(q, k, v, real[:, None, None])
        torch.testing.assert_close(compiled(q, k, v, block_mask=mask), wanted)
        table, sizes = mask.rows(), [1, 1, 128, 128, 2, 1, 1, 300, 1]
        inside = operator._block_mask([table.offsets, table.start, table.end, table.full], sizes,
                                      (write(trace_mask_mod(mask.mask_mod)).text, [real], []))
        assert torch.equal(inside.traced(real.device).captures[0], real)
        assert inside.regrid(16, 64).rows().end.tolist() == [5]
    assert all(one is found[0] for one in found)


def test_masks_by_batch_and_head_made_inside():
    q, k, v = tensors()
    lengths = torch.tensor([5, 17])

    def attend(q, k, v):
        mask = create_block_mask(lambda b, h, q, k: (k < lengths[b]) & (k >= h), q.shape[0],
                                 q.shape[1], q.shape[2], k.shape[2], BLOCK_SIZE=8)
        return flex_attention(q, k, v, block_mask=mask)

    same(torch.compile(attend, backend="aot_eager", fullgraph=True), attend, [q, k, v], q, k, v)


@pytest.mark.parametrize("name", ["causal", "documents"])
def test_create_block_mask_itself(name):
    compiled = torch.compile(create_block_mask, backend="aot_eager", fullgraph=True)
    for length in (40, 50, 64):
        got = compiled(MASKS[name], 2, None, length, length, BLOCK_SIZE=16)
        expected = create_block_mask(MASKS[name], 2, None, length, length, BLOCK_SIZE=16)
        assert isinstance(got, BlockMask) and got.shape == expected.shape
        assert torch.equal(got.to_dense(), expected.to_dense())
        q = torch.randn(2, 1, length, 16)
        assert torch.equal(flex_attention(q, q, q, block_mask=got),
                           flex_attention(q, q, q, block_mask=expected))


@pytest.mark.parametrize("name", ["causal", "documents", "window"])
def test_a_block_mask_with_room_has_no_unknown_size(name):
    """Made and used in one graph, in which every size is known."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(n for node in graph.graph.nodes
                     for n in getattr(node.meta.get("example_value"), "shape", ()))
        return graph

    def step(q, k, v):
        mask = create_block_mask(MASKS[name], None, None, q.shape[2], k.shape[2], BLOCK_SIZE=16,
                                 max_runs=20)
        return flex_attention(q, k, v, block_mask=mask)

    q, k, v = tensors()
    same(torch.compile(step, backend=backend, fullgraph=True), step, (q, k, v), q, k, v)
    assert not any("u" in str(n) for n in sizes)


def test_statistics_scale_and_grouped_heads():
    q, k, v = tensors(kv_heads=2)

    def attend(q, k, v):
        out, aux = flex_attention(q, k, v, MODS["alibi"], scale=0.3, enable_gqa=True,
                                  return_aux=AuxRequest(lse=True, max_scores=True))
        return out.sum(-1) + aux.lse + aux.max_scores

    same(torch.compile(attend, backend="aot_eager", fullgraph=True), attend,
         [q, k, v, slopes], q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype):
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
               for t in tensors(dtype=dtype))
    same(torch.compile(flex_attention, backend="aot_eager", fullgraph=True), flex_attention,
         [q, k, v], q, k, v, MODS["softcap"])


def test_inference():
    q, k, v = tensors(grad=False)
    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(q, k, v, MODS["relative"]),
                           flex_attention(q, k, v, MODS["relative"]))


def test_a_mod_that_cannot_be_traced():
    def branch(s, b, h, q, k):
        return s if q >= k else -s

    q = torch.randn(1, 1, 20, 16)
    with pytest.raises(Exception, match=r"flexattn|torch\.where|data-dependent|Data-dependent"):
        torch.compile(flex_attention, backend="eager", fullgraph=True)(q, q, q, branch)
    with pytest.raises(flexattn.errors.ControlFlowError, match="torch.where"):
        torch.compile(flex_attention, backend="eager")(q, q, q, branch)
    with pytest.raises(flexattn.errors.UnsupportedOpError, match="cumsum"):
        torch.compile(flex_attention, backend="eager")(
            q, q, q, lambda s, b, h, i, j: torch.cumsum(s, 0))


def test_inductor():
    x = torch.randn(2, 24, 64, requires_grad=True)

    def block(x):
        q = x.view(2, 24, 4, 16).transpose(1, 2) * 2
        mask = create_block_mask(masks.causal, None, None, 24, 24, BLOCK_SIZE=16)
        return flex_attention(q, q, q, MODS["relative"], mask).sin()

    grads = []
    for fn in (torch.compile(block, fullgraph=True), block):
        out = fn(x)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [x, table])))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
