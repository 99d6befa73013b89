"""torch.compile on a GPU: CUDA graphs, captured numbers as tensors there, the results of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flexattn import compile_triton, create_block_mask, flex_attention, masks

HEADS, DIM = 4, 64


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """A learned bias, and a captured number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 3 * HEADS * DIM, bias=False)
        self.bias = nn.Parameter(torch.randn(HEADS, 1024) * 0.1)
        self.temperature = 1.0

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * self.temperature + self.bias[h, (q_idx - kv_idx).abs()]

        return flex_attention(q, k, v, score_mod, mask).transpose(1, 2).reshape(x.shape[0], -1)


def layer() -> Layer:
    return Layer().to("cuda", torch.bfloat16)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).norm() <= 0.02 * wanted.norm()


def compare(net: Layer, compiled: Callable, x: torch.Tensor, *more: Any) -> None:
    wanted = net(x, *more)
    loss_weights = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, list(net.parameters()), loss_weights)
    torch.compiler.cudagraph_mark_step_begin()
    got = compiled(x, *more)
    found = torch.autograd.grad(got, list(net.parameters()), loss_weights)
    assert_close(got, wanted)
    for one, other in zip(found, grads, strict=True):
        assert_close(one, other)


def cut_at(limit: int) -> Callable:
    return lambda b, h, q, k: (q >= k) & (k < limit)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_steps_with_a_changing_number_and_other_tensors(mode: str, masked: bool, rng: Any) -> None:
    """CUDA graphs replay launches: what is in them may not have been a value of the first step."""
    net = layer()
    compiled = torch.compile(net, mode=mode, fullgraph=True)
    kernels = []
    for step in range(7):
        net.temperature = 0.5 + 0.25 * step
        more = [create_block_mask(cut_at(60 * step + 50), None, None, 512, 512, device="cuda")
                ] if masked else []
        compare(net, compiled, torch.randn(2, 512, 64, device="cuda", dtype=torch.bfloat16), *more)
        kernels.append(len(compile_triton._binaries))
    assert kernels[-1] == kernels[-3]


def test_defaults_of_a_mod_change() -> None:
    """Dynamo of torch 2.11 takes a function's defaults for constants of its code."""
    net = layer()
    compiled = torch.compile(net, fullgraph=True)
    for limit in (50, 110, 170):
        mask = create_block_mask(lambda b, h, q, k, n=limit: (q >= k) & (k < n), None, None, 512,
                                 512, device="cuda")
        with torch.no_grad():
            x = torch.randn(2, 512, 64, device="cuda", dtype=torch.bfloat16)
            assert_close(compiled(x, mask), net(x, mask))


def test_lengths_change_under_cuda_graphs(rng: Any) -> None:
    net = layer()
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for length in (512, 384, 512, 300, 384):
        with torch.no_grad():
            x = torch.randn(2, length, 64, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(compiled(x).clone(), net(x))


def test_a_mask_made_inside(rng: Any) -> None:
    net = layer()

    def step(x: torch.Tensor) -> torch.Tensor:
        return net(x, create_block_mask(masks.causal, None, None, x.shape[1], x.shape[1],
                                        device=x.device))

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(2, 512, 64, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(compiled(x).clone(), step(x))


def test_captured_numbers_are_tensors_on_the_device() -> None:
    found = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(n for n in graph.graph.nodes
                     if n.target is torch.ops.flexattn.attention.default)
        return graph

    net = layer()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16)
    for step in range(3):
        net.temperature = 0.5 + step
        assert_close(compiled(x), net(x))
    assert len(found) == 2
    for node in found:
        captured = [argument.meta["example_value"] for argument in node.args[9]]
        scalars = [(t.dtype, t.device.type) for t in captured if not t.dim()]
        assert scalars == [(torch.float64, "cuda")]
