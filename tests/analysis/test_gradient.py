"""The gradient graph equals autograd through the user's own function, in float64."""

import pytest
import torch

from flexattn.analysis.gradient import gradient
from flexattn.ir.evaluate import evaluate
from flexattn.trace import specialize, trace_score_mod

B, H, Q, K = 2, 3, 5, 7


def index_grids():
    return [torch.arange(n).reshape([-1 if i == d else 1 for i in range(4)])
            for d, n in enumerate((B, H, Q, K))]


def bias_table():
    return torch.randn(H, Q + K, dtype=torch.float64, requires_grad=True)


def two_reads(table):
    return lambda s, b, h, q, k: s * table[h, q] + torch.sin(table[h, k]) * s


MODS = {
    "softcap": lambda t: lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "relative": lambda t: lambda s, b, h, q, k: s + t[h, q - k + K],
    "two reads of one tensor": two_reads,
    "sigmoid and exp": lambda t: lambda s, b, h, q, k: torch.sigmoid(s) * torch.exp(-s * s),
    "logarithms": lambda t: lambda s, b, h, q, k: torch.log1p(s * s) + torch.log2(s.abs() + 1),
    "roots": lambda t: lambda s, b, h, q, k: (s * s + 1).sqrt() + torch.rsqrt(s * s + 2),
    "power": lambda t: lambda s, b, h, q, k: (s.abs() + 0.5) ** 1.7 + s**3,
    "power of a tensor": lambda t: lambda s, b, h, q, k: (s.abs() + 0.5) ** t[h, q],
    "where": lambda t: lambda s, b, h, q, k: torch.where(q >= k, s * 2, t[h, k] * s),
    "clamp": lambda t: lambda s, b, h, q, k: s.clamp(-0.5, 0.5) + torch.maximum(s, t[h, q]),
    "remainder": lambda t: lambda s, b, h, q, k: torch.remainder(s, 0.7),
    "erf and gelu": lambda t: lambda s, b, h, q, k: torch.erf(s) + torch.nn.functional.gelu(s),
    "quotient": lambda t: lambda s, b, h, q, k: s / (t[h, q] ** 2 + 1) + torch.expm1(s) - s.exp2(),
    "rounding": lambda t: lambda s, b, h, q, k: s.floor() + s.round() + s.sign() + s.cos(),
    "constant": lambda t: lambda s, b, h, q, k: (q - k) * 0.5 + s * 0,
    "numbers on the left": lambda t: lambda s, b, h, q, k: 2 ** s + 3 / (s * s + 1) - (1 - s),
    "powers torch knows": lambda t: lambda s, b, h, q, k: (s * s + 1) ** 0.5 + (s * s + 1) ** -1
    + (s * s + 1) ** -0.5 + (s + 9) ** -2 + s**2 + s**4,
    "a power of zero": lambda t: lambda s, b, h, q, k: (s * 0) ** 2 + (s - s) ** 1.5 + s**0,
    "a tensor in an exponent": lambda t: lambda s, b, h, q, k: torch.exp2(t[h, q]) * s,
    "three reads at three kinds of places": lambda t: lambda s, b, h, q, k: (
        t[h, q] * t[h, k] * t[h, q - k + K] * s),
    "a read under a mask": lambda t: lambda s, b, h, q, k: torch.where(
        q > k, s + t[h, (q - k).clamp(min=0)], s),
    "a read at a score's place": lambda t: lambda s, b, h, q, k: s * t[h, s.abs().long() % 3],
    "half precision between": lambda t: lambda s, b, h, q, k: (s.float() * 2).double() + t[h, q],
    "min and max of three": lambda t: lambda s, b, h, q, k: torch.minimum(
        torch.maximum(s, t[h, q]), t[h, k]),
    "equal operands of max": lambda t: lambda s, b, h, q, k: torch.maximum(s * 2, s + s),
    "abs at zero": lambda t: lambda s, b, h, q, k: (s * 0).abs() + s.abs() * s.sign(),
    "lerp and addcmul": lambda t: lambda s, b, h, q, k: torch.lerp(s, t[h, q], 0.3)
    + torch.addcmul(s, t[h, k], t[h, q]) + torch.addcdiv(s, s, t[h, q] ** 2 + 1, value=2.0),
    "hypot and logaddexp": lambda t: lambda s, b, h, q, k: torch.hypot(s, t[h, q])
    + torch.logaddexp(s, t[h, k]),
    "masked_fill and nan_to_num": lambda t: lambda s, b, h, q, k: torch.nan_to_num(
        s.masked_fill(q < k, 0.0)) * t[h, q],
    "fmod": lambda t: lambda s, b, h, q, k: torch.fmod(s, 0.7) + torch.fmod(t[h, q], 0.3),
}


@pytest.mark.parametrize("name", MODS)
def test_equals_autograd(name):
    compare_with_autograd(MODS[name])


def function(name):
    return getattr(torch, name, None) or getattr(torch.nn.functional, name)


ONE_OPERAND = ["exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin",
               "cos", "tan", "sinh", "cosh", "tanh", "asinh", "atanh", "sigmoid", "erf", "erfc",
               "floor", "ceil", "trunc", "round", "neg", "abs", "sign", "square", "reciprocal",
               "frac", "sinc", "logit", "silu", "gelu", "softplus", "logsigmoid", "mish", "elu",
               "celu", "selu", "relu", "relu6", "hardtanh", "leaky_relu", "hardsigmoid",
               "hardswish", "hardshrink", "softshrink", "softsign", "tanhshrink"]


@pytest.mark.parametrize("name", ONE_OPERAND)
def test_functions_of_one_operand(name):
    """On (0, 1), where all of them are smooth, and where they take it on both sides of 0."""
    compare_with_autograd(lambda t: lambda s, b, h, q, k: function(name)(s.sigmoid()) * t[h, q])
    if function(name)(torch.tensor(-0.7)).isfinite():
        compare_with_autograd(lambda t: lambda s, b, h, q, k: function(name)(s * 2) + t[h, k])


def test_cotangents_are_wide():
    """Gradients of half-precision captures are float32 until they are added up."""
    table = torch.randn(H, Q).bfloat16().requires_grad_()
    traced = specialize(trace_score_mod(lambda s, b, h, q, k: s * table[h, q]))
    derived = gradient(traced.graph)
    assert {n.dtype for _, n in derived.graph.outputs} == {torch.float32}


def test_what_needs_no_gradient_gets_none():
    table, fixed = torch.randn(H, requires_grad=True), torch.randn(H)
    traced = specialize(trace_score_mod(lambda s, b, h, q, k: s * table[h] + fixed[h] + k))
    derived = gradient(traced.graph)
    assert [load.attr for load in derived.loads] == [0]
    assert dict(derived.graph.outputs).keys() == {"d_score", "d_load0"}
    alone = gradient(specialize(trace_score_mod(lambda s, b, h, q, k: fixed[h] + q)).graph)
    assert alone.loads == () and alone.graph.output("d_score").attr == 0.0


def compare_with_autograd(make):
    table = bias_table()
    mod = make(table)
    score = torch.randn(B, H, Q, K, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(B, H, Q, K, dtype=torch.float64)
    result = mod(score, *index_grids()).expand(B, H, Q, K)
    expected = torch.autograd.grad(result, [score, table], grad, allow_unused=True)

    traced = specialize(trace_score_mod(mod, torch.float64))
    derived = gradient(traced.graph)
    inputs = dict(zip(("b", "h", "q_idx", "kv_idx"), index_grids(), strict=True))
    captures = [c.detach() for c in traced.captures]
    out = evaluate(derived.graph, {**inputs, "score": score.detach(), "grad": grad}, captures,
                   traced.numbers)
    torch.testing.assert_close(out["d_score"].expand(B, H, Q, K), expected[0])

    everything = {**inputs, "score": score.detach()}
    total = torch.zeros_like(table)
    for i, load in enumerate(derived.loads):
        at = [evaluate(traced.graph.replace_outputs(("i", a)), everything, captures,
                       traced.numbers)["i"]
              .expand(B, H, Q, K) for a in load.args]
        total.index_put_(tuple(at), out[f"d_load{i}"].expand(B, H, Q, K), accumulate=True)
    wanted = torch.zeros_like(table) if expected[1] is None else expected[1]
    torch.testing.assert_close(total, wanted)
