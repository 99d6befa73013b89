"""Packing: documents follow each other, and nobody predicts a byte of somebody else's document."""

from __future__ import annotations

import random

import torch

from examples.demo.corpus import Corpus


def test_documents_are_numbered_in_order_and_targets_stay_inside() -> None:
    length = random.randrange(1500, 3000)
    batch = next(Corpus(batch=2, length=length, seed=random.randrange(10**6)))
    assert batch.tokens.shape == (2, length + 1) and batch.documents.shape == (2, length)
    for row in range(2):
        documents, tokens = batch.documents[row].tolist(), batch.tokens[row].tolist()
        assert documents[0] == 0 and max(documents) >= 1
        for i in range(length - 1):
            step = documents[i + 1] - documents[i]
            assert step in (0, 1)
            assert batch.targets[row, i] == (tokens[i + 1] if step == 0 else -100)
        assert batch.targets[row, -1] == -100


def test_the_text_is_the_standard_librarys() -> None:
    corpus = Corpus(batch=1, length=2000, seed=random.randrange(10**6))
    batch = next(corpus)
    first = bytes(batch.tokens[0, :-1][batch.documents[0] == 0].tolist())
    assert any(first in file for file in corpus.files)


def test_a_seed_repeats() -> None:
    seed = random.randrange(10**6)
    assert torch.equal(next(Corpus(1, 700, seed)).tokens, next(Corpus(1, 700, seed)).tokens)
    assert not torch.equal(next(Corpus(1, 700, seed)).tokens, next(Corpus(1, 700, seed + 1)).tokens)
