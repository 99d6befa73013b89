"""Hundreds of random mods: graph == torch, gradient == autograd, kernels == graph."""

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from flexattn import AuxRequest, create_block_mask, flex_attention, masks, mods, reference
from flexattn.analysis.gradient import gradient
from flexattn.ir.evaluate import evaluate
from flexattn.ir.ops import Op
from flexattn.trace import specialize, trace_score_mod
from tests.properties import random_mods
from tests.properties.random_mods import (
    HEADS,
    KEYS,
    QUERIES,
    bounded,
    compiled,
    random_tables,
    stacked,
)
from tests.trace.eager import same

LOOSE = dict(deadline=None, database=None,
             suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                                    HealthCheck.large_base_example])
STACKS = 60  # of HEADS mods each: more than 300 different ones


def stacks(kind="any"):
    return st.lists(random_mods.mods(kind), min_size=HEADS, max_size=HEADS, unique=True)


def test_every_operation_can_be_drawn():
    assert {*random_mods.TEMPLATES, *random_mods.INTEGERS, *random_mods.BOOLS} == set(Op)


def positions():
    """Every position of the grid as one-dimensional inputs, with a score for each."""
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(HEADS), torch.arange(QUERIES),
                                torch.arange(KEYS))
    inputs = dict(zip(("b", "h", "q_idx", "kv_idx"), grid.contiguous().T.contiguous(),
                      strict=True))
    return {"score": torch.randn(len(grid)) * 2, **inputs}


def evaluated(traced, inputs, **more):
    captures = [t.detach() for t in traced.captures]
    return evaluate(traced.graph, {**inputs, **more}, captures, traced.numbers)


@settings(max_examples=STACKS, **LOOSE)
@given(stacks(), st.sampled_from([torch.float32, torch.float64]))
def test_the_graph_equals_torch_bit_for_bit(sources, dtype):
    inputs = positions()
    inputs["score"] = inputs["score"].to(dtype)
    tables = random_tables(torch.float32)
    for source in sources:
        note(source)
        mod = compiled(source, tables)
        expected = torch.vmap(mod)(*inputs.values())
        traced = specialize(trace_score_mod(mod, dtype))
        got = evaluated(traced, inputs)["score"]
        same(got.expand(len(expected)), expected.to(dtype))


@settings(max_examples=STACKS, **LOOSE)
@given(stacks("differentiable"))
def test_the_gradient_equals_autograd(sources):
    inputs = positions()
    inputs["score"] = inputs["score"].double().requires_grad_()
    grad = torch.randn(len(inputs["score"]), dtype=torch.float64)
    for source in sources:
        note(source)
        tables = random_tables(torch.float64, requires_grad=True)
        mod = compiled(f"({source}).to(score.dtype)", tables)
        expected = torch.vmap(mod)(*inputs.values())
        floats = [inputs["score"], *(t for t in tables.values() if t.requires_grad)]
        wanted = torch.autograd.grad(expected, floats, grad, allow_unused=True) \
            if expected.requires_grad else [None] * len(floats)
        compare_gradients(mod, inputs, grad, floats, wanted)


def compare_gradients(mod, inputs, grad, floats, wanted):
    traced = specialize(trace_score_mod(mod, torch.float64))
    derived = gradient(traced.graph)
    detached = {name: x.detach() for name, x in inputs.items()}
    captures = [t.detach() for t in traced.captures]
    out = evaluate(derived.graph, {**detached, "grad": grad}, captures, traced.numbers)
    totals = {id(t): torch.zeros_like(t) for t in floats}
    totals[id(floats[0])] = out["d_score"].expand_as(grad)
    for i, load in enumerate(derived.loads):
        at = evaluate(traced.graph.replace_outputs(*((str(d), a) for d, a in
                                                     enumerate(load.args))),
                      detached, captures, traced.numbers)
        index = tuple(x.expand(len(grad)) for x in at.values())
        totals[id(traced.captures[load.attr])].index_put_(
            index, out[f"d_load{i}"].expand(len(grad)), accumulate=True)
    for tensor, expected in zip(floats, wanted, strict=True):
        expected = torch.zeros_like(tensor) if expected is None else expected
        known = expected.isfinite()
        torch.testing.assert_close(totals[id(tensor)][known], expected[known], rtol=1e-7,
                                   atol=1e-7)


def exact_inputs(dtype=torch.float32):
    """query, key whose products and sums have no rounding: kernel and formula start alike."""
    q = torch.randint(-3, 4, (1, HEADS, QUERIES, 8)) / 4
    k = torch.randint(-3, 4, (1, HEADS, KEYS, 8)) / 2
    return [t.to(dtype) for t in (q, k, torch.randn(1, HEADS, KEYS, 8))]


compared = {"rows": 0, "all": 0}
compiled_sources: set[str] = set()


@settings(max_examples=STACKS, **LOOSE)
@given(stacks())
def test_forward_kernels_equal_the_graph(sources):
    """Where the graph in float32 and in float64 agree, that is away from discontinuities."""
    compiled_sources.update(sources)
    source = stacked([bounded(s) for s in sources])
    note(source)
    tables = random_tables(torch.float32)
    q, k, v = exact_inputs()
    mod = compiled(source, tables)
    out, aux = flex_attention(q, k, v, mod, scale=1.0, return_aux=AuxRequest(lse=True))

    score = (q.double() @ k.double().transpose(-1, -2)).flatten()
    index = positions()
    narrow, wide = (
        evaluated(specialize(trace_score_mod(mod, dtype)), index, score=score.to(dtype))["score"]
        .double().reshape(1, HEADS, QUERIES, KEYS) for dtype in (torch.float32, torch.float64))
    calm = ((narrow - wide).abs() < 2e-6).all(-1)
    compared["rows"] += int(calm.sum())
    compared["all"] += calm.numel()
    expected = torch.softmax(wide, -1) @ v.double()
    torch.testing.assert_close(out.double()[calm], expected[calm], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.lse.double()[calm], wide.logsumexp(-1)[calm], rtol=1e-5,
                               atol=1e-5)


def test_enough_was_compared():
    """Of the kernels above: different mods, and rows away from discontinuities."""
    if compared["all"]:
        assert len(compiled_sources) >= 300
        assert compared["rows"] > 0.5 * compared["all"]


@settings(max_examples=12, **LOOSE)
@given(stacks("smooth"))
def test_backward_kernels_equal_autograd(sources):
    """In float64, with gradients of query, key, value and every captured tensor."""
    source = stacked([f"3 * torch.tanh(({s}) / 3)" for s in sources])
    note(source)
    tables = random_tables(torch.float64, requires_grad=True)
    inputs = [t.requires_grad_() for t in exact_inputs(torch.float64)]
    wanted_for = [*inputs, *(t for t in tables.values() if t.requires_grad)]
    mod = compiled(source, tables)
    d_out = torch.randn(1, HEADS, QUERIES, 8, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(out, wanted_for, d_out, allow_unused=True)
        for out in (flex_attention(*inputs, mod, scale=1.0),
                    reference.attention(*inputs, mod, scale=1.0)[0]))
    for tensor, g, e in zip(wanted_for, got, expected, strict=True):
        e = torch.zeros_like(tensor) if e is None else e
        g = torch.zeros_like(tensor) if g is None else g
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


# gradcheck: ten mods, in query, key, value and what they capture

slopes, table, square = torch.rand(2), torch.randn(2, 11), torch.randn(2, 5, 6)
GRADCHECK = {
    "softcap": ([], lambda: lambda s, b, h, q, k: 5 * torch.tanh(s / 5)),
    "our softcap": ([], lambda: mods.softcap(3.0)),
    "alibi": ([slopes], lambda slope: lambda s, b, h, q, k: s + slope[h] * (k - q)),
    "relative bias": ([table], lambda bias: lambda s, b, h, q, k: s + bias[h, q - k + 5]),
    "two reads": ([table], lambda bias: lambda s, b, h, q, k: s + bias[h, q] * bias[h, k + 5]),
    "dense bias": ([square], lambda bias: lambda s, b, h, q, k: s + bias[h, q, k]),
    "temperature": ([slopes], lambda t: lambda s, b, h, q, k: s * torch.exp(t[h])),
    "scaled and shifted": ([slopes, table], lambda x, y: lambda s, b, h, q, k: torch.where(
        q >= k, s * x[h], s + y[h, k])),
    "gelu": ([], lambda: lambda s, b, h, q, k: torch.nn.functional.gelu(s)),
    "sigmoid attention": ([], lambda: lambda s, b, h, q, k: torch.nn.functional.logsigmoid(s)),
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    captured, make = GRADCHECK[name]
    shapes = ((1, 2, 5, 3), (1, 2, 6, 3), (1, 2, 6, 4))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    inputs += [t.double().requires_grad_() for t in captured]
    mask = create_block_mask(masks.causal, None, None, 5, 6) if len(name) % 2 else None

    def attend(q, k, v, *captured):
        out, aux = flex_attention(q, k, v, make(*captured), mask,
                                  return_aux=AuxRequest(lse=True))
        return out, aux.lse

    assert torch.autograd.gradcheck(attend, inputs)
