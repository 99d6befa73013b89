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
}


@pytest.mark.parametrize("name", MODS)
def test_equals_autograd(name):
    table = bias_table()
    mod = MODS[name](table)
    score = torch.randn(B, H, Q, K, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(B, H, Q, K, dtype=torch.float64)
    result = mod(score, *index_grids()).expand(B, H, Q, K)
    expected = torch.autograd.grad(result, [score, table], grad, allow_unused=True)

    traced = specialize(trace_score_mod(mod, torch.float64))
    derived = gradient(traced.graph)
    inputs = dict(zip(("b", "h", "q_idx", "kv_idx"), index_grids(), strict=True))
    captures = [c.detach() for c in traced.captures]
    out = evaluate(derived.graph, {**inputs, "score": score.detach(), "grad": grad}, captures)
    torch.testing.assert_close(out["d_score"].expand(B, H, Q, K), expected[0])

    total = torch.zeros_like(table)
    for i, load in enumerate(derived.loads):
        at = [evaluate(traced.graph.replace_outputs(("i", a)), inputs, captures)["i"]
              .expand(B, H, Q, K) for a in load.args]
        total.index_put_(tuple(at), out[f"d_load{i}"].expand(B, H, Q, K), accumulate=True)
    wanted = torch.zeros_like(table) if expected[1] is None else expected[1]
    torch.testing.assert_close(total, wanted)
