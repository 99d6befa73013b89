import pytest
import torch

from flexattn.errors import ArgumentError, DtypeError, ShapeError
from flexattn.masks import (
    and_masks,
    band,
    causal,
    chunked,
    dilated_window,
    fixed_strided,
    global_sliding_window,
    sink_window,
    sliding_window,
    strided,
)
from tests.masks.oracle import check

LENGTH = 33


def test_sliding_window(rng):
    window = rng.randint(0, 20)
    check(sliding_window(window), lambda b, h, q, kv: kv >= q - window, LENGTH, LENGTH + 5)
    check(and_masks(causal, sliding_window(window)),
          lambda b, h, q, kv: kv in range(q - window, q + 1), LENGTH)


def test_sliding_window_per_head(rng):
    windows = [rng.randint(0, 12) for _ in range(3)]
    check(sliding_window(torch.tensor(windows)), lambda b, h, q, kv: kv >= q - windows[h], 15,
          heads=3)


def test_band(rng):
    left, right = rng.randint(0, 15), rng.randint(0, 15)
    check(band(left, right), lambda b, h, q, kv: kv in range(q - left, q + right + 1), LENGTH)


def test_dilated_window(rng):
    window, dilation = rng.randint(0, 20), rng.randint(1, 6)
    check(and_masks(causal, dilated_window(window, dilation)),
          lambda b, h, q, kv: kv in range(q, max(q - window, 0) - 1, -dilation), LENGTH)


def test_strided(rng):
    stride = rng.randint(1, 9)
    check(and_masks(causal, strided(stride)),
          lambda b, h, q, kv: kv in {*range(q, q - stride, -1), *range(q, -1, -stride)}, LENGTH)


def test_fixed_strided(rng):
    stride = rng.randint(1, 9)
    summary = rng.randint(0, stride)
    blocks = [list(range(start, start + stride)) for start in range(0, LENGTH, stride)]
    summaries = {kv for block in blocks for kv in block[stride - summary:]}
    own = {q: block for block in blocks for q in block}
    check(fixed_strided(stride, summary), lambda b, h, q, kv: kv in own[q] or kv in summaries,
          LENGTH)


def test_chunked(rng):
    chunk = rng.randint(1, 12)
    chunks = [set(range(start, start + chunk)) for start in range(0, LENGTH, chunk)]
    check(chunked(chunk), lambda b, h, q, kv: any({q, kv} <= c for c in chunks), LENGTH)


def test_sink_window(rng):
    window, sinks = rng.randint(0, 9), rng.randint(0, 5)
    check(and_masks(causal, sink_window(window, sinks)),
          lambda b, h, q, kv: kv <= q and (kv in range(sinks) or kv in range(q - window, q + 1)),
          LENGTH)


def test_global_sliding_window(rng):
    window, first = rng.randint(0, 6), rng.randint(0, 4)
    check(global_sliding_window(window, first),
          lambda b, h, q, kv: abs(q - kv) <= window or min(q, kv) < first, LENGTH)
    tokens = [set(rng.sample(range(20), 3)) for _ in range(2)]
    table = torch.tensor([[i in chosen for i in range(20)] for chosen in tokens])
    check(global_sliding_window(window, table),
          lambda b, h, q, kv: abs(q - kv) <= window or bool({q, kv} & tokens[b]), 20, batch=2)
    check(global_sliding_window(window, table[1]),
          lambda b, h, q, kv: abs(q - kv) <= window or bool({q, kv} & tokens[1]), 20)


def test_errors():
    with pytest.raises(ArgumentError, match="at most stride = 4"):
        fixed_strided(4, 5)
    with pytest.raises(ArgumentError, match="dilation is too small"):
        dilated_window(4, 0)
    with pytest.raises(ArgumentError, match="chunk is too small"):
        chunked(0)
    with pytest.raises(DtypeError, match="torch.bool"):
        global_sliding_window(1, torch.ones(4, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="global_tokens"):
        global_sliding_window(1, torch.ones(1, 1, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"\[\] or \[H\]"):
        sliding_window(torch.ones(1, 1, dtype=torch.int32))
