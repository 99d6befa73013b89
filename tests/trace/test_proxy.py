"""Captured tensors indexed by traced values, and every refusal with its line and remedy."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch

from flexattn.errors import (
    ControlFlowError,
    DeviceError,
    DtypeError,
    FlexAttnError,
    TraceError,
    UnsupportedOpError,
)
from flexattn.ir.ops import Op
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod
from tests.trace.eager import SIZES, check

B, H, Q, K = SIZES.values()

bias4 = torch.randn(B, H, Q, K)
table = torch.randn(H, Q + K).bfloat16()
rows = torch.randn(Q).double()
columns = torch.randint(0, K, (K,))
scalar = torch.tensor(0.75)
offset = torch.tensor(3)
flags = torch.rand(Q) > 0.5
weird = torch.randn(K, 3, H).transpose(0, 2)[:, ::2]  # [H, 2, K], no usual strides
empty_dims = torch.randn(1, H, 1, K)

READS = {
    "four dimensions": lambda s, b, h, q, k: s + bias4[b, h, q, k],
    "step by step": lambda s, b, h, q, k: s + bias4[b][h][q][k],
    "two and two": lambda s, b, h, q, k: s + bias4[b, h][q, k],
    "ellipsis at the end": lambda s, b, h, q, k: bias4[b, h, ...][q, ..., k] * s,
    "ellipsis first": lambda s, b, h, q, k: bias4[..., q, k][b, h] + bias4[..., k][b, h, q],
    "colons": lambda s, b, h, q, k: bias4[:, :, q][b, :, k][h] + table[:, q - k + K][h],
    "a distance": lambda s, b, h, q, k: s + table[h, q - k + K],
    "a distance, clamped": lambda s, b, h, q, k: s * table[h, (q - k).clamp(-8, 8) + 8],
    "negative": lambda s, b, h, q, k: rows[-q - 1] + table[-1, -k - 1] + rows[-1],
    "wrapping below zero": lambda s, b, h, q, k: table[h, q - k],
    "by a captured index": lambda s, b, h, q, k: table[h, columns[k]] + rows[columns[k] % Q],
    "by a captured scalar": lambda s, b, h, q, k: table[h, offset] + rows[q * 0 + offset],
    "by a number": lambda s, b, h, q, k: bias4[0, h, 2, -1] + weird[h, 1, k],
    "by narrow integers": lambda s, b, h, q, k: rows[q.int()] + rows[columns[k].int() % Q],
    "by a quotient": lambda s, b, h, q, k: table[h // 2, (q // 4) * 4 + k % 4],
    "documents": lambda s, b, h, q, k: torch.where(columns[q] == columns[k], s, -float("inf")),
    "flags": lambda s, b, h, q, k: torch.where(flags[q] & ~flags[k % Q], s, 0.0),
    "strides": lambda s, b, h, q, k: weird[h, 0, k] - weird[h][1][k],
    "0-d": lambda s, b, h, q, k: s * scalar + offset + scalar * offset,
    "0-d on the left": lambda s, b, h, q, k: scalar * s + torch.exp(scalar) - offset * q,
    "sizes of one": lambda s, b, h, q, k: empty_dims[0, h, 0, k] + empty_dims[b * 0, h, q * 0, k],
    "sliced outside of the trace": lambda s, b, h, q, k: table[1:, ::2][h - 1, q]
    + rows[None][0, q],
    "made inside": lambda s, b, h, q, k: s + torch.arange(Q, dtype=s.dtype)[q] * torch.ones(H)[h],
    "shapes": lambda s, b, h, q, k: s / bias4.shape[0] + bias4[b].size(0) + len(bias4[b, h])
    + bias4[b].ndim + q.dim() + s.numel(),
    "numpy's numbers": lambda s, b, h, q, k: s * np.float64(0.3) + q * np.int64(3)
    + np.float64(2) * s,
}


@pytest.mark.parametrize("name", READS)
def test_reads_of_captured_tensors(name):
    check(READS[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64,
                                   torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
                                   torch.bool])
def test_captured_dtypes_promote(dtype):
    captured = (torch.randn(Q) * 3).to(dtype)
    check(lambda s, b, h, q, k: s.float() * captured[q])
    check(lambda s, b, h, q, k: captured[q] * 2)
    check(lambda s, b, h, q, k: captured[q] * 0.5 + k)
    check(lambda s, b, h, q, k: (captured[q] == captured[k % Q]) & (q > k))


def test_one_capture_for_one_tensor():
    traced = trace_score_mod(lambda s, b, h, q, k: s + rows[q] * rows[k] + table[h, q])
    assert [t is x for t, x in zip(traced.captures, (rows, table), strict=True)] == [True, True]


def test_one_step_equals_many():
    one = specialize(trace_score_mod(lambda s, b, h, q, k: s + bias4[b, h, q, k]))
    many = specialize(trace_score_mod(lambda s, b, h, q, k: s + bias4[b][h, :][q][..., k]))
    assert str(one.graph) == str(many.graph)
    assert sum(n.op is Op.LOAD for n in many.graph.nodes) == 1


# Refusals: (mod, error, what the message says besides the line)

matrix = torch.randn(4, 4)
half_index = torch.randn(4)
python_list = [1.0, 2.0, 3.0, 4.0]
into = torch.zeros(())


def if_statement(s, b, h, q, k):
    if q >= k:  # HERE
        return s
    return -s


def while_statement(s, b, h, q, k):
    while q > 0:  # HERE
        q = q - 1
    return s


def nested_if(s, b, h, q, k):
    def inner(x):
        return x if x > 0 else -x  # HERE

    return inner(s) + 1


def loop_over_index(s, b, h, q, k):
    for i in range(q):  # HERE
        s = s + i
    return s


def in_place_of_capture(s, b, h, q, k):
    counts = matrix
    counts += 1  # HERE
    return s


def set_item_of_capture(s, b, h, q, k):
    matrix[0, 0] = 1.0  # HERE
    return s


def set_item_at_traced(s, b, h, q, k):
    matrix[q, k] = s  # HERE
    return s


def in_place_method(s, b, h, q, k):
    s.add_(1)  # HERE
    return s


def in_place_function(s, b, h, q, k):
    torch.relu_(s)  # HERE
    return s


REFUSED = {
    "if": (if_statement, ControlFlowError, "torch.where instead of if"),
    "while": (while_statement, ControlFlowError, "torch.where"),
    "if in a nested function": (nested_if, ControlFlowError, "torch.where"),
    "range": (loop_over_index, ControlFlowError, "range"),
    "and": (lambda s, b, h, q, k: s * (q > k and q < 3), ControlFlowError, "& | ~"),
    "or": (lambda s, b, h, q, k: s * (q > k or q < 3), ControlFlowError, "& | ~"),
    "not": (lambda s, b, h, q, k: s * (not q), ControlFlowError, "& | ~"),
    "chained comparison": (lambda s, b, h, q, k: s * (0 < q < 3), ControlFlowError, "& | ~"),
    "bool()": (lambda s, b, h, q, k: s * bool(q), ControlFlowError, "bool"),
    "int()": (lambda s, b, h, q, k: s * int(q), ControlFlowError, r"int\(\)"),
    "float()": (lambda s, b, h, q, k: s * float(q), ControlFlowError, "float"),
    "math.exp": (lambda s, b, h, q, k: math.exp(s), ControlFlowError, "torch.exp"),
    "math.floor": (lambda s, b, h, q, k: s + math.floor(s), ControlFlowError, "math"),
    "max()": (lambda s, b, h, q, k: s + max(q, k), ControlFlowError, "torch.where"),
    "in": (lambda s, b, h, q, k: s * (q in (1, 2)), ControlFlowError, "torch.where"),
    "list[index]": (lambda s, b, h, q, k: s + python_list[h], ControlFlowError, "list"),
    "iteration": (lambda s, b, h, q, k: sum(x for x in q), ControlFlowError, "iteration"),
    "iteration of a capture": (lambda s, b, h, q, k: sum(x for x in matrix[q]),
                               ControlFlowError, "iteration"),
    ".item()": (lambda s, b, h, q, k: s * q.item(), ControlFlowError, r"item"),
    ".item() of a capture": (lambda s, b, h, q, k: s * half_index[0].item(), ControlFlowError,
                             "outside of the mod"),
    ".tolist()": (lambda s, b, h, q, k: s * q.tolist(), ControlFlowError, "tolist"),
    "bool of a capture": (lambda s, b, h, q, k: s if half_index[0] > 9 else -s, ControlFlowError,
                          "outside of the mod"),
    "rand": (lambda s, b, h, q, k: s + torch.rand(()), TraceError, "random.*\n.*capture it"),
    "randn_like": (lambda s, b, h, q, k: s + torch.randn_like(s), TraceError, "random"),
    "dropout": (lambda s, b, h, q, k: torch.nn.functional.dropout(s, 0.1), TraceError, "random"),
    "bernoulli": (lambda s, b, h, q, k: s * torch.bernoulli(s), TraceError, "random"),
    "in place of a capture": (in_place_of_capture, TraceError, "writes.*\n.*torch.where"),
    "item assignment": (set_item_of_capture, TraceError, "writes"),
    "item assignment at a traced index": (set_item_at_traced, TraceError, "writes"),
    "in-place method": (in_place_method, TraceError, "writes"),
    "in-place function": (in_place_function, TraceError, "writes"),
    "out=": (lambda s, b, h, q, k: torch.add(s, 1, out=into), TraceError, "out="),
    "softmax": (lambda s, b, h, q, k: torch.softmax(s, 0), UnsupportedOpError, "softmax"),
    "method sum": (lambda s, b, h, q, k: s.sum(), UnsupportedOpError, "sum"),
    "matmul": (lambda s, b, h, q, k: matrix @ matrix[q], UnsupportedOpError, "matmul"),
    "sum of a row": (lambda s, b, h, q, k: s + matrix[q].sum(), UnsupportedOpError, "sum"),
    "detach": (lambda s, b, h, q, k: s.detach(), UnsupportedOpError, "detach"),
    "a row on the left": (lambda s, b, h, q, k: matrix[q] * s, TraceError,
                          "index the tensor in every dimension"),
    "comparison of a row": (lambda s, b, h, q, k: torch.where(matrix[q] > 0, s, 0), TraceError,
                            "index the tensor in every dimension"),
    "axis of a row": (lambda s, b, h, q, k: s + matrix[q].T[k], UnsupportedOpError, "outside"),
    "a row in arithmetic": (lambda s, b, h, q, k: s + matrix[q], TraceError,
                            "index the tensor in every dimension"),
    "a captured vector": (lambda s, b, h, q, k: s + half_index, TraceError,
                          "index the tensor in every dimension"),
    "too many indices": (lambda s, b, h, q, k: s + half_index[q, k], TraceError, "at most 1"),
    "float index": (lambda s, b, h, q, k: s + half_index[s], TraceError, r"\.long\(\)"),
    "bool index": (lambda s, b, h, q, k: s + half_index[q > k], TraceError, "integer"),
    "slice by traced": (lambda s, b, h, q, k: s + matrix[q, 1:], UnsupportedOpError,
                        "slice the tensor outside"),
    "None in an index": (lambda s, b, h, q, k: s + matrix[q, None], UnsupportedOpError, "scalars"),
    "index of a scalar": (lambda s, b, h, q, k: s[0], TraceError, "scalar"),
    "string": (lambda s, b, h, q, k: s + "1", TraceError, "not a scalar"),
    "float & bool": (lambda s, b, h, q, k: s & (q > k), UnsupportedOpError, "torch.where"),
    "minus a bool": (lambda s, b, h, q, k: s - (q > k), UnsupportedOpError, r"\.int\(\)"),
}


def marked_line(fn):
    """The line with HERE, or the lambda's first."""
    lines, first = inspect.getsourcelines(fn)
    return first + next((i for i, line in enumerate(lines) if "HERE" in line), 0)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_line_and_the_remedy(name):
    mod, error, says = REFUSED[name]
    before = matrix.clone()
    with pytest.raises(error, match=says) as caught:
        trace_score_mod(mod)
    assert isinstance(caught.value, FlexAttnError)
    where = str(caught.value).splitlines()
    at = next(line for line in where if "File" in line)
    assert f'"{__file__}"' in at
    assert abs(int(at.split("line ")[1].split(",")[0]) - marked_line(mod)) <= (
        0 if "HERE" in inspect.getsource(mod) else 1)
    assert any(line.strip().startswith("remedy:") for line in where) or "got:" in str(caught.value)
    assert torch.equal(matrix, before)


def test_captures_on_another_device():
    far = torch.zeros(4, device="meta")
    with pytest.raises(DeviceError, match=r"move it with \.to\('cpu'\)") as caught:
        trace_score_mod(lambda s, b, h, q, k: s + far[q])
    assert __file__ in str(caught.value)
    near = torch.tensor(2.0)  # a CPU scalar goes with every device
    assert trace_score_mod(lambda s, b, h, q, k: s * near, device="meta").captures[0] is near
    with pytest.raises(DeviceError):
        trace_score_mod(lambda s, b, h, q, k: s + rows[q], device="meta")


def test_captures_of_other_types():
    complex_values = torch.zeros(4, dtype=torch.complex64)
    with pytest.raises(DtypeError, match="complex64") as caught:
        trace_score_mod(lambda s, b, h, q, k: s + complex_values[q].real)
    assert __file__ in str(caught.value)
    with pytest.raises(DtypeError, match="sparse"):
        sparse = torch.eye(3).to_sparse()
        trace_score_mod(lambda s, b, h, q, k: s + sparse[q, k])


def test_a_mask_has_no_gradient():
    limit = torch.tensor([3.0], requires_grad=True)
    with pytest.raises(TraceError, match=r"requires grad(.|\n)*detach") as caught:
        trace_mask_mod(lambda b, h, q, k: q < limit[0])
    assert __file__ in str(caught.value)
    assert trace_mask_mod(lambda b, h, q, k: q < limit.detach()[0]).captures
    assert trace_score_mod(lambda s, b, h, q, k: s * limit[0]).captures[0] .requires_grad


def test_traced_values_print():
    seen = []
    trace_score_mod(lambda s, b, h, q, k: seen.append(f"{s} {q > k}") or s)
    assert seen == ["<traced float32 scalar> <traced bool scalar>"]


def test_partial_arguments_are_numbers():
    def scaled(factor, s, b, h, q, k):
        return s * factor

    check(partial(scaled, 0.3))
