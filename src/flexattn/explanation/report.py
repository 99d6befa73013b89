"""What explain says: plain frozen data, its text and its dict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModText:
    """A mod: where it is written, its graph, its gradient's graph (score mods), the code made of
    it. captures: types and shapes of captured tensors; numbers: Python numbers that are arguments
    of the kernel, since they have been seen to vary (the others are constants of the graph)."""

    name: str
    where: str
    graph: str
    gradient: str
    captures: tuple[str, ...]
    numbers: tuple[str, ...]
    code: str


@dataclass(frozen=True)
class MaskPicture:
    """A block mask: how many blocks are full (no element needs the mask), partial or empty (never
    visited), in how many runs they are stored, percent of elements in empty blocks, a picture."""

    shape: tuple[int, ...]
    block_size: tuple[int, int]
    full: int
    partial: int
    empty: int
    runs: int
    sparsity: float
    picture: str


@dataclass(frozen=True)
class Kernel:
    """A kernel that serves the call: its role ("forward", "backward"), its name and file, its tile
    and whatever else decides how it runs."""

    role: str
    name: str
    file: str
    tile: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """All of it. `str()` is for people, `to_dict()` for programs."""

    inputs: dict[str, str]
    target: str
    language: str
    score: ModText | None
    mask: ModText | None
    picture: MaskPicture | None
    kernels: tuple[Kernel, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sections(self) -> Iterator[tuple[str, str]]:
        """(title, text) of everything there is to say, in order."""
        yield "inputs", _table(self.inputs)
        for role, mod in (("score_mod", self.score), ("mask_mod", self.mask)):
            if mod is not None:
                yield from self._mod(role, mod)
        if self.picture is not None:
            yield "block mask", _mask_text(self.picture)
        for kernel in self.kernels:
            facts = {"tile": " ".join(f"{k}={v}" for k, v in kernel.tile.items()),
                     "written in": kernel.file, **kernel.facts}
            yield f"{kernel.role} kernel: {kernel.name}", _table(facts)

    def _mod(self, role: str, mod: ModText) -> Iterator[tuple[str, str]]:
        known = {f"capture{i}": text for i, text in enumerate(mod.captures)}
        known |= {f"number{i}": text for i, text in enumerate(mod.numbers)}
        head = "\n".join(filter(None, [mod.where, _table(known), mod.graph]))
        yield f"{role}: {mod.name}", head
        if mod.gradient:
            yield f"gradient of {role}", mod.gradient
        if mod.code:
            yield f"{role} in {self.language}", mod.code

    def __str__(self) -> str:
        return "\n\n".join(f"== {title} ==\n{text}" for title, text in self.sections())


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items() if text)


def _mask_text(mask: MaskPicture) -> str:
    return (f"shape {list(mask.shape)}, blocks of {mask.block_size[0]} x {mask.block_size[1]}, "
            f"{mask.sparsity:g}% of the elements never visited\n"
            f"{mask.full} full, {mask.partial} partial, {mask.empty} empty blocks "
            f"in {mask.runs} runs\n{mask.picture}")
