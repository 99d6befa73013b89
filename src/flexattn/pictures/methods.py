"""The picture methods of BlockMask: text, SVG and matplotlib of one batch entry and head."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.ir.evaluate import evaluate
from flexattn.ir.mod import Mod
from flexattn.pictures.cells import Cells, Runs, block_cells, element_cells
from flexattn.pictures.plot import plot
from flexattn.pictures.svg import svg
from flexattn.pictures.text import text

_ELEMENTS = (64, 64)  # drawn element by element up to this size


class Pictures:
    """Mixed into BlockMask, whose `shape`, `rows`, `traced` and `mask_mod` it reads.

    Every picture is of batch entry `batch` and query head `head`. `level` is "elements", "blocks"
    or "auto": elements for masks of at most 64 x 64 tokens, blocks (grouped, where they are many)
    for all others. Errors: ArgumentError for an index out of range or another level.
    """

    shape: Any
    mask_mod: Callable | None
    rows: Callable[[], Runs]
    traced: Callable[[torch.device], Mod | None]

    def plot(self, batch: int = 0, head: int = 0, *, level: str = "auto", title: str | None = None,
             ax: Any = None) -> Any:
        """Draws with matplotlib on `ax`, or on a new figure; gives the Axes back.

        Errors: MatplotlibMissingError where matplotlib is not installed.
        Example: `mask.plot(head=3).figure.savefig("mask.png")`.
        """
        return plot(self._cells(batch, head, level), title or self._title(batch, head), ax)

    def to_svg(self, batch: int = 0, head: int = 0, *, level: str = "auto",
               title: str | None = None, side: int = 320) -> str:
        """An <svg> element; the longer side of the grid is `side` pixels."""
        return svg(self._cells(batch, head, level), title or self._title(batch, head), side)

    def _repr_svg_(self) -> str:
        """What shows images alone."""
        return self.to_svg()

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture, and the mask in words."""
        return (f"<figure style='margin: 0'>{self.to_svg()}"
                f"<figcaption><code>{escape(repr(self))}</code></figcaption></figure>")

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4, *,
                  level: str = "auto") -> str:
        """The mask as text, for the first `limit` pairs of batch entry and head.

        grid_size: most rows and columns of a grid (two characters each); -1 for as many as there
        are blocks. Elements are shown where they fit the grid.
        """
        most = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        rows = self.rows()
        pairs = product(range(rows.batch), range(rows.heads))
        grids = [text(self._cells(b, h, level, most), self._title(b, h))
                 for b, h in islice(pairs, limit)]
        left = rows.batch * rows.heads - len(grids)
        return "\n\n".join([*grids, *([f"... and {left} more"] if left else [])])

    def _cells(self, batch: int, head: int, level: str, most: tuple[int, int] | None = None
               ) -> Cells:
        for name, index, size in (("batch", batch, self.shape[0]), ("head", head, self.shape[1])):
            if index < 0 or (size > 1 and index >= size):
                raise ArgumentError(message(f"{name} is not in the mask", got=str(index),
                                            expected=f"0 to {size - 1}"))
        if level not in ("auto", "elements", "blocks"):
            raise ArgumentError(message("no such level of detail", got=repr(level),
                                        expected='"auto", "elements" or "blocks"'))
        q_len, kv_len = self.shape[2:]
        fits = all(n <= limit for n, limit in zip((q_len, kv_len), most or _ELEMENTS, strict=True))
        if level == "elements" or (level == "auto" and fits):
            return element_cells(self._elements(batch, head, q_len, kv_len))
        blocks = tuple(n if n > 0 else max(q_len, kv_len, 1) for n in most or (96, 96))
        return block_cells(self.rows(), q_len, kv_len, batch, head, (blocks[0], blocks[1]))

    def _elements(self, batch: int, head: int, q_len: int, kv_len: int) -> Tensor:
        """bool [q_len, kv_len]: what a kernel attends, in full blocks without the mask_mod."""
        runs = self.rows()
        blocks = block_cells(runs, q_len, kv_len, batch, head, (max(q_len, 1), max(kv_len, 1)))
        heights, widths = (torch.tensor(e).diff() for e in (blocks.row_edges, blocks.col_edges))
        full, partial = (t.bool().repeat_interleave(heights, 0).repeat_interleave(widths, 1)
                         for t in (blocks.full, blocks.partial))
        mod = self.traced(runs.offsets.device)
        if mod is None:
            return full | partial
        device = runs.offsets.device
        inputs = {"b": torch.tensor(batch, device=device), "h": torch.tensor(head, device=device),
                  "q_idx": torch.arange(q_len, device=device)[:, None],
                  "kv_idx": torch.arange(kv_len, device=device)}
        masked = evaluate(mod.graph, inputs, mod.captures, mod.numbers)["mask"]
        return full | (partial & masked.expand(q_len, kv_len).cpu())

    def _title(self, batch: int, head: int) -> str:
        """The mask_mod's name, and which picture of several it is."""
        name = getattr(self.mask_mod, "__name__", "block mask")
        if name == "mask":  # made by a factory, whose name says more
            name = self.mask_mod.__qualname__.split(".")[0]  # type: ignore[union-attr]
        rows = self.rows()
        parts = [f"{word} {index}" for word, index, size in
                 (("batch", batch, rows.batch), ("head", head, rows.heads)) if size > 1]
        return ", ".join(["block mask" if name == "<lambda>" else name, *parts])
