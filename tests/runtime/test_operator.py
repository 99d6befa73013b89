"""The operators: torch's own checks, fake tensors, checkpointing, autocast, export, two ranks."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint

from flexattn import AuxRequest, create_block_mask, flex_attention, masks
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod
from flexattn.trace.written import bind, count_whole, needs_gradient, reads, write

ATTENTION = torch.ops.flexattn.attention.default
BACKWARD = torch.ops.flexattn.attention_backward.default
MASKED = torch.ops.flexattn.attention.masked


def written(mod, dtype=torch.float32):
    return write(trace_score_mod(mod, dtype))


def arguments(length=12, dtype=torch.float32, grad=True, mod=None, mask=None):
    """Of the attention operator."""
    q, k, v = (torch.randn(2, 3, length, 16, dtype=dtype, requires_grad=grad) for _ in range(3))
    score = written(mod) if mod else None
    runs, sizes, of_mask = [], [], None
    if mask is not None:
        made = create_block_mask(mask, None, None, length, length, BLOCK_SIZE=8)
        table = made.rows()
        runs = [table.offsets, table.start, table.end, table.full]
        sizes = [1, 1, 8, 8, 1, 1, length, length, 0]
        of_mask = write(trace_mask_mod(mask))
    return (q, k, v, runs, sizes, 0.25, True, score.text if score else "",
            of_mask.text if of_mask else "", list(score.captures) if score else [],
            list(of_mask.captures) if of_mask else [], [])


bias = torch.randn(3, 40, requires_grad=True)
limits = torch.randint(1, 12, (12,))
CASES = {
    "plain": dict(),
    "mod": dict(mod=lambda s, b, h, q, k: s + bias[h, q - k + 20]),
    "mask": dict(mask=lambda b, h, q, k: k <= limits[q]),
    "both": dict(mod=lambda s, b, h, q, k: s * bias[h, q], mask=masks.causal),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    """Schema, fake kernel, autograd registration, under AOT with static and dynamic shapes."""
    operator = MASKED if "mask" in CASES[name] else ATTENTION
    torch.library.opcheck(operator, arguments(**CASES[name]))


def test_calls_with_a_block_mask_stay_out_of_cuda_graphs():
    """What is derived of its table depends on the table's values, which a graph would replay."""
    unsafe = torch.Tag.cudagraph_unsafe
    packets = (torch.ops.flexattn.attention, torch.ops.flexattn.attention_backward)
    assert all(unsafe in op.masked.tags and unsafe not in op.default.tags for op in packets)
    assert unsafe in torch.ops.flexattn.block_runs.default.tags
    found = []

    def backend(graph, inputs):
        found.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph

    q = torch.randn(1, 1, 20, 16)
    mask = create_block_mask(masks.causal, None, None, 20, 20)
    torch.compile(flex_attention, backend=backend, fullgraph=True)(q, q, q, block_mask=mask)
    assert MASKED in found and ATTENTION not in found
    torch.compile(flex_attention, backend=backend, fullgraph=True)(q, q, q)
    assert ATTENTION in found


def test_opcheck_of_backward():
    """It has no autograd of its own: nothing that it is given requires grad."""
    inputs = list(arguments(**CASES["both"], grad=False))
    inputs[9] = [t.detach() for t in inputs[9]]
    out, lse, _ = ATTENTION(*inputs)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), out, lse,
                                     *inputs))


def test_opcheck_of_block_runs():
    text = write(trace_mask_mod(lambda b, h, q, k: k <= limits[q])).text
    for max_runs in (-1, 30):
        torch.library.opcheck(torch.ops.flexattn.block_runs.default, (
            1, 1, 12, 12, 4, 4, True, max_runs, torch.device("cpu"), "", text, [], [limits], []))


def test_fake_tensors():
    """Shapes, dtypes and strides without a computation: two outputs, one of them transposed."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 30, 4, 16, dtype=torch.bfloat16).transpose(1, 2)
                   for _ in range(3))
        out, aux = flex_attention(q, k, v, lambda s, b, h, i, j: s * 2,
                                  return_aux=AuxRequest(lse=True))
    assert out.shape == q.shape and out.stride() == q.stride() and out.dtype is torch.bfloat16
    assert aux.lse.shape == (2, 4, 30) and aux.lse.dtype is torch.float32
    assert aux.max_scores is None


# The text of a mod


def test_text_is_the_mod():
    inputs = {name: torch.arange(5) for name in ("b", "h", "q_idx", "kv_idx")}
    mods = (lambda s, b, h, q, k: s * 0.1 + bias[h, q] + (k % 3).float() ** 2,
            lambda s, b, h, q, k: torch.where(q < k, s, -float("inf")) * -0.0)
    for mod in mods:
        trace = trace_score_mod(mod)
        found = write(trace)
        again = bind(found.text, found.captures, ())
        assert again.graph is specialize(trace).graph
        assert found.captures == trace.captures and not found.reals and not found.whole
    assert needs_gradient(written(mods[0]).text) == (True,)
    assert reads(written(mods[0]).text, "h") and not reads(written(mods[0]).text, "b")
    assert set(inputs) == {"b", "h", "q_idx", "kv_idx"}


def test_text_is_the_same_in_every_process():
    """torch's caches of compiled graphs outlive the process: what they hold must mean the same."""
    program = ("from flexattn.trace import trace_score_mod\n"
               "from flexattn.trace.written import write\n"
               "print(write(trace_score_mod(lambda s, b, h, q, k: s * 0.1 + q // 3)).text)")
    texts = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                            check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
             for seed in ("1", "2")}
    assert len(texts) == 1


def test_no_text_is_no_mod():
    assert bind("", (), ()) is None and count_whole("") == 0 and needs_gradient("") == ()


# Eager around us


def attend(q, k, v):
    return flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[h, i - j + 20])


def gradients(fn, inputs):
    out = fn(*inputs)
    torch.manual_seed(0)
    return (out, *torch.autograd.grad(out, inputs, torch.randn_like(out)))


def equal(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def qkv():
    return [torch.randn(2, 3, 12, 16, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    inputs = qkv()
    equal(gradients(lambda *t: checkpoint.checkpoint(attend, *t, use_reentrant=reentrant), inputs)
          if not reentrant else reentrant_gradients(inputs), gradients(attend, inputs))


def reentrant_gradients(inputs):
    """The reentrant kind works with backward() alone."""
    out = checkpoint.checkpoint(attend, *inputs, use_reentrant=True)
    torch.manual_seed(0)
    out.backward(torch.randn_like(out))
    return (out, *(t.grad for t in inputs))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_selective_checkpointing_saves_the_output(compiled):
    """The policy sees the operator: its forward runs once where its outputs are saved."""
    calls = []

    def policy(context, op, *args, **kwargs):
        if op is ATTENTION:
            calls.append(context.is_recompute)
            return checkpoint.CheckpointPolicy.MUST_SAVE
        return checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q, k, v):
        return attend(q.sin(), k.cos(), v).exp()

    def saved(q, k, v):
        return checkpoint.checkpoint(
            layer, q, k, v, use_reentrant=False,
            context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, policy))

    torch._dynamo.reset()
    fn = torch.compile(saved, backend="aot_eager", fullgraph=True) if compiled else saved
    inputs = qkv()
    equal(gradients(fn, inputs), gradients(layer, inputs))
    assert calls


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled):
    """As scaled_dot_product_attention: float32 is cast, float64 is not, gradients come back."""
    torch._dynamo.reset()
    fn = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    inputs = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = fn(*inputs)
        wide = attend(*(t.double() for t in inputs))
    assert out.dtype is torch.bfloat16 and wide.dtype is torch.float64
    assert torch.equal(out, attend(*(t.bfloat16() for t in inputs)))
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_second_derivatives_are_refused():
    q, k, v = qkv()
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager")
    grad, = torch.autograd.grad(compiled(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)


# Export


class Exported(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 200))
        self.register_buffer("slopes", torch.rand(3))

    def forward(self, q, k, v):
        mask = create_block_mask(masks.causal, None, None, q.shape[2], k.shape[2], BLOCK_SIZE=16)
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * self.slopes[h]
                              + self.bias[h, i - j + 100], mask)


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_load_in_another_process(strict, tmp_path):
    model = Exported().eval()
    length = torch.export.Dim("length", min=4, max=90)
    inputs = [torch.randn(2, 3, 20, 16) for _ in range(3)]
    with torch.no_grad():
        program = torch.export.export(model, tuple(inputs), strict=strict,
                                      dynamic_shapes=[{2: length}] * 3)
        longer = [torch.randn(2, 3, 50, 16) for _ in range(3)]
        assert torch.equal(program.module()(*longer), model(*longer))
        torch.export.save(program, tmp_path / "program.pt2")
        torch.save((longer, model(*longer)), tmp_path / "expected.pt")
    loading = ("import sys, torch, flexattn\n"
               "program = torch.export.load(sys.argv[1]).module()\n"
               "inputs, expected = torch.load(sys.argv[2])\n"
               "assert torch.equal(program(*inputs), expected)")
    subprocess.run([sys.executable, "-c", loading, tmp_path / "program.pt2",
                    tmp_path / "expected.pt"], check=True, timeout=120)


# Two ranks


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("ranks.py")
    started = [subprocess.Popen([sys.executable, script, kind, str(rank), port],
                                env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in (0, 1)]
    assert [p.wait(180) for p in started] == [0, 0]
