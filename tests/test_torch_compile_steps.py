"""torch.compile with fullgraph=True, call after call: numbers and tensors that mods capture change,
and neither graphs nor kernels are compiled again and again."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from flexattn import compile as native
from flexattn import create_block_mask, dynamo, flex_attention, masks
from flexattn.runtime import cpu_call
from flexattn.trace.written import bind, write


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


slopes = torch.rand(4)
CLOSURES = {
    "none": None,
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
}


def test_a_changed_closure_is_followed():
    settings = {"mod": CLOSURES["softcap"]}

    def attend(q):
        return flex_attention(q, q, q, settings["mod"])

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 4, 20, 16)
    for name in ("softcap", "alibi", "none", "softcap"):
        settings["mod"] = CLOSURES[name]
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
