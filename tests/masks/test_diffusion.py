import pytest

from flexattn.errors import ArgumentError
from flexattn.masks import block_causal, block_diffusion
from tests.masks.oracle import check


def test_block_causal(rng):
    block = rng.randint(1, 7)
    ends = {q: next(e for e in range(block, 99, block) if q < e) for q in range(30)}
    check(block_causal(block), lambda b, h, q, kv: kv in range(ends[q]), 30)


def test_block_diffusion(rng):
    length, block = rng.randint(5, 16), rng.randint(1, 5)
    blocks = [range(start, min(start + block, length)) for start in range(0, length, block)]
    allowed = set()
    for i, queries in enumerate(blocks):
        for q in queries:
            allowed |= {(q, kv) for kv in queries}  # noised: itself
            for past in blocks[:i]:
                allowed |= {(q, length + kv) for kv in past}  # noised: the clean past
            for past in blocks[:i + 1]:
                allowed |= {(length + q, length + kv) for kv in past}  # clean: block causal
    check(block_diffusion(length, block), lambda b, h, q, kv: (q, kv) in allowed, 2 * length)


def test_block_longer_than_the_text():
    with pytest.raises(ArgumentError, match="at most length = 8"):
        block_diffusion(8, 9)
