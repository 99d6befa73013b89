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
    dynamo,
    flex_attention,
    masks,
    mods,
)
from flexattn import compile as native
from flexattn.block_mask import undivided
from flexattn.runtime import cpu_call, operator
from flexattn.trace import trace_mask_mod
from flexattn.trace.written import bind, write


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


class Model(nn.Module):
    """Two layers with a learned bias, a buffer and a captured number."""

    def __init__(self, heads=4, dim=16):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv = nn.ModuleList(nn.Linear(32, 3 * heads * dim) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(heads * dim, 32) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(heads, 129) * 0.1)
        self.register_buffer("slopes", torch.rand(heads))
        self.temperature = 1.0

    def score_mod(self, score, b, h, q_idx, kv_idx):
        return score * self.temperature + self.bias[h, q_idx - kv_idx + 64] - self.slopes[h]

    def forward(self, x, mask=None):
        batch, length, _ = x.shape
        if mask is None:
            mask = create_block_mask(masks.causal, None, None, length, length, BLOCK_SIZE=16)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).view(batch, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            y = flex_attention(q, k, v, self.score_mod, mask)
            x = x + out(y.transpose(1, 2).reshape(batch, length, -1))
        return x


@pytest.fixture
def kernels(monkeypatch):
    """The kernels that were asked for so far; what was asked for before the test counts again."""
    found, library = {}, native.library
    monkeypatch.setattr(native, "library",
                        lambda key, *rest: found.setdefault(key) or library(key, *rest))
    monkeypatch.setattr(cpu_call, "_plans", {})
    return found


@pytest.mark.parametrize("inside", [True, False], ids=["mask inside", "mask outside"])
def test_fifty_steps(inside, kernels):
    """Changing lengths and a changing captured number: two compiles, no kernel after the first
    step."""
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    for step in range(50):
        length = 20 + (step * 7) % 41
        model.temperature = twin.temperature = 0.5 + 0.013 * step
        x = torch.randn(2, length, 32)
        mask = None if inside else create_block_mask(masks.causal, None, None, length, length,
                                                     BLOCK_SIZE=16)
        got = compiled(x, mask)
        got.square().mean().backward()
        found.append(set(kernels))
    expected = twin(x, mask)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2
    assert found[0] and found[-1] == found[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Windows(nn.Module):
    """Whole numbers and reals: of the module, of a closure, of a default, computed."""

    def __init__(self):
        super().__init__()
        self.window, self.cap, self.rate = 3, 5.0, 2.0

    def forward(self, q, shift, gain):
        def mask_mod(b, h, i, j):
            return (i >= j) & (i - j <= self.window) & (j.float() < gain * 100.0)

        def score_mod(s, b, h, i, j, cap=self.cap):
            return cap * torch.tanh((s + (i - j + shift) * 0.01) / cap) * (1 / self.rate)

        mask = create_block_mask(mask_mod, None, None, q.shape[2], q.shape[2], BLOCK_SIZE=16)
        return flex_attention(q, q, q, score_mod, mask)


def test_every_kind_of_captured_number_varies_without_a_compile(kernels):
    model = Windows()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found, eager = [], set()
    for step in range(12):
        model.window, model.cap, model.rate = 3 + step, 5.0 + step, 2.0 + 0.5 * step
        q = torch.randn(1, 1, 40 + step, 16)
        got = compiled(q, 2 + step, 0.2 + 0.01 * step)
        found.append(set(kernels) - eager)
        before = set(kernels)
        torch.testing.assert_close(got, model(q, 2 + step, 0.2 + 0.01 * step))
        eager |= set(kernels) - before
    assert counter.frame_count <= 2
    assert found[0] and found[-1] == found[0]


def test_gradients_of_a_model():
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 24, 32)
    grads = []
    for fn in (compiled, model):
        model.zero_grad()
        fn(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_stand_in_the_code_are_constants_of_the_kernel():
    """What is written out is folded; what is captured is not, nor what is computed of it."""
    factor = 0.25

    def mod(s, b, h, i, j):
        return s * factor * 2.0 + (i % 3) * 0.5 + (i - j) * (factor * 3)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo, "write", lambda *a: found.append(write(*a)) or found[-1])
        q = torch.randn(1, 1, 20, 16)
        compiled = torch.compile(flex_attention, backend="eager", fullgraph=True)
        assert torch.equal(compiled(q, q, q, mod), flex_attention(q, q, q, mod))
    assert found[0].reals == (0.25, 0.75) and found[0].whole == ()
    graph = bind(found[0].text, [torch.tensor(n, dtype=torch.float64) for n in (0.25, 0.75)],
                 ()).graph
    assert {n.attr for n in graph.nodes if n.is_const} == {2.0, 3, 0.5}


def test_captured_scalars_and_numbers_are_on_the_querys_device():
    """A CUDA graph holds no value of the CPU's. Devices without values show where tensors are."""
    scalar, found = torch.tensor(0.3, requires_grad=True), []

    def backend(graph, inputs):
        found.extend(n for n in graph.graph.nodes
                     if n.target is torch.ops.flexattn.attention.default)
        return lambda *tensors: (torch.empty(1, 1, 20, 16, device="meta"),)

    def attend(q, factor):
        return flex_attention(q, q, q, lambda s, b, h, i, j: s * factor + scalar)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    q = torch.randn(1, 1, 20, 16, device="meta")
    for factor in (0.5, 0.7):
        compiled(q, factor)
    assert len(found) == 2
    for node in found:
        captured = [a.meta["example_value"] for a in node.args[9]]
        assert [(t.device.type, t.dtype, t.requires_grad) for t in captured] == [
            ("meta", torch.float32, True), ("meta", torch.float64, False)]


def test_exponents_and_divisors_of_integers_stay_known():
    """They make the code what it is: torch takes 2 for a product, a known divisor is one, too."""
    power, size, big = 2.0, 7, 1e30

    def mod(s, b, h, i, j):
        return s.abs() ** power + i // size + (j % size) + torch.where(i > j, s, -torch.inf) * big

    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 1, 20, 16)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo, "write", lambda *a: found.append(write(*a)) or found[-1])
        compiled(q, q, q, mod)
    assert found[0].reals == (1e30,) and found[0].whole == ()


def test_whole_numbers_that_vary():
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, window):
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None,
                                 q.shape[2], q.shape[2], BLOCK_SIZE=16)
        return flex_attention(q, q, q, lambda s, b, h, i, j: s + window // 2, mask)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    q = torch.randn(1, 1, 70, 16)
    for window in (3, 9, 17, 33, 40):
        assert torch.equal(compiled(q, window), attend(q, window))
    assert counter.frame_count <= 2


def test_a_changed_closure_is_followed():
    settings = {"mod": MODS["softcap"]}

    def attend(q):
        return flex_attention(q, q, q, settings["mod"])

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 4, 20, 16)
    for name in ("softcap", "alibi", "none", "softcap"):
        settings["mod"] = MODS[name]
        assert torch.equal(compiled(q), attend(q))


def test_defaults_of_a_mod_change():
    """Dynamo of torch 2.11 takes a function's defaults for constants of its code."""
    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 1, 70, 16)
    for window in (3, 9, 17):
        mask = create_block_mask(lambda b, h, i, j, n=window: (i - j).abs() < n, None, None, 70, 70)
        assert torch.equal(compiled(q, q, q, block_mask=mask),
                           flex_attention(q, q, q, block_mask=mask))


def test_captured_tensors_may_change_in_place():
    values = torch.randn(4)

    def attend(q):
        return flex_attention(q, q, q, lambda s, b, h, i, j: s * values[h])

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 4, 20, 16)
    for _ in range(3):
        assert torch.equal(compiled(q), attend(q))
        values.mul_(1.5)


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
