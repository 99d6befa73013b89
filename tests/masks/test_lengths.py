import pytest
import torch

from flexattn.errors import ArgumentError, DtypeError
from flexattn.masks import (
    document_starts,
    ids_to_lengths,
    ids_to_offsets,
    lengths_to_ids,
    lengths_to_offsets,
    offsets_to_ids,
    offsets_to_lengths,
    random_lengths,
)
from tests.masks.oracle import random_ids


def test_conversions_agree_with_loops(rng):
    lengths = [rng.randint(0, 5) for _ in range(rng.randint(1, 8))]
    ids = [i for i, n in enumerate(lengths) for _ in range(n)]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    dtype = rng.choice([torch.int32, torch.int64])
    for given in (lengths, torch.tensor(lengths, dtype=dtype)):
        assert lengths_to_offsets(given).tolist() == offsets
        assert lengths_to_ids(given).tolist() == ids
        assert lengths_to_ids(given, len(ids) + 2).tolist() == [*ids, -1, -1]
    assert offsets_to_lengths(torch.tensor(offsets, dtype=dtype)).tolist() == lengths
    assert offsets_to_ids(torch.tensor(offsets, dtype=dtype)).tolist() == ids


def test_ids_are_read_as_runs(rng):
    ids = random_ids(rng, 20, 4) + [99, 98, 99]
    lengths = ids_to_lengths(torch.tensor(ids)).tolist()
    assert sum(lengths) == 23 and lengths[-3:] == [1, 1, 1]
    offsets = ids_to_offsets(torch.tensor(ids)).tolist()
    starts = document_starts(torch.tensor([ids, ids[::-1]]))
    assert starts.shape == (2, 23)
    assert sorted(set(starts[0].tolist())) == offsets[:-1]
    for i, start in enumerate(starts[0].tolist()):
        assert len(set(ids[start:i + 1])) == 1
        assert start == 0 or ids[start - 1] != ids[start]


def test_random_lengths(rng):
    total = rng.randint(1, 50)
    count = rng.randint(1, total)
    lengths = random_lengths(total, count)
    assert len(lengths) == count and int(lengths.sum()) == total and int(lengths.min()) >= 1
    seeded = [random_lengths(1000, 9, torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_errors():
    with pytest.raises(ArgumentError, match="more documents than tokens"):
        random_lengths(3, 4)
    with pytest.raises(ArgumentError, match="7 tokens in 2 documents"):
        lengths_to_ids([3, 4], 6)
    with pytest.raises(ArgumentError, match="lengths is too small"):
        lengths_to_ids([3, -4])
    with pytest.raises(DtypeError, match="offsets"):
        offsets_to_lengths(torch.ones(3))
