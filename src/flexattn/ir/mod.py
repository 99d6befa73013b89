"""A traced mod as kernels and analyses take it: its graph and the values it captured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexattn.ir.graph import Graph


@dataclass(frozen=True)
class Mod:
    """One graph object for one skeleton and set of constants; captured tensors; values of the
    run-time numbers."""

    graph: Graph
    captures: tuple[Tensor, ...] = ()
    numbers: tuple[bool | int | float, ...] = ()
