import pytest
import torch

from flexattn.errors import ArgumentError, DtypeError, ShapeError
from flexattn.masks import (
    bottom_right_causal,
    causal,
    left_padding,
    offset_causal,
    padding,
    prefix_lm,
)
from tests.masks.oracle import check, dense


def lengths(rng, low, high):
    """The same numbers as int, 0-d tensor and per-batch tensor, with what each means for b."""
    number = rng.randint(low, high)
    many = [rng.randint(low, high) for _ in range(3)]
    dtype = rng.choice([torch.int32, torch.int64, torch.int16])
    yield number, [number] * 3
    yield torch.tensor(number, dtype=dtype), [number] * 3
    yield torch.tensor(many, dtype=dtype), many


def test_causal(rng):
    check(causal, lambda b, h, q, kv: kv in range(q + 1), rng.randint(1, 40), rng.randint(1, 40))


def test_offset_causal(rng):
    for offset, at in lengths(rng, -9, 20):
        check(offset_causal(offset), lambda b, h, q, kv, at=at: kv in range(q + at[b] + 1), 9, 25,
              batch=3)


def test_bottom_right_causal_lets_the_last_query_see_every_key(rng):
    q_len, kv_len = rng.randint(1, 30), rng.randint(1, 30)
    got = dense(bottom_right_causal(q_len, kv_len), 1, 1, q_len, kv_len)[0, 0]
    for back in range(q_len):  # the query `back` before the last misses the last `back` keys
        assert int(got[-1 - back].sum()) == max(kv_len - back, 0)
        assert got[-1 - back, : max(kv_len - back, 0)].all()


def test_prefix_lm(rng):
    for length, at in lengths(rng, 0, 20):
        check(prefix_lm(length), lambda b, h, q, kv, at=at: kv in range(max(at[b], q + 1)), 18,
              batch=3)


def test_padding(rng):
    for length, at in lengths(rng, 0, 12):
        check(padding(length), lambda b, h, q, kv, at=at: kv in range(at[b]), 5, 12, batch=3)
        check(left_padding(length), lambda b, h, q, kv, at=at: kv not in range(at[b]), 5, 12,
              batch=3)


@pytest.mark.parametrize("factory", [prefix_lm, padding, left_padding])
def test_wrong_lengths(factory):
    with pytest.raises(ArgumentError, match="too small"):
        factory(-1)
    with pytest.raises(ArgumentError, match="not an integer"):
        factory(1.5)
    with pytest.raises(ArgumentError, match="not an integer"):
        factory(True)
    with pytest.raises(DtypeError, match="wrong dtype"):
        factory(torch.ones(2))
    with pytest.raises(ShapeError, match=r"\[\] or \[B\]"):
        factory(torch.ones(2, 2, dtype=torch.int32))
