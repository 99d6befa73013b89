import math

import pytest
import torch

from flexattn import AuxRequest, create_block_mask, flex_attention
from flexattn.errors import ArgumentError, ShapeError
from flexattn.mods import (
    activation,
    attention_sink,
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


def sink_by_the_formula(query, key, value, sink, keep):
    """The softmax over the scores and the sink, without the sink's column."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = torch.where(keep, scores, -torch.inf)
    column = sink.expand(query.shape[1])[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ value


@pytest.mark.parametrize("heads", [(), (4,)])
def test_attention_sink_and_its_gradient(heads, rng):
    length, hidden = rng.randrange(20, 200), rng.randrange(1, 10)
    query, key, value = (torch.randn(2, 4, length, 16, dtype=torch.float64, requires_grad=True)
                         for _ in range(3))
    sink = torch.randn(heads, dtype=torch.float64, requires_grad=True)
    i = torch.arange(length)
    keep = (i[:, None] >= i) & (i >= hidden)  # the first queries attend nothing
    block_mask = create_block_mask(
        lambda b, h, q, kv: (q >= kv) & (kv >= hidden), None, None, length, length)
    out, aux = flex_attention(query, key, value, block_mask=block_mask,
                              return_aux=AuxRequest(lse=True))
    got = attention_sink(out, aux.lse, sink)
    wanted = sink_by_the_formula(query, key, value, sink, keep)
    torch.testing.assert_close(got, wanted)
    d_out, inputs = torch.randn_like(got), (query, key, value, sink)
    for g, w in zip(torch.autograd.grad(got, inputs, d_out),
                    torch.autograd.grad(wanted, inputs, d_out), strict=True):
        torch.testing.assert_close(g, w)


def test_attention_sink_gives_back_the_dtype_of_out():
    out = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    got = attention_sink(out, torch.zeros(1, 1, 2), torch.zeros(1))
    torch.testing.assert_close(got, torch.full_like(out, 0.5))


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
    with pytest.raises(ShapeError, match="do not fit together"):
        attention_sink(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3), torch.ones(3))
