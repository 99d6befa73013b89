"""Writes the pictures of docs/concepts.md: `python docs/make_pictures.py`."""

from __future__ import annotations

from pathlib import Path

from flexattn import create_block_mask
from flexattn.masks import causal, causal_document, lengths_to_ids

IMAGES = Path(__file__).parent / "images"
DOCUMENTS = [300, 700, 128, 520, 400]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    pictures = {"causal": causal, "documents": causal_document(lengths_to_ids(DOCUMENTS))}
    for name, mask in pictures.items():
        drawn = create_block_mask(mask, None, None, 2048, 2048).to_svg(title=name)
        (IMAGES / f"concepts_{name}.svg").write_text(drawn)


if __name__ == "__main__":
    main()
