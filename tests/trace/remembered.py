"""A mod by the memo and traced now, which have to be the same; and what mods of tests read."""

import torch

from flexattn.trace import memo, specialize, trace_score_mod

CPU = torch.device("cpu")
TABLE, GRID, SCALAR = torch.randn(33), torch.randn(4, 8), torch.tensor(2.0)


def score(fn, dtype=torch.float32):
    """The memo's mod, which has to be the one that tracing gives now."""
    got, want = memo.score_mod(fn, dtype, CPU), specialize(trace_score_mod(fn, dtype, CPU))
    assert got.graph is want.graph
    assert repr(got.numbers) == repr(want.numbers)
    assert list(map(id, got.captures)) == list(map(id, want.captures))
    return got


class Holder:
    scale = 2.0

    def __init__(self, window, table):
        self.window, self.table = window, table

    def mod(self, s, b, h, i, j):
        return torch.where(i - j < self.window, s * self.scale, self.table[h])

    def __call__(self, s, b, h, i, j):
        return s * self.scale + self.table[h]

    def __add__(self, other):
        return other + self.window


def times(factor):
    return lambda s, b, h, i, j: s * factor
