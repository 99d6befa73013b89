"""What code reads, by its bytecode, in the Python that runs the tests."""

import math

import pytest
import torch

from flexattn.trace.reads import CAPTURED, GLOBAL, SELF, reads_of


def made(x, mods, flag):
    """Functions, by what they read; None for those that cannot be told."""

    def plain(s):
        return s * x + torch.nn.functional.softplus(s)

    def loop(s):
        for mod in mods:
            s = mod(s)
        return [s * n for n in range(3)]

    def generator(s):
        return sum(mod(s) + x for mod in mods)

    def branch(s):
        return torch.clamp(s, max=x) if flag is None else -math.inf

    def nested(s):
        def inner(y):
            count = y + x

            def innermost():
                nonlocal count
                count = count + math.pi
                return count

            return innermost()

        return inner(inner(s))

    def index(s, i):
        return x[(*flag, i)] + x[..., :] + x.window.size

    def rebinds(s):
        nonlocal x
        x = x + 1
        return s

    def tries(s):
        try:
            return s
        except ValueError:
            return x

    def compares(s):
        return s if x is mods else flag

    def writes(s):
        x[0] = s
        return s

    def marks(s):
        x.mark = s
        return s

    def address(s):
        return s.data_ptr()

    def formats(s):
        return f"{s}"

    mod, one, two = (CAPTURED, "mods", ()), (CAPTURED, "x", ()), (CAPTURED, "flag", ())
    return {
        plain: {one, (GLOBAL, "torch", ("nn", "functional", "softplus"))},
        loop: {mod, (GLOBAL, "range", ())}, generator: {mod, one, (GLOBAL, "sum", ())},
        branch: {one, two, (GLOBAL, "torch", ("clamp",)), (GLOBAL, "math", ("inf",))},
        nested: {one, (GLOBAL, "math", ("pi",))},
        index: {one, two, (CAPTURED, "x", ("window", "size"))},
        **dict.fromkeys((rebinds, tries, compares, writes, marks, address, formats)),
    }


READS = made(1, (), None)


@pytest.mark.parametrize("fn", READS, ids=lambda fn: fn.__name__)
def test_reads(fn):
    found = reads_of(fn.__code__)
    assert (found and set(found.all)) == READS[fn]
    assert reads_of(fn.__code__) is found


class Owner:
    def takes(self, s):
        return s * self.scale + self.inner.bias

    def rebinds(self, s):
        self = s
        return self.scale

    def captures(self, s):
        return (lambda: self.scale)()

    def no_argument():
        return 0


def test_methods():
    assert set(reads_of(Owner.takes.__code__, True).all) == {
        (SELF, "", ("scale",)), (SELF, "", ("inner", "bias"))}
    for method in (Owner.rebinds, Owner.captures, Owner.no_argument):
        assert reads_of(method.__code__, True) is None
    assert reads_of(Owner.takes.__code__) is None
