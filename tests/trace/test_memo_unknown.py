"""Mods that are traced at every call, since what they read cannot be told."""

import random
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode

import flexattn
from flexattn.errors import FlexAttnError
from flexattn.reference import attention
from flexattn.trace import memo
from tests.trace.remembered import CPU, SCALAR, TABLE, Holder, score


class Observed:
    @property
    def window(self):
        return 3


class Lazy:
    def __getattr__(self, name):
        return 3


STATE, SETTINGS, DRAWS = [1.0], {"scale": 2.0}, iter(range(10**9))
OBSERVED, LAZY, RELU, OWNER = Observed(), Lazy(), torch.nn.ReLU(), Holder(3, TABLE)
COUNT = 0


def sized(s):
    return s * 2


sized.size = 2


def counts(s, b, h, i, j):
    global COUNT
    COUNT += 1
    return s


def imports(s, b, h, i, j):
    import math as m

    return s * m.pi


def tries(s, b, h, i, j):
    try:
        return s * 2
    except ValueError:
        return s


def with_grad(s, b, h, i, j):
    with torch.enable_grad():
        return s * 2


def writes(s, b, h, i, j):
    STATE[0] = 2.0
    return s


def recursive(s, b, h, i, j, depth=3):
    return s if depth == 0 else recursive(s + 1, b, h, i, j, depth - 1)


def added(s, b, h, i, j):
    return OWNER + s


def identical(s, b, h, i, j, x=1000.5):
    return s if x is STATE[0] else -s


def aliased(s, b, h, i, j):
    f = sized
    return f(s) + f.size


MARKED = torch.randn(33)
MARKED.eps = 0.5

UNKNOWN = {
    "mark of a tensor": lambda s, b, h, i, j: s + MARKED[j] + MARKED.eps,
    "list": lambda s, b, h, i, j: s * STATE[0], "dict": lambda s, b, h, i, j: s * SETTINGS["scale"],
    "random": lambda s, b, h, i, j: s * random.random(),
    "iterator": lambda s, b, h, i, j: s + next(DRAWS),
    "property": lambda s, b, h, i, j: s + OBSERVED.window,
    "getattr": lambda s, b, h, i, j: s + LAZY.window,
    "builtin with state": lambda s, b, h, i, j: s + len(STATE),
    "state of torch": lambda s, b, h, i, j: s + torch.get_num_threads(),
    "address": lambda s, b, h, i, j: s + TABLE.data_ptr() % 2,
    "bound builtin": (lambda size: lambda s, b, h, i, j: s + size())(TABLE.dim),
    "print": lambda s, b, h, i, j: (print(end=""), s)[1],
    "new tensor": lambda s, b, h, i, j: s + (TABLE * 2)[j],
    "unused new tensor": lambda s, b, h, i, j: (TABLE.sum(), s)[1],
    "value in a rule": lambda s, b, h, i, j: torch.nan_to_num(s, nan=SCALAR),
    "loaded tensor": lambda s, b, h, i, j: s + TABLE[0] * TABLE[1],
    "nn.Module": lambda s, b, h, i, j: RELU(s),
    **{fn.__name__: fn for fn in (counts, imports, tries, with_grad, writes, added, identical,
                                 aliased)},
}


@pytest.mark.parametrize("mod", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown(mod, traces):
    for _ in range(3):
        memo.score_mod(mod, torch.float32, CPU)
    assert len(traces) == 3
    assert not memo._kept


def test_a_value_that_a_rule_reads_is_read_again(traces):
    unknown = torch.tensor(0.0)

    def mod(s, b, h, i, j):
        return torch.nan_to_num(s, nan=unknown)

    for value in (0.0, 2.0, 0.0):
        unknown.fill_(value)
        score(mod)


def test_recursion(traces):
    score(recursive)
    score(recursive)
    assert len(traces) == 2


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    pass


def test_modes_transforms_and_subclasses(traces):
    def mod(s, b, h, i, j):
        return s + TABLE[j]

    with Watching():
        memo.score_mod(mod, torch.float32, CPU)
    torch.vmap(lambda x: (memo.score_mod(mod, torch.float32, CPU), x)[1])(torch.ones(2))
    named = TABLE.as_subclass(Named)
    memo.score_mod(lambda s, b, h, i, j: s + named[j], torch.float32, CPU)
    assert len(traces) == 3
    assert not memo._kept


def test_errors_are_raised_every_time(traces):
    def mod(s, b, h, i, j):
        return s if s > 0 else -s

    for _ in range(2):
        with pytest.raises(FlexAttnError):
            memo.score_mod(mod, torch.float32, CPU)
    assert len(traces) == 2
    assert not memo._kept


def test_a_warning_is_given_every_time(traces):
    def mod(s, b, h, i, j):
        warnings.warn("look", UserWarning, stacklevel=1)
        return s

    for _ in range(2):
        with pytest.warns(UserWarning, match="look"):
            memo.score_mod(mod, torch.float32, CPU)
    assert len(traces) == 2


def test_a_scalar_made_of_a_captured_tensor(traces):
    factor, q = torch.tensor(2.0), torch.randn(1, 1, 8, 16)

    def mod(s, b, h, i, j):
        return s * torch.full((), factor)

    for _ in range(2):
        torch.testing.assert_close(flexattn.flex_attention(q, q, q, mod),
                                   attention(q, q, q, mod)[0])
        factor.fill_(5.0)
    assert len(traces) == 2


def test_calls_that_torch_functions_do_not_see(traces):
    def mod(table):
        return lambda s, b, h, i, j: s * table.shape[0]

    with torch._C.DisableTorchFunction():
        score(mod(torch.randn(4)))
    score(mod(torch.randn(9)))
    assert len(traces) == 2


def test_identity_at_the_end_of_a_branch(traces):
    def mod(x, y, flag):
        return lambda s, b, h, i, j: s * 2 if x is (y if flag else None) else s

    x = 10.5
    for y in (x, float("10.5")):
        score(mod(x, y, True))
    assert len(traces) == 2
