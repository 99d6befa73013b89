import pytest
import torch

from flexattn.errors import ArgumentError
from flexattn.masks import band, causal, chunked, per_head
from tests.masks.oracle import dense


def test_per_head(rng):
    masks = [causal, band(2, 1), chunked(4)]
    choice = [rng.randint(-1, 3) for _ in range(5)]
    got = dense(per_head(torch.tensor(choice), *masks), 2, 5, 13, 11)
    for h, number in enumerate(choice):
        if number in range(3):
            assert torch.equal(got[:, h:h + 1], dense(masks[number], 2, 1, 13, 11))
        else:
            assert not got[:, h].any()


def test_no_mask():
    with pytest.raises(ArgumentError, match="at least one"):
        per_head(torch.zeros(2, dtype=torch.int64))
