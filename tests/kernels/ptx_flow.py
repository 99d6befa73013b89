"""Where the operands of tensor-core products in a PTX text come from.

In: PTX of a kernel. Out: for every product with a transposed B operand (P V), for each half of each
register of its A operand, the numbers of the accumulators (of the other products) that it is
computed from: through moves, conversions, exponentials, selections, and the factors of products,
but not through the maximum that is subtracted.
"""

from __future__ import annotations

import re
from collections import defaultdict

_ONE = ("cvt.rn.bf16", "cvt.rn.f16", "ex2", "sub", "add", "neg", "mov")


def operands(ptx: str) -> list[list[set[int]]]:
    """For each product: of register 0 the low half, then the high one, and so on."""
    flow = _Flow(ptx)
    return [[flow.sources(name, half) for name in product for half in (0, 1)]
            for product in flow.products]


class _Flow:
    def __init__(self, ptx: str) -> None:
        self.made: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
        self.accumulators: dict[str, int] = {}
        self.products: list[list[str]] = []
        for line in ptx.splitlines():
            operation, _, rest = line.strip().rstrip(";").partition(" ")
            if "\t" in operation:
                operation, rest = operation.split("\t")[0], line.strip().split("\t", 1)[1]
            names = re.findall(r"\{[^}]*\}|%\w+", rest)
            if operation.startswith("wgmma.mma_async"):
                lists = [re.findall(r"%r\d+", n) for n in names if n[0] == "{"]
                self._product(lists, len(lists) == 2 and rest.rstrip(";").endswith("1"))
            elif names and not operation.startswith(("ld", "st.", "setp", "bar", "@", "/", ".")):
                for half, name in enumerate(re.findall(r"%\w+", names[0])):
                    kind = f"half {half}" if names[0][0] == "{" else operation
                    self.made[name].append((kind, names[1:]))

    def _product(self, lists: list[list[str]], transposed: bool) -> None:
        if transposed:
            self.products.append(lists[1])
        else:
            self.accumulators.update((name, i) for i, name in enumerate(lists[0]))

    def sources(self, name: str, half: int | None, seen: frozenset = frozenset()) -> set[int]:
        """half: of a register of two 16-bit numbers."""
        if (name, half) in seen:
            return set()
        if half is None and name in self.accumulators:
            return {self.accumulators[name]}
        found: set[int] = set()
        for operation, rest in self.made[name]:
            for part, of in _parts(operation, rest, half):
                found |= self.sources(part, of, seen | {(name, half)})
        return found


def _parts(operation: str, rest: list[str], half: int | None) -> list[tuple[str, int | None]]:
    """The registers that matter to one that this operation makes."""
    if operation.startswith("half"):
        return [(rest[0], int(operation[-1]))]
    if "16x2" in operation:
        assert half is not None
        return [(rest[1 - half], None)]
    if rest and rest[0][0] == "{":
        assert half is not None
        return [(re.findall(r"%\w+", rest[0])[half], None)]
    if operation.startswith(("fma", "mul", "selp")):
        return [(name, None) for name in rest[:2] if name.startswith("%r")]
    return [(name, half) for name in rest[:1]] if operation.startswith(_ONE) else []
