import pytest
import torch

from flexattn.errors import DtypeError, ShapeError
from flexattn.masks import (
    and_masks,
    bidirectional_spans,
    causal,
    causal_document,
    document,
    document_prefix_lm,
    flattened_batch,
    lengths_to_ids,
    per_document,
    prefix_lm,
    shared_prefix,
    sliding_window,
)
from tests.masks.oracle import check, dense, random_ids

LENGTH = 24


def runs(ids):
    """For every position, (start, end) of its run of equal ids."""
    out = []
    for i, name in enumerate(ids):
        start = i
        while start > 0 and ids[start - 1] == name:
            start -= 1
        end = i
        while end < len(ids) and ids[end] == name:
            end += 1
        out.append((start, end))
    return out


def test_document(rng):
    ids = [random_ids(rng, LENGTH, rng.randint(1, 6)) for _ in range(2)]
    check(document(torch.tensor(ids)), lambda b, h, q, kv: ids[b][q] == ids[b][kv], LENGTH, batch=2)
    check(document(torch.tensor(ids[0])), lambda b, h, q, kv: ids[0][q] == ids[0][kv], LENGTH,
          batch=2)
    keys = random_ids(rng, 13, 4)
    check(document(torch.tensor(ids[1], dtype=torch.int32), torch.tensor(keys)),
          lambda b, h, q, kv: ids[1][q] == keys[kv], LENGTH, 13)


def test_causal_document(rng):
    ids = random_ids(rng, LENGTH, 4)
    where = runs(ids)
    check(causal_document(torch.tensor(ids)), lambda b, h, q, kv: kv in range(where[q][0], q + 1),
          LENGTH)


def test_per_document_is_the_inner_mask_of_each_document(rng):
    ids = [random_ids(rng, LENGTH, rng.randint(1, 5)) for _ in range(2)]
    inner = rng.choice([causal, prefix_lm(3), and_masks(causal, sliding_window(2))])
    got = dense(per_document(inner, torch.tensor(ids)), 2, 1, LENGTH, LENGTH)
    expected = torch.zeros_like(got)
    for b in range(2):
        for start, end in set(runs(ids[b])):
            expected[b, 0, start:end, start:end] = dense(inner, 1, 1, end - start, end - start)
    assert torch.equal(got, expected)


def test_document_prefix_lm(rng):
    count = rng.randint(1, 4)
    lengths = [[rng.randint(1, 6) for _ in range(count - 1)] for _ in range(2)]
    lengths = [[*row, LENGTH - sum(row)] for row in lengths]
    prefixes = [[rng.randint(0, 7) for _ in range(count)] for _ in range(2)]
    ids = torch.stack([lengths_to_ids(row) for row in lengths])
    where = [runs(row.tolist()) for row in ids]

    def attends(b, h, q, kv):
        start, end = where[b][q]
        seen = max(start + prefixes[b][ids[b, q]], q + 1)
        return kv in range(start, min(end, seen))

    check(document_prefix_lm(ids, torch.tensor(prefixes)), attends, LENGTH, batch=2)
    check(document_prefix_lm(ids[0], torch.tensor(prefixes[0])), attends, LENGTH)


def test_shared_prefix(rng):
    prompt = rng.randint(0, 6)
    branches = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    ids = lengths_to_ids([prompt, *branches]).tolist()

    def attends(b, h, q, kv):
        return kv in range(prompt) and kv <= q or kv in range(runs(ids)[q][0], q + 1)

    check(shared_prefix(torch.tensor(ids)), attends, len(ids))


def test_shared_prefix_of_groups_is_the_mask_of_each_group(rng):
    groups = [[rng.randint(1, 4) for _ in range(rng.randint(1, 4))] for _ in range(3)]
    branch = torch.cat([lengths_to_ids(lengths) for lengths in groups])
    group = lengths_to_ids([sum(lengths) for lengths in groups])
    got = dense(shared_prefix(branch, group), 1, 1, len(branch), len(branch))[0, 0]
    ones = [dense(shared_prefix(lengths_to_ids(g)), 1, 1, sum(g), sum(g))[0, 0] for g in groups]
    assert torch.equal(got, torch.block_diag(*ones).bool())


def test_bidirectional_spans(rng):
    spans = [rng.choice([-1, -1, i // 5]) for i in range(LENGTH)]
    images = [{i for i, s in enumerate(spans) if s == name} for name in set(spans) - {-1}]
    check(bidirectional_spans(torch.tensor(spans)),
          lambda b, h, q, kv: kv <= q or any({q, kv} <= image for image in images), LENGTH)


def test_flattened_batch(rng):
    q_len, kv_len, batch = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 4)
    prefixes = torch.tensor([rng.randint(0, 6) for _ in range(batch)])
    inner = prefix_lm(prefixes)
    got = dense(flattened_batch(inner, q_len, kv_len), 1, 1, batch * q_len, batch * kv_len)[0, 0]
    rows = dense(inner, batch, 1, q_len, kv_len)[:, 0]
    assert torch.equal(got, torch.block_diag(*rows).bool())


def test_errors():
    with pytest.raises(DtypeError, match="document_id"):
        document(torch.ones(3))
    with pytest.raises(ShapeError, match=r"\[S\] or \[B, S\]"):
        causal_document(torch.ones(1, 1, 3, dtype=torch.int32))
    with pytest.raises(ShapeError, match="ids per batch entry"):
        document_prefix_lm(lengths_to_ids([3, 4]), torch.ones(2, 2, dtype=torch.int64))
