"""What becomes of a whole mod: kinds of callables, results, numbers that vary, keys and caches."""

import functools
import inspect

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from flexattn import masks, mods
from flexattn.errors import DtypeError, TraceError
from flexattn.ir.evaluate import evaluate
from flexattn.ir.ops import Op
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod, tracer
from tests.trace.eager import NAMES, check, random_inputs, run, same

# Kinds of callables


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score * self.factor

    def mod(self, score, b, h, q_idx, kv_idx):
        return score + self.factor

    @staticmethod
    def plain(score, b, h, q_idx, kv_idx):
        return score - q_idx


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(80))
        self.inner = torch.nn.ReLU()

    def score_mod(self, score, b, h, q_idx, kv_idx):
        return self.inner(score) * self.slopes[h] + self.table[q_idx - kv_idx]

    def forward(self, score, b, h, q_idx, kv_idx):
        return self.score_mod(score, b, h, q_idx, kv_idx) / 2


def three_deep(factor):
    def outer(score, b, h, q_idx, kv_idx):
        def inner(x):
            return Scaled(factor)(x, b, h, q_idx, kv_idx) + h

        return inner(inner(score))

    return outer


def by_keyword(score, b, h, q_idx, kv_idx, *, weight=0.25):
    return score * weight


def decorated(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs) + 1

    return wrapper


CALLABLES = {
    "object": lambda: Scaled(0.3),
    "method": lambda: Scaled(0.3).mod,
    "static method": lambda: Scaled.plain,
    "module": Module,
    "module's method": lambda: Module().score_mod,
    "nested": lambda: three_deep(1.5),
    "partial": lambda: functools.partial(by_keyword, weight=0.7),
    "partial of an object": lambda: functools.partial(Scaled(2.0)),
    "decorated": lambda: decorated(by_keyword),
    "default argument": lambda: by_keyword,
    "star arguments": lambda: lambda *args: args[0] + args[4],
}


@pytest.mark.parametrize("name", CALLABLES)
def test_kinds_of_callables(name):
    check(CALLABLES[name]())


def test_torchs_own_combinations():
    def window(b, h, q, k):
        return q - k < 5

    def causal(b, h, q, k):
        return q >= k

    for combine in (torch_flex.and_masks, torch_flex.or_masks, flexattn.and_masks,
                    flexattn.or_masks):
        traced = specialize(trace_mask_mod(combine(window, causal)))
        inputs = random_inputs()
        got = evaluate(traced.graph, inputs)["mask"]
        q, k = inputs["q_idx"], inputs["kv_idx"]
        both = combine in (torch_flex.and_masks, flexattn.and_masks)
        expected = (q - k < 5) & (q >= k) if both else (q - k < 5) | (q >= k)
        assert torch.equal(got, expected)
    nothing = specialize(trace_mask_mod(torch_flex.noop_mask)).graph.output("mask")
    assert nothing.op is Op.CONST and nothing.attr is True


# Every mod of the blog and of our own library


def relative(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def causal_by_where(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


alibi_bias = torch.rand(4)
BLOG = {
    "noop": lambda s, b, h, q, k: s,
    "relative": relative,
    "alibi": lambda s, b, h, q, k: s + alibi_bias[h] * (q - k),
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "causal by where": causal_by_where,
}
document = torch.randint(0, 4, (41,)).sort().values
prefix = torch.tensor([3, 9, 20])


def prefix_lm(b, h, q_idx, kv_idx):
    return kv_idx <= prefix[b]


def generate_doc_mask_mod(inner, document_id):
    def doc_mask_mod(b, h, q_idx, kv_idx):
        same_doc = document_id[q_idx] == document_id[kv_idx]
        start = torch.zeros(5, dtype=torch.long)
        q_logical = q_idx - start[document_id[q_idx]]
        kv_logical = kv_idx - start[document_id[kv_idx]]
        return same_doc & inner(b, h, q_logical, kv_logical)

    return doc_mask_mod


BLOG_MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k <= 10),
    "prefix": prefix_lm,
    "documents": lambda b, h, q, k: document[q] == document[k],
    "documents and causal": generate_doc_mask_mod(masks.causal, document),
    "documents and prefix": generate_doc_mask_mod(prefix_lm, document),
}


@pytest.mark.parametrize("name", BLOG)
def test_mods_of_the_blog(name):
    check(BLOG[name])


@pytest.mark.parametrize("name", BLOG_MASKS)
def test_masks_of_the_blog(name):
    inputs = random_inputs()
    expected = torch.vmap(BLOG_MASKS[name])(*(inputs[n] for n in NAMES[1:]))
    traced = specialize(trace_mask_mod(BLOG_MASKS[name]))
    got = evaluate(traced.graph, inputs, traced.captures, traced.numbers)["mask"]
    assert torch.equal(got.expand(len(expected)), expected)


def library(module):
    """Every public function of flexattn.masks or mods that can be made without tensors."""
    return [name for name in module.__all__ if callable(getattr(module, name))]


@pytest.mark.parametrize("module, name", [(m, n) for m in (masks, mods) for n in library(m)])
def test_the_library_is_traced(module, name):
    """What takes the indices directly traces; factories are tested where they live."""
    fn = getattr(module, name)
    names = tuple(inspect.signature(fn).parameters)
    if names == NAMES:
        check(fn)
    elif names == NAMES[1:]:
        assert trace_mask_mod(fn).kind == "mask"


# Signatures and results


@pytest.mark.parametrize("mod", [
    lambda s, b, h, q: s, lambda s, b, h, q, k, extra: s, lambda: 1.0, Scaled(1.0).__init__,
    functools.partial(by_keyword, 1.0)], ids=["four", "six", "none", "method", "partial"])
def test_wrong_number_of_arguments(mod):
    with pytest.raises(TraceError, match=r"score_mod\(score, b, h, q_idx, kv_idx\)") as caught:
        trace_score_mod(mod)
    assert __file__ in str(caught.value)


def test_a_mask_mod_given_as_score_mod_and_the_reverse():
    with pytest.raises(TraceError, match="right arguments"):
        trace_score_mod(lambda b, h, q, k: q >= k)
    with pytest.raises(TraceError, match=r"mask_mod\(b, h, q_idx, kv_idx\)"):
        trace_mask_mod(lambda s, b, h, q, k: s)


def test_a_type_error_of_the_users_own_stays():
    with pytest.raises(TypeError, match="unsupported operand"):
        trace_score_mod(lambda s, b, h, q, k: s + (1 + "1"))


matrix = torch.randn(4, 4)


@pytest.mark.parametrize("result, got", [
    (lambda s, q: None, "None"), (lambda s, q: (s, s), "tuple"), (lambda s, q: matrix, r"\(4, 4\)"),
    (lambda s, q: matrix[q], r"\(4,\)"), (lambda s, q: "x", "str")],
    ids=["None", "tuple", "tensor", "row", "string"])
def test_results_are_one_scalar(result, got):
    with pytest.raises(TraceError, match=f"one scalar(.|\n)*{got}") as caught:
        trace_score_mod(lambda s, b, h, q, k: result(s, q))
    assert __file__ in str(caught.value)


def test_result_types():
    with pytest.raises(DtypeError, match="mask_mod must return a bool(.|\n)*value != 0"):
        trace_mask_mod(lambda b, h, q, k: q - k)
    with pytest.raises(DtypeError, match="a mask_mod") as caught:
        trace_score_mod(lambda s, b, h, q, k: q >= k)
    assert f'File "{__file__}"' in str(caught.value)
    assert specialize(trace_score_mod(lambda s, b, h, q, k: s.double())).graph.output(
        "score").dtype is torch.float32


@pytest.mark.parametrize("constant", [0.5, torch.tensor(0.5), 2.0])
def test_constant_results(constant):
    traced = specialize(trace_score_mod(lambda s, b, h, q, k: constant))
    same(run(traced, random_inputs()), torch.full((64,), float(constant)))
    assert specialize(trace_mask_mod(lambda b, h, q, k: True)).graph.output("mask").attr is True


# Numbers


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    """No number of these mods has varied in another test."""
    monkeypatch.setattr(tracer, "_skeletons", {})


def scaled(factor):
    return lambda s, b, h, q, k: torch.where(q - k < 7, s * factor + 1, factor)


def test_a_number_becomes_an_argument_on_its_second_value():
    graphs, inputs = [], random_inputs()
    for i in range(100):
        factor = 0.5 + i * 0.37
        traced = specialize(trace_score_mod(scaled(factor), torch.float64))
        same(run(traced, inputs), torch.vmap(scaled(factor))(*(inputs[n] for n in NAMES)))
        graphs.append(traced.graph)
    assert len({id(g) for g in graphs}) == 2
    assert graphs[0].numbers == () and graphs[-1].numbers == (torch.float64,) * 2


def test_each_occurrence_has_its_slot():
    """The same value twice is two numbers: one may vary and the other not."""
    def mod(x, y):
        return lambda s, b, h, q, k: s * x + y

    first = specialize(trace_score_mod(mod(0.123, 0.123)))
    second = specialize(trace_score_mod(mod(0.123, 0.456)))
    third = specialize(trace_score_mod(mod(0.123, 0.789)))
    assert first.graph.numbers == () and second.numbers == (0.456,) and third.numbers == (0.789,)
    assert second.graph is third.graph


@pytest.mark.parametrize("values", [
    (1, 1.0), (True, 1), (0.0, -0.0), (2**40, 3), (1.5, float("nan"))])
def test_values_that_python_calls_equal(values):
    """1, 1.0 and True, 0.0 and -0.0 differ in what they compute."""
    def mod(value):
        return lambda s, b, h, q, k: s.float() * (q * value)

    for value in values:
        check(mod(value))


def test_varying_whole_numbers_and_flags():
    inputs = random_inputs()
    for size, flag in ((7, True), (9, False), (11, True), (4, False)):
        def mod(s, b, h, q, k, size=size, flag=flag):
            return torch.where((q - k < size) & flag, s, s * size)
        traced = specialize(trace_score_mod(mod, torch.float64))
        same(run(traced, inputs), torch.vmap(mod)(*(inputs[n] for n in NAMES)))
    assert set(traced.graph.numbers) == {torch.int64, torch.bool}


def test_folding_waits_for_what_varies():
    """2 * factor is folded only while factor is constant."""
    def mod(factor):
        return lambda s, b, h, q, k: s * (torch.tensor(2.0) * factor)

    for factor in (0.3, 0.7, 0.9):
        traced = specialize(trace_score_mod(mod(factor), torch.float64))
        same(run(traced, random_inputs() | {"score": torch.ones(64).double()}),
             torch.full((64,), float(torch.tensor(2.0) * factor)).double())


# Keys


def test_equal_mods_share_a_graph_and_other_mods_do_not():
    graph = specialize(trace_score_mod(lambda s, b, h, q, k: s * 0.77)).graph
    assert specialize(trace_score_mod(lambda s, b, h, q, k: s * 0.77)).graph is graph
    assert specialize(trace_score_mod(lambda s, b, h, q, k: s + 0.77)).graph is not graph
    wide = specialize(trace_score_mod(lambda s, b, h, q, k: s * 0.77, torch.float64)).graph
    assert wide.output("score").dtype is torch.float64


def test_captures_by_kind_not_by_value():
    def mod(table):
        return lambda s, b, h, q, k: s + table[h]

    first, second = (specialize(trace_score_mod(mod(torch.randn(n)))) for n in (4, 9))
    assert first.graph is second.graph and len(second.captures[0]) == 9
    grown = specialize(trace_score_mod(mod(torch.randn(4, requires_grad=True))))
    half = specialize(trace_score_mod(mod(torch.randn(4).half())))
    assert len({id(m.graph) for m in (first, grown, half)}) == 3


def test_a_changed_closure_is_traced_anew():
    table = torch.randn(4)
    settings = {"factor": 0.5}

    def mod(s, b, h, q, k):
        return s * settings["factor"] + table[h]

    check(mod)
    settings["factor"] = 0.25
    check(mod)
