"""A mod is traced again when anything it reads has changed, and known otherwise."""

import gc
import math
import types
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from flexattn import masks, mods
from flexattn.errors import FlexAttnError
from flexattn.trace import memo, specialize, trace_mask_mod
from tests.properties import random_mods
from tests.trace.remembered import CPU, GRID, TABLE, Holder, score, times


def hits(fn, traced, **kwargs):
    """Whether a mod that was met is known the next time."""
    score(fn, **kwargs)
    before = len(traced)
    score(fn, **kwargs)
    return len(traced) == before


def changes(make, traced, *variants):
    """Every variant of what a mod reads is traced once, and known from then on."""
    for variant in (*variants, *variants):
        score(make(variant))
    assert len(traced) == len(variants)


# What is known again


def test_new_lambda_of_the_same_code(traces):
    table = torch.randn(4)
    for _ in range(5):
        score(lambda s, b, h, i, j: s + table[h])
        memo.mask_mod(lambda b, h, i, j: i >= j, CPU)
    assert len(traces) == 2


def test_a_call_traces_nothing_the_second_time(traces):
    q, table = torch.randn(1, 2, 16, 16), torch.randn(2)
    mask = flexattn.create_block_mask(lambda b, h, i, j: i >= j, None, None, 16, 16)
    outs = [flexattn.flex_attention(q, q, q, lambda s, b, h, i, j: s * 2 + table[h], mask)
            for _ in range(3)]
    assert len(traces) == 2
    assert torch.equal(outs[0], outs[2])


def test_this_calls_tensors_are_bound(traces):
    def mod(table):
        return lambda s, b, h, i, j: s + table[j]

    first, second = torch.randn(8), torch.randn(9)
    score(mod(first))
    assert score(mod(second)).captures[0] is second
    first.mul_(2)
    assert score(mod(first)).captures[0] is first
    assert len(traces) == 1


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(4))
        self.window = 3

    def mod(self):
        return lambda s, b, h, i, j: s + self.bias[h] * self.table[h] + self.window


def helper(x, weight=0.5):
    return x * weight


def by_keyword(s, b, h, i, j, *, weight=0.25):
    return s * weight


def uses_helper(s, b, h, i, j):
    return helper(s) + helper(s, weight=2)


def flags(s, b, h, i, j, causal=None):
    if causal is None or causal is False:
        return s
    return torch.where(i >= j, s, -math.inf)


def nested(s, b, h, i, j):
    def inner(x):
        return helper(x) + h

    return inner(inner(s))


def loops(s, b, h, i, j):
    for k in range(3):
        s = s + 0.1 * k * [i, j][k % 2]
    return s


def doubled(mod):
    return lambda *args: 2 * mod(*args)


KNOWN = {
    "helper": uses_helper, "keyword": by_keyword, "partial": partial(by_keyword, weight=3.0),
    "default": flags, "nested": nested, "loop": loops, "decorated": doubled(uses_helper),
    "method": Holder(3, TABLE).mod, "object": Holder(3, TABLE), "module": Layer().mod(),
    "finfo": lambda s, b, h, i, j: torch.clamp(s, max=torch.finfo(s.dtype).max),
    "functional": lambda s, b, h, i, j: torch.nn.functional.softplus(s, beta=2.0),
    "view": lambda s, b, h, i, j: s + GRID[h][j],
    "shape": lambda s, b, h, i, j: s + TABLE[j % TABLE.shape[0]],
    "length": lambda s, b, h, i, j: s + TABLE[j % len(TABLE)],
    "math": lambda s, b, h, i, j: s * math.sqrt(2) + math.pi,
    "softcap": mods.softcap(20.0), "alibi": mods.alibi(torch.rand(4)),
    "chain": mods.chain(mods.alibi(torch.rand(4)), mods.softcap(3.0)),
    "activation": mods.activation(torch.sigmoid),
    "learned": mods.learned_bias(torch.randn(1, 4, 8, 8)),
    "T5": mods.relative_bias(torch.randn(33, 4)),
}
KNOWN_MASKS = {
    "causal": masks.causal, "window": masks.and_masks(masks.causal, masks.sliding_window(5)),
    "document": masks.causal_document(torch.tensor([0, 0, 1, 1])),
    "padding": masks.or_masks(masks.padding(torch.tensor([3])), masks.prefix_lm(2)),
    "torch's and": torch_flex.and_masks(
        masks.causal, lambda b, h, i, j: i - j < 3),
}


@pytest.mark.parametrize("mod", KNOWN.values(), ids=KNOWN)
def test_known(mod, traces):
    assert hits(mod, traces)


@pytest.mark.parametrize("mod", KNOWN_MASKS.values(), ids=KNOWN_MASKS)
def test_known_masks(mod, traces):
    first, second = (memo.mask_mod(mod, CPU) for _ in range(2))
    assert len(traces) == 1
    assert first.graph is second.graph


@given(st.data())
def test_random_mods(data):
    tables = random_mods.random_tables(torch.float32)
    source = data.draw(random_mods.mods())
    for _ in range(2):
        tables = {name: t.clone() for name, t in tables.items()}
        score(random_mods.compiled(source, tables))


# What has changed


def test_numbers(traces):
    changes(lambda x: lambda s, b, h, i, j: s * x, traces, 2, 2.0, True, 0.0, -0.0, 3, math.nan)


def test_tensors(traces):
    t = torch.randn(4)
    changes(lambda x: lambda s, b, h, i, j: s + x[..., h], traces, t, t.double(),
            t.clone().requires_grad_())


def test_scalar_tensor(traces):
    changes(lambda x: lambda s, b, h, i, j: s + x, traces, torch.tensor(2.0), 2.0,
            torch.tensor(2))


def test_shapes_count_where_they_are_asked_for(traces):
    changes(lambda x: lambda s, b, h, i, j: s + x[j % x.shape[0]], traces, torch.randn(4),
            torch.randn(5), torch.randn(10)[::2])


def test_lengths_count_where_they_are_asked_for(traces):
    changes(lambda x: lambda s, b, h, i, j: s + x[j % len(x)], traces, torch.randn(4),
            torch.randn(5))


def test_which_tensors_are_one(traces):
    x, y = torch.randn(4), torch.randn(4)
    changes(lambda pair: lambda s, b, h, i, j: s + pair[0][h] * pair[1][h], traces, (x, x), (x, y))


def test_a_rebound_cell(traces):
    window = 3

    def mod(s, b, h, i, j):
        return torch.where(i - j < window, s, 0)

    score(mod)
    window = 4
    score(mod)
    assert len(traces) == 2


def test_a_changed_global_default_and_helper(traces, monkeypatch):
    score(uses_helper)
    monkeypatch.setattr(helper, "__defaults__", (0.75,))
    score(uses_helper)
    monkeypatch.setitem(globals(), "helper", lambda x, weight=0.75: x + weight)
    score(uses_helper)
    score(by_keyword)
    monkeypatch.setattr(by_keyword, "__kwdefaults__", {"weight": 0.5})
    score(by_keyword)
    monkeypatch.setattr(by_keyword, "__code__", (lambda s, b, h, i, j, *, weight: s).__code__)
    score(by_keyword)
    assert len(traces) == 6


def test_a_global_in_place_of_a_builtin(traces, monkeypatch):
    def mod(s, b, h, i, j):
        return abs(s)

    score(mod)
    monkeypatch.setitem(globals(), "abs", lambda x: -x)
    score(mod)
    assert len(traces) == 2


def test_a_patched_torch_function(traces, monkeypatch):
    def mod(s, b, h, i, j):
        return torch.tanh(s) + torch.nn.functional.relu(s)

    score(mod)
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: 2 * tanh(x))
    score(mod)
    monkeypatch.setattr(torch.nn.functional, "relu", lambda x: x)
    score(mod)
    assert len(traces) == 3


def test_an_attribute_of_a_module(traces):
    config = types.ModuleType("config")
    config.inner = types.ModuleType("inner")

    def mod(s, b, h, i, j):
        return torch.where(i - j < config.inner.window, s, 0)

    for window in (3, 5, torch.tensor(3), 3):
        config.inner.window = window
        score(mod)
    assert len(traces) == 3


def captures(owner):
    return lambda s, b, h, i, j: s * owner.scale + owner.window + owner.table[h]


@pytest.mark.parametrize("of", [lambda o: o.mod, lambda o: o, captures])
def test_attributes_of_an_object(of, traces):
    owner = Holder(3, TABLE)
    score(of(owner))
    for name, value in (("scale", 3.0), ("table", TABLE.double()), ("scale", torch.tensor(3))):
        setattr(owner, name, value)
        score(of(owner))
    assert len(traces) == 4
    score(of(Holder(3, TABLE)))
    assert len(traces) == 4


def test_parameters_of_a_module(traces):
    layer = Layer()
    score(layer.mod())
    assert score(layer.mod()).captures[0] is layer.bias
    layer.bias = torch.nn.Parameter(torch.randn(4))
    assert score(layer.mod()).captures[0] is layer.bias
    assert len(traces) == 1
    layer.bias.requires_grad_(False)
    score(layer.mod())
    layer.window = 4
    score(layer.mod())
    assert len(traces) == 3


def test_dtypes(traces):
    def mod(s, b, h, i, j):
        return torch.where(i > 3, torch.tensor(0.5), s)

    score(mod)
    score(mod, torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        score(mod)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(traces) == 3


# What is remembered


def test_a_number_that_alternates_has_one_graph_from_its_second_value_on(traces):
    def mod(x):
        return lambda s, b, h, i, j: s * x + 0.123

    graphs = [score(mod(x)).graph for x in (0.25, 0.5, 0.25, 0.5, 0.25)]
    assert len(set(map(id, graphs[1:]))) == 1
    graphs = [score(mod(float(x))).graph for x in range(100)]
    assert set(map(id, graphs)) == {id(graphs[0])}


def test_nothing_is_kept_alive_and_the_memory_is_bounded(traces):
    def forgotten():
        table = torch.randn(4)
        mod = lambda s, b, h, i, j: s + table[h]  # noqa: E731
        score(mod)
        return weakref.ref(table), weakref.ref(mod)

    refs = forgotten()
    traces.clear()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    for x in range(2 * memo._MOST_KEPT):
        memo.score_mod(partial(by_keyword, weight=x), torch.float32, CPU)
    assert len(memo._kept) == memo._MOST_KEPT


def test_which_functions_are_one(traces):
    first, second = times(2.0), times(2.0)

    def mod(act):
        return lambda s, b, h, i, j: s * 10 if act == first else s

    for act in (first, second):
        score(mod(act))
    assert len(traces) == 2


def test_builtins_of_a_function(traces):
    code = compile("def mod(s, b, h, i, j): return abs(s)", "<mod>", "exec")
    for own in ({}, {"__builtins__": {"abs": lambda x: x * 2}}):
        exec(code, own)
        score(own["mod"])
    assert len(traces) == 2


def test_masks_and_scores_are_apart(traces):
    def mod(b, h, i, j):
        return i >= j

    memo.mask_mod(mod, CPU)
    assert memo.mask_mod(mod, CPU).graph is specialize(trace_mask_mod(mod, CPU)).graph
    with pytest.raises(FlexAttnError):
        memo.score_mod(mod, torch.float32, CPU)
