"""Writes docs/gallery.md and its pictures: `python docs/make_gallery.py`.

What is shown stands in gallery_entries.py; the words come from the docstrings.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from gallery_entries import MASKS, MODS, Entry, Mod

from flexattn import create_block_mask, masks, mods
from flexattn.pictures import score_svg

DOCS = Path(__file__).parent
PACKED = "lengths_to_ids([9000, 1500, 4000, 12000, 6268])"
NAMES: dict[str, Any] = {"torch": torch, **vars(masks), **vars(mods)}
HEADER = """# Gallery

All masks of `flexattn.masks` and mods of `flexattn.mods`, written by `docs/make_gallery.py`.

Left: a few tokens, element by element. Right: the block mask of a realistic length. No kernel
visits an empty block, a full one needs no mask, only a partial one evaluates it.

A mask is a function `(b, h, q_idx, kv_idx) -> bool`: compose these with `and_masks` and `or_masks`,
or write your own.
"""
MODS_HEADER = """## Mods

A mod is a function `(score, b, h, q_idx, kv_idx) -> score`. Drawn is what it makes of scores of 0,
for the first head; the last three after `relative_position`.
"""


def main() -> None:
    (DOCS / "images").mkdir(exist_ok=True)
    parts = [HEADER]
    for theme, entries in MASKS.items():
        parts += [f"## {theme}\n", *(mask_section(entry) for entry in entries)]
    parts += [MODS_HEADER, *(mod_section(mod) for mod in MODS)]
    (DOCS / "gallery.md").write_text("\n".join(parts))


def mask_section(entry: Entry) -> str:
    images = [
        picture(entry.name, entry.small, entry.small_size, "elements", entry.block),
        picture(entry.name, entry.large, entry.large_size, "blocks", entry.block),
    ]
    code = "\n".join(f"{e}  # {' x '.join(f'{n:,}' for n in size)} tokens" for e, size in
                     ((entry.small, entry.small_size), (entry.large, entry.large_size)))
    return section(entry.name, code, images)


def picture(name: str, expression: str, size: tuple[int, int], level: str, block: int) -> str:
    """Draws the block mask of an expression; gives the image's path."""
    heads = 2 if name == "per_head" else None
    block_mask = create_block_mask(made(expression), None, heads, *size, BLOCK_SIZE=block)
    return saved(f"{name}_{level}", block_mask.to_svg(title=name, level=level))


def mod_section(mod: Mod) -> str:
    scores = torch.zeros(mod.size, mod.size)
    q_idx, kv_idx = torch.meshgrid(torch.arange(mod.size), torch.arange(mod.size), indexing="ij")
    where = (torch.zeros_like(q_idx), torch.zeros_like(q_idx), q_idx, kv_idx)
    drawn = made(mod.expression)(scores, *where)
    drawn = torch.where(made(mod.mask)(*where), drawn, -torch.inf)
    return section(mod.name, mod.expression, [saved(f"mod_{mod.name}",
                                                    score_svg(drawn, mod.name))])


def section(name: str, code: str, images: list[str]) -> str:
    pictures = "\n".join(f'<img src="{image}" alt="{name}" width="49%">' for image in images)
    told = [first_paragraph(name), pictures, f"```py\n{code}\n```", source(name)]
    return f"### {name}\n\n" + "\n\n".join(filter(None, told)) + "\n"


def saved(name: str, drawing: str) -> str:
    (DOCS / "images" / f"{name}.svg").write_text(drawing)
    return f"images/{name}.svg"


def made(expression: str) -> Any:
    """The value of an entry's expression."""
    return eval(expression.replace("PACKED", PACKED), dict(NAMES))


def first_paragraph(name: str) -> str:
    return " ".join((inspect.getdoc(NAMES[name]) or "").split("\n\n")[0].split())


def source(name: str) -> str:
    """The Source of a docstring on one line, its addresses as links."""
    found = re.search(r"^Source: (.*?)(?=^[A-Z]\w+:|\Z)", inspect.getdoc(NAMES[name]) or "",
                      re.MULTILINE | re.DOTALL)
    words = " ".join(found[0].split()) if found else ""
    return re.sub(r"https://[\w./-]*\w", r"<\g<0>>", words)


if __name__ == "__main__":
    main()
