import math

import pytest
import torch

from flexattn.errors import ArgumentError, ShapeError
from flexattn.mods import (
    activation,
    chain,
    head_bias,
    learned_bias,
    softcap,
    temperature,
    undo_softmax,
)
from tests.mods.oracle import check, dense, traced

SHAPE = (2, 3, 5, 6)


def test_softcap(rng):
    cap = rng.uniform(0.5, 30)
    check(softcap(cap), lambda s, *_: cap * math.tanh(s / cap), SHAPE, scale=40)


def test_temperature(rng):
    value = rng.uniform(0.5, 3)
    check(temperature(value), lambda s, *_: s / value, SHAPE)
    check(temperature(torch.tensor(value)), lambda s, *_: s / value, SHAPE)
    many = torch.rand(3) + 0.5
    check(temperature(many), lambda s, b, h, q, kv: s / many[h].item(), SHAPE)


def test_head_bias(rng):
    bias = torch.randn(3)
    check(head_bias(bias), lambda s, b, h, q, kv: s + bias[h].item(), SHAPE)


@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6), (1, 5, 6), SHAPE, (1, 3, 5, 6), (2, 1, 5, 6)])
def test_learned_bias(shape):
    bias = torch.randn(shape)
    full = bias.expand(SHAPE)
    check(learned_bias(bias), lambda s, *where: s + full[where].item(), SHAPE)


@pytest.mark.parametrize("function", [torch.relu, torch.sigmoid, lambda x: torch.relu(x) ** 2])
def test_activation_replaces_the_softmax(function):
    scores = torch.randn(1, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        scores[0, 0, 0] = -1.0  # a row where relu leaves nothing
    modified = dense(activation(function), scores)
    lse = torch.logsumexp(modified, -1)
    empty = (lse == -torch.inf).unsqueeze(-1)
    weights = torch.where(empty, 0.0, torch.exp(modified - torch.where(empty, 0.0, lse[..., None])))
    got = undo_softmax(weights @ value, lse)
    expected = function(scores) @ value
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(traced(activation(function), scores), modified)
    got_grad, = torch.autograd.grad(dense(activation(function), scores).exp().sum(), scores)
    expected_grad, = torch.autograd.grad(function(scores).sum(), scores)
    torch.testing.assert_close(got_grad, expected_grad)


def test_activation_keeps_nan():
    assert dense(activation(torch.relu), torch.full((1, 1, 1, 1), torch.nan)).isnan().all()


def test_undo_softmax_gives_back_the_dtype_of_out():
    out = undo_softmax(torch.ones(1, 1, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 2))
    assert out.dtype is torch.bfloat16


def test_chain(rng):
    bias = torch.randn(3)
    check(chain(head_bias(bias), softcap(3.0)),
          lambda s, b, h, q, kv: 3 * math.tanh((s + bias[h].item()) / 3), SHAPE)
    check(chain(), lambda s, *_: s, SHAPE)


def test_errors():
    for cap in (0, -1.0, math.nan, True, "a"):
        with pytest.raises(ArgumentError, match="cap is not a positive number"):
            softcap(cap)
    with pytest.raises(ShapeError, match=r"\[\] or \[H\]"):
        temperature(torch.ones(2, 2))
    with pytest.raises(ShapeError, match=r"\[Q, KV\]"):
        learned_bias(torch.ones(4))
    with pytest.raises(ArgumentError, match="not a function"):
        activation("relu")
    with pytest.raises(ArgumentError, match="not a function"):
        chain(softcap(1.0), 3)
    with pytest.raises(ShapeError, match="does not belong to out"):
        undo_softmax(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 4))
