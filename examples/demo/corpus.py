"""Real documents, packed: excerpts of the Python standard library's own source files.

Out: batches of bytes, several documents to a sequence, and for each byte the document it is of.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Batch:
    """tokens [batch, length + 1]; documents [batch, length], counted from 0 in each sequence.

    A byte predicts the next one of its own document: `targets` is -100 at a document's end.
    """

    tokens: Tensor
    documents: Tensor

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        last = torch.ones_like(self.documents, dtype=torch.bool)
        last[:, :-1] = self.documents[:, 1:] != self.documents[:, :-1]
        return self.tokens[:, 1:].masked_fill(last, -100)


def source_files() -> list[bytes]:
    """The standard library's files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.parts))
    texts = [p.read_bytes() for p in paths]
    return [text for text in texts if len(text) > 256]


class Corpus:
    """An endless supply of batches, the same for the same seed and Python."""

    def __init__(self, batch: int, length: int, seed: int = 0) -> None:
        self.batch, self.length = batch, length
        self.files = source_files()
        self._random = random.Random(seed)

    def __next__(self) -> Batch:
        packed = [self._sequence() for _ in range(self.batch)]
        return Batch(torch.stack([tokens for tokens, _ in packed]),
                     torch.stack([documents for _, documents in packed]))

    def _sequence(self) -> tuple[Tensor, Tensor]:
        text = b""
        documents: list[int] = []
        while len(text) <= self.length:
            excerpt = self._excerpt()
            documents += [len(documents) and documents[-1] + 1] * len(excerpt)
            text += excerpt
        tokens = torch.frombuffer(bytearray(text[:self.length + 1]), dtype=torch.uint8).long()
        return tokens, torch.tensor(documents[:self.length])

    def _excerpt(self) -> bytes:
        """Whole lines of one file, about 200 to 900 bytes."""
        file = self._random.choice(self.files)
        start = file.rfind(b"\n", 0, self._random.randrange(len(file))) + 1
        end = file.find(b"\n", start + self._random.randrange(200, 900))
        return file[start:end + 1 if end >= 0 else len(file)]
