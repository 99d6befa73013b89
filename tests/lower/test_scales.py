"""Constant factors are taken out of a mod's graph, and the result stays the same."""

from __future__ import annotations

import math
import random

import pytest
import torch

from flexattn.analysis.gradient import gradient
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph
from flexattn.ir.ops import Op
from flexattn.lower.scales import Scales, take_out
from flexattn.trace import specialize, trace_score_mod

pytestmark = pytest.mark.usefixtures("no_number_has_varied")


def traced(mod):
    return specialize(trace_score_mod(mod))


def taken(graph: Graph):
    equal, found, scales = take_out(graph)
    assert all(equal[n].dtype is n.dtype for n in graph.nodes)
    return found, scales


def value(graph, score):
    return evaluate(graph, {"score": score})["score"]


def test_softcap_is_a_bare_tanh():
    graph, scales = taken(traced(lambda score, *_: 20 * torch.tanh(score / 20)).graph)
    assert scales == Scales(1 / 20, 20.0)
    assert [n.op for n in graph.nodes] == [Op.INPUT, Op.TANH]


def test_its_gradient_has_no_factor():
    mod = traced(lambda score, *_: 20 * torch.tanh(score / 20))
    both = Graph((*mod.graph.outputs, *gradient(mod.graph).graph.outputs))
    graph, scales = taken(both)
    assert scales == Scales(1 / 20, 20.0)
    factors = [n for n in graph.nodes if n.op is Op.MUL and any(a.is_const for a in n.args)]
    assert not factors


@pytest.mark.parametrize("mod", [
    lambda score, *_: score / 4 + torch.tanh(score / 20),  # read in two ways
    lambda score, *_: score + 1.0,
])
def test_a_score_read_otherwise_keeps_its_scale(mod):
    assert taken(traced(mod).graph)[1].score == 1.0


def test_a_negative_factor_stays():
    """The largest score would be another."""
    graph, scales = taken(traced(lambda score, *_: -5 * torch.tanh(score)).graph)
    assert scales.result == 1.0
    assert math.isclose(float(value(graph, torch.tensor(0.3))), -5 * math.tanh(0.3),
                        rel_tol=1e-6)


def test_extreme_factors_stay():
    """Their product would overflow where the mod's own order does not."""
    graph, scales = taken(traced(lambda score, *_: torch.exp(score) * 1e-25 * 1e25 * 1e20).graph)
    found = float(value(graph, torch.tensor(2.0) * scales.score)) * scales.result
    assert math.isclose(found, math.exp(2.0) * 1e20, rel_tol=1e-5)
    graph, scales = taken(traced(lambda score, *_: torch.exp(score) * 1e-25 * 1e-25).graph)
    assert math.isclose(scales.result, 1e-25, rel_tol=1e-6)
    assert float(value(graph, torch.tensor(2.0))) > 0


def random_mod(rng):
    a, b, c, d = (rng.choice([-1, 1]) * rng.uniform(0.1, 30) for _ in range(4))
    inside = rng.choice([lambda s: s * a / b, lambda s: s / a])

    def first(score, *_):
        return torch.tanh(inside(score)) * c * d * (inside(score) / c)

    def second(score, *_):
        return -torch.tanh(inside(score)) / d * torch.exp(-inside(score) * inside(score)) * a

    def third(score, *_):
        return torch.tanh(inside(score)) * c * 2 + score
    return rng.choice([first, second, third])


@pytest.mark.parametrize("number", range(60))
def test_equal_to_rounding(number, seed):
    rng = random.Random(seed + number)
    before = traced(random_mod(rng)).graph
    after, scales = taken(before)
    score = torch.randn(100, dtype=torch.float32)
    wanted = value(before, score)
    found = value(after, score * scales.score) * scales.result
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)
