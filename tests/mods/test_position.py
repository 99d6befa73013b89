import math

import pytest
import torch

from flexattn.errors import ArgumentError, DtypeError, ShapeError
from flexattn.mods import (
    alibi,
    alibi_slopes,
    image_relative_bias,
    relative_bias,
    relative_position,
    sandwich,
    t5_bias,
    t5_buckets,
)
from tests.mods.oracle import check, dense


def test_relative_position(rng):
    check(relative_position, lambda s, b, h, q, kv: s + q - kv, (1, 2, 9, 11))


def test_alibi(rng):
    slopes = torch.rand(3)
    check(alibi(slopes), lambda s, b, h, q, kv: s - slopes[h].item() * (q - kv), (1, 3, 9, 11))


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    assert alibi_slopes(12).tolist()[:8] == alibi_slopes(8).tolist()
    assert alibi_slopes(12).tolist()[8:] == pytest.approx([2 ** (-i / 2) for i in (1, 3, 5, 7)])
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_relative_bias(rng):
    reach = rng.randint(0, 7)
    bias = torch.randn(2 * reach + 1, 2)
    distances = list(range(-reach, reach + 1))

    def entry(q, kv):
        return distances.index(max(-reach, min(kv - q, reach)))

    check(relative_bias(bias), lambda s, b, h, q, kv: s + bias[entry(q, kv), h].item(),
          (1, 2, 9, 11))
    check(relative_bias(bias[:, 0]), lambda s, b, h, q, kv: s + bias[entry(q, kv), 0].item(),
          (1, 2, 9, 11))


def test_image_relative_bias(rng):
    height, width = rng.randint(2, 3), rng.randint(1, 5)
    offsets = [(dy, dx) for dy in range(1 - height, height) for dx in range(1 - width, width)]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    bias = torch.randn(len(offsets), 2)

    def expected(s, b, h, q, kv):
        offset = (pixels[q][0] - pixels[kv][0], pixels[q][1] - pixels[kv][1])
        return s + bias[offsets.index(offset), h].item()

    check(image_relative_bias(bias, height, width), expected, (1, 2, len(pixels), len(pixels)))


def possible_buckets(distance, num_buckets, max_distance, bidirectional):
    """The bucket by the definition in real numbers; both neighbours where it is on the edge."""
    per_side = num_buckets // 2 if bidirectional else num_buckets
    side = per_side if bidirectional and distance > 0 else 0
    far = abs(distance) if bidirectional else max(-distance, 0)
    exact = per_side // 2
    if far < exact:
        return {side + far}
    power = math.log(far / exact) / math.log(max_distance / exact) * (per_side - exact)
    return {side + min(exact + math.floor(power + e), per_side - 1) for e in (-1e-4, 1e-4)}


def test_t5_buckets(rng):
    bidirectional = rng.random() < 0.5
    num_buckets, max_distance = rng.choice([8, 16, 32, 10]), rng.randint(17, 200)
    buckets = t5_buckets(num_buckets, max_distance, bidirectional).tolist()
    for bucket, distance in zip(buckets, range(-max_distance, max_distance + 1), strict=True):
        assert bucket in possible_buckets(distance, num_buckets, max_distance, bidirectional)


def test_t5_buckets_of_the_published_models():
    """32 buckets, 128, bidirectional: the distances where a new bucket begins."""
    ahead = t5_buckets(32, 128)[128:].tolist()
    starts = [d for d in range(1, 129) if ahead[d] != ahead[d - 1]]
    assert starts == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    assert ahead[1:9] == [17, 18, 19, 20, 21, 22, 23, 24] and ahead[128] == 31


def test_t5_bias(rng):
    bidirectional, reach = rng.random() < 0.5, rng.randint(5, 20)
    bias = torch.randn(8, 2)
    bucket = t5_buckets(8, reach, bidirectional).tolist()

    def expected(s, b, h, q, kv):
        return s + bias[bucket[max(-reach, min(kv - q, reach)) + reach], h].item()

    check(t5_bias(bias, reach, bidirectional), expected, (1, 2, 30, 28))


def test_sandwich_is_the_product_of_sinusoidal_embeddings(rng):
    heads, dim, length = rng.randint(1, 5), 2 * rng.randint(1, 40), 20
    angles = [[p / 10000 ** (2 * i / dim) for i in range(dim // 2)] for p in range(length)]
    embedding = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]

    def expected(s, b, h, q, kv):
        product = sum(x * y for x, y in zip(embedding[q], embedding[kv], strict=True))
        return s + product / (8 * (h + 1) / heads)

    check(sandwich(heads, length, dim), expected, (1, heads, length, length))


def test_sandwich_beyond_its_table_keeps_the_last_value():
    got = dense(sandwich(1, 3, 4), torch.zeros(1, 1, 9, 9))[0, 0]
    assert torch.equal(got[8, :6], got[3, 0].expand(6))
    assert not torch.equal(got[8, 6], got[3, 0])


def test_gradients_reach_the_tables(rng):
    bias = torch.randn(8, 2, requires_grad=True)
    weight = torch.randn(1, 2, 12, 12)
    (dense(t5_bias(bias, 20), torch.zeros(1, 2, 12, 12)) * weight).sum().backward()
    bucket = t5_buckets(8, 20).tolist()
    expected = torch.zeros(8, 2)
    for q in range(12):
        for kv in range(12):
            expected[bucket[kv - q + 20]] += weight[0, :, q, kv]
    torch.testing.assert_close(bias.grad, expected)


def test_errors():
    with pytest.raises(DtypeError, match="a floating point tensor of shape"):
        alibi(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="slopes is not a tensor"):
        alibi(8)
    with pytest.raises(ShapeError, match="odd number of entries"):
        relative_bias(torch.ones(4))
    with pytest.raises(ShapeError, match=r"\[21, H\]"):
        image_relative_bias(torch.ones(20, 2), 2, 4)
    with pytest.raises(ArgumentError, match="no such buckets"):
        t5_buckets(32, 8)
    with pytest.raises(ArgumentError, match="dim is odd"):
        sandwich(4, 10, 7)
    with pytest.raises(ArgumentError, match="num_heads is not a count"):
        alibi_slopes(0)
