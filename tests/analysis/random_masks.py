"""Random mask mods: trees of the operations that masks are written with, as users write them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

Expression = Callable[..., torch.Tensor]


class RandomMask:
    """`mask(b, h, q_idx, kv_idx) -> bool` drawn from `rng`. Works on traced scalars and on tensors;
    captured tensors are read within bounds where q_idx, kv_idx < 700, b < 3 and h < 3."""

    def __init__(self, rng: random.Random, device: str = "cpu") -> None:
        self.rng = rng
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        kind = rng.choice(["sorted", "random", "int8"])
        ids = torch.randint(-20, 40, (700,), generator=generator, device="cpu")
        ids = {"sorted": ids.sort().values, "random": ids, "int8": ids.to(torch.int8)}[kind]
        table = torch.randint(0, 5, (3, 700), generator=generator, dtype=torch.int32, device="cpu")
        flags = torch.rand(700, generator=generator, device="cpu") < 0.2
        reals = torch.randn(3, 700, generator=generator, device="cpu")
        if rng.random() < 0.3:
            reals[0, rng.randrange(700)] = float("nan")
        self.ids, self.table, self.flags, self.reals = (
            t.to(device) for t in (ids, table, flags, reals))
        self.mask = self.truth(rng.randint(1, 3))

    def __call__(self, b, h, q_idx, kv_idx):
        return self.mask(b, h, q_idx, kv_idx)

    def truth(self, depth: int) -> Expression:
        choice = self.rng.random()
        if depth == 0 or choice < 0.25:
            return self.comparison()
        x, y = self.truth(depth - 1), self.truth(depth - 1)
        if choice < 0.55:
            return lambda *i: x(*i) & y(*i)
        if choice < 0.8:
            return lambda *i: x(*i) | y(*i)
        if choice < 0.88:
            return lambda *i: ~x(*i)
        if choice < 0.94:
            return lambda *i: x(*i) ^ y(*i)
        z = self.truth(depth - 1)
        return lambda *i: torch.where(z(*i), x(*i), y(*i))

    def comparison(self) -> Expression:
        if self.rng.random() < 0.08:
            position, flags = self.position(), self.flags
            return lambda *i: flags[position(*i)]
        real = self.rng.random() < 0.2
        x, y = ((self.real(2), self.real(2)) if real else
                (self.integer(self.rng.randint(0, 3)), self.integer(self.rng.randint(0, 2))))
        op = self.rng.choice([torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne])
        return lambda *i: op(x(*i), y(*i))

    def position(self) -> Expression:
        """An index below 700."""
        of_kv = self.rng.random() < 0.5
        if self.rng.random() < 0.7:
            return lambda b, h, q, kv: kv if of_kv else q
        shift, other = self.rng.randint(0, 900), self.integer(1)
        if self.rng.random() < 0.5:
            return lambda b, h, q, kv: ((kv if of_kv else q) + shift) % 700
        return lambda *i: torch.clamp(other(*i).long(), -700, 699)

    def integer(self, depth: int) -> Expression:
        if depth == 0 or self.rng.random() < 0.15:
            return self.leaf()
        x, y, c = self.integer(depth - 1), self.integer(depth - 1), self.rng.randint(1, 130)
        shift = self.rng.randint(0, 6)
        return self.rng.choice([
            lambda *i: x(*i) + y(*i), lambda *i: x(*i) - y(*i), lambda *i: x(*i) * y(*i),
            lambda *i: x(*i) - y(*i), lambda *i: x(*i) // c, lambda *i: x(*i) % c,
            lambda *i: x(*i) // c, lambda *i: x(*i) % c, lambda *i: x(*i) - x(*i) % c,
            lambda *i: abs(x(*i)), lambda *i: -x(*i), lambda *i: torch.minimum(x(*i), y(*i)),
            lambda *i: torch.maximum(x(*i), y(*i)), lambda *i: x(*i) & y(*i),
            lambda *i: x(*i) | y(*i), lambda *i: x(*i) ^ y(*i), lambda *i: x(*i) >> shift,
            lambda *i: x(*i) << shift, lambda *i: x(*i) + c, lambda *i: x(*i) * c,
            lambda *i: torch.where(x(*i) < c, x(*i), y(*i)), lambda *i: x(*i).to(torch.int32) * c,
            lambda *i: torch.clamp(x(*i), 3, c + 3), lambda *i: (x(*i) * c).to(torch.int8).long(),
        ])

    def leaf(self) -> Expression:
        kind, c = self.rng.randrange(10), self.rng.randint(-60, 300)
        ids, table, position = self.ids, self.table, self.position()
        if kind < 3:
            return lambda b, h, q, kv: q
        if kind < 6:
            return lambda b, h, q, kv: kv
        if kind == 6:
            return lambda b, h, q, kv: b + 0 * q if c % 2 else h + 0 * q
        if kind == 7:
            return lambda b, h, q, kv: ids[position(b, h, q, kv)].long()
        if kind == 8:
            return lambda b, h, q, kv: table[b, position(b, h, q, kv)].long()
        return lambda b, h, q, kv: q * 0 + c

    def real(self, depth: int) -> Expression:
        c = self.rng.uniform(0.1, 3)
        if depth == 0:
            x, reals, position = self.integer(1), self.reals, self.position()
            return self.rng.choice([lambda *i: x(*i).float() / 50,
                                    lambda b, h, q, kv: reals[h, position(b, h, q, kv)]])
        x, y = self.real(depth - 1), self.real(depth - 1)
        return self.rng.choice([
            lambda *i: x(*i) + y(*i), lambda *i: x(*i) - y(*i), lambda *i: x(*i) * c,
            lambda *i: x(*i) * y(*i), lambda *i: x(*i) / (y(*i) + c), lambda *i: torch.tanh(x(*i)),
            lambda *i: torch.sin(x(*i)), lambda *i: torch.exp(-abs(x(*i))),
            lambda *i: torch.floor(x(*i) * 3), lambda *i: torch.sqrt(x(*i)),
            lambda *i: torch.maximum(x(*i), y(*i)), lambda *i: torch.log(abs(x(*i)) + c),
            lambda *i: torch.where(x(*i) < y(*i), x(*i), y(*i)), lambda *i: x(*i).half().float(),
            lambda *i: torch.sigmoid(x(*i)), lambda *i: x(*i) ** 2,
        ])
