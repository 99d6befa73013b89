"""The grammar is whole: families, promotion of names, and one meaning for every operation."""

import pytest
import torch

from flexattn.ir import ops
from flexattn.ir.ops import Op, dtype_name

FAMILIES = (ops.LEAVES, {Op.CAST, Op.WHERE}, ops.FLOAT_UNARY, ops.UNARY - ops.FLOAT_UNARY,
            ops.ARITHMETIC, ops.BITWISE, ops.COMPARISON)


def test_every_operation_has_one_family():
    for op in Op:
        assert sum(op in family for family in FAMILIES) == 1, op
    assert ops.COMMUTATIVE < ops.BINARY and set().union(*FAMILIES[4:]) == ops.BINARY


def test_values_are_stable():
    """Keys of compiled code hold them."""
    assert (Op.INPUT, Op.CAST, Op.ADD, Op.WHERE) == (1, 5, 40, 70)
    assert len({int(op) for op in Op}) == len(Op)


@pytest.mark.parametrize("dtype", sorted(ops.DTYPES, key=str))
def test_names_of_dtypes(dtype):
    assert getattr(torch, dtype_name(dtype)) is dtype


def test_dtypes_have_one_kind():
    assert ops.INTEGERS | ops.FLOATS | {torch.bool} == ops.DTYPES
    assert not ops.INTEGERS & ops.FLOATS
    assert all(d.is_floating_point == (d in ops.FLOATS) for d in ops.DTYPES)
