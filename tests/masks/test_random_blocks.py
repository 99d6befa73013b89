import pytest
import torch

from flexattn.errors import ArgumentError
from flexattn.masks import bigbird, random_blocks
from tests.masks.oracle import check, dense


def test_random_blocks_draws_whole_different_blocks(rng):
    block, length = rng.randint(1, 6), rng.randint(7, 50)
    blocks = -(-length // block)
    count = rng.randint(1, blocks)
    seed = rng.getrandbits(30)
    got = dense(random_blocks(length, block, count, seed), 1, 1, length, length)[0, 0]
    for q in range(length):
        row = got[q].split(block)
        assert all(bool(part.all()) == bool(part.any()) for part in row)
        assert sum(bool(part.any()) for part in row) == count
        assert torch.equal(got[q], got[q // block * block])
    again = dense(random_blocks(length, block, count, seed), 1, 1, length, length)[0, 0]
    assert torch.equal(got, again)


def test_every_block_is_drawn_equally_often():
    blocks, count = 20, 5
    total = sum(dense(random_blocks(blocks, 1, count, seed), 1, 1, blocks, blocks)[0, 0].int()
                for seed in range(150))
    share = total.float().mean(0) / 150  # 3000 draws per key block, standard deviation 0.008
    assert (share - count / blocks).abs().max() < 0.045


def test_bigbird(rng):
    block, length, seed = rng.randint(1, 5), rng.randint(10, 40), rng.getrandbits(30)
    near, first = rng.randint(0, 2), rng.randint(0, 2)
    drawn = dense(random_blocks(length, block, 2, seed), 1, 1, length, length)[0, 0]
    block_of = [i for i in range(length) for _ in range(block)]

    def attends(b, h, q, kv):
        i, j = block_of[q], block_of[kv]
        return abs(i - j) <= near or min(i, j) < first or drawn[q, kv]

    check(bigbird(length, block, 2, near, first, seed), attends, length)


def test_more_random_blocks_than_blocks():
    with pytest.raises(ArgumentError, match="at most 4"):
        random_blocks(16, 4, 5)
