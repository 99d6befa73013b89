import pytest
import torch

from flexattn.errors import ArgumentError, ShapeError
from flexattn.masks import spatial_head, temporal_head, vision_cross_attention
from tests.masks.oracle import check


def test_spatial_head(rng):
    frame, prompt = rng.randint(1, 6), rng.randint(0, 4)
    frames = rng.choice([0, 1, 2, rng.random() * 3])
    sink = rng.random() < 0.5
    reach = int(frames * frame)

    def attends(b, h, q, kv):
        always = kv < prompt or (sink and kv - prompt in range(frame))
        return always or q < prompt or kv in range(q - reach + 1, q + reach)

    check(spatial_head(frame, frames, prompt, sink), attends, prompt + 5 * frame)


def test_temporal_head(rng):
    frame, num_frames, prompt = rng.randint(2, 9), rng.randint(1, 4), rng.randint(0, 4)
    frames = rng.choice([1, 2, rng.random() * 3])
    reach = int(frames * frame) // num_frames
    place = [None] * prompt + [i for _ in range(num_frames) for i in range(frame)]

    def attends(b, h, q, kv):
        if place[q] is None or place[kv] is None:
            return True
        return abs(place[q] - place[kv]) < reach

    check(temporal_head(frame, num_frames, frames, prompt), attends, len(place))


def test_vision_cross_attention(rng):
    text, images, tokens = 14, rng.randint(1, 5), rng.randint(1, 4)
    intervals = [[sorted(rng.choices(range(text + 1), k=2)) for _ in range(images)]
                 for _ in range(2)]

    def attends(b, h, q, kv):
        owner = [i for i in range(images) for _ in range(tokens)][kv]
        return q in range(*intervals[b][owner])

    check(vision_cross_attention(torch.tensor(intervals), tokens), attends, text, images * tokens,
          batch=2)
    check(vision_cross_attention(torch.tensor(intervals[0]), tokens), attends, text,
          images * tokens)


def test_errors():
    with pytest.raises(ArgumentError, match="frames is not a length"):
        spatial_head(4, -1)
    with pytest.raises(ShapeError, match="a start and an end"):
        vision_cross_attention(torch.ones(2, 3, dtype=torch.int64), 4)
