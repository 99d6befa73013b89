"""Where the gradients of captured tensors are added up, so that every run gives the same bits.

In: the reads of a score mod's captured tensors, and how a backward kernel shares out its work.
Out: one tensor for all, where no two units of work add to the same element, or a copy for each lane
that units are dealt to, summed at the end; and the tables that kernels find them by.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexattn.ir.graph import Node
from flexattn.ir.ops import Op
from flexattn.trace import Mod


def own_dimensions(loads: Sequence[Node]) -> dict[int, frozenset[str]]:
    """Capture -> names of the inputs that are by themselves the index of one dimension in all of
    its reads: work that differs in such an input adds to different elements."""
    found: dict[int, frozenset[str]] = {}
    for slot in {n.attr for n in loads}:
        reads = [n.args for n in loads if n.attr == slot]
        found[slot] = frozenset(
            columns[0].attr for columns in zip(*reads, strict=True)
            if columns[0].op is Op.INPUT and len(set(columns)) == 1)
    return found


class CapturedGradients:
    """The totals of one backward call. `shared`: the captures that need no copies."""

    def __init__(self, mod: Mod | None, slots: Sequence[int], shared: frozenset[int], lanes: int,
                 dtype: torch.dtype) -> None:
        self._mod = mod
        self._totals: dict[int, Tensor] = {}
        self.copies = lanes if set(slots) - shared else 1
        captures = () if mod is None else mod.captures
        for slot in slots:
            kind = torch.float64 if captures[slot].dtype is torch.float64 else torch.float32
            copies = 1 if slot in shared else lanes
            self._totals[slot] = torch.zeros(copies, *captures[slot].shape, dtype=kind)
        self._nothing = torch.zeros(8, dtype=torch.float64)
        words = [self._words(captures, lane) for lane in range(self.copies)]
        self.words = len(words[0])
        flat = [word for lane in words for word in lane]
        self._table: Any = (ctypes.c_int64 * max(len(flat), 1))(*flat)
        self.address = ctypes.addressof(self._table)

    def _words(self, captures: Sequence[Tensor], lane: int) -> list[int]:
        """Address, sizes and strides of each capture's total, as lane `lane` adds to it."""
        words: list[int] = []
        for slot, capture in enumerate(captures):
            total = self._totals.get(slot)
            if total is None or not total.numel():
                words += [self._nothing.data_ptr(), *[0] * (2 * capture.dim())]
            else:
                one = total[lane % total.shape[0]]
                words += [one.data_ptr(), *one.shape, *one.stride()]
        return words

    def results(self) -> tuple[Tensor | None, ...]:
        """One entry for each capture that requires grad, None for the others."""
        if self._mod is None:
            return ()
        return tuple(self._result(slot, t) for slot, t in enumerate(self._mod.captures))

    def _result(self, slot: int, capture: Tensor) -> Tensor | None:
        if slot not in self._totals:
            return torch.zeros_like(capture) if capture.requires_grad else None
        total = self._totals[slot]
        return (total[0] if total.shape[0] == 1 else total.sum(0)).to(capture.dtype)
