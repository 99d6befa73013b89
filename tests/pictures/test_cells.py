import random

import pytest
import torch

from flexattn.pictures import block_cells, element_cells
from tests.pictures.runs import EMPTY, FULL, PARTIAL, causal_runs, kinds_of, runs_of


@pytest.mark.parametrize("round_", range(8))
def test_shares_are_those_of_the_elements(seed, round_):
    rng = random.Random(seed + round_)
    block_q, block_kv = rng.randint(1, 7), rng.randint(1, 7)
    q_len, kv_len = rng.randint(1, 60), rng.randint(1, 60)
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    tables = [[[[rng.choice([EMPTY, PARTIAL, FULL]) for _ in range(columns)] for _ in range(rows)]
               for _ in range(3)] for _ in range(2)]
    b, h = rng.randrange(2), rng.randrange(3)
    limit = (rng.randint(1, 12), rng.randint(1, 12))
    cells = block_cells(runs_of(tables, block_q, block_kv), q_len, kv_len, b, h, limit)
    kind = [[tables[b][h][q // block_q][kv // block_kv] for kv in range(kv_len)]
            for q in range(q_len)]
    shape = cells.full.shape
    assert shape[0] <= limit[0] and shape[1] <= limit[1]
    assert (len(cells.row_edges), len(cells.col_edges)) == (shape[0] + 1, shape[1] + 1)
    for i in range(shape[0]):
        for j in range(shape[1]):
            inside = [kind[q][kv] for q in range(*cells.row_edges[i:i + 2])
                      for kv in range(*cells.col_edges[j:j + 2])]
            assert cells.full[i, j].item() == pytest.approx(inside.count(FULL) / len(inside))
            assert cells.partial[i, j].item() == pytest.approx(inside.count(PARTIAL) / len(inside))
    touched = sum(k != EMPTY for row in kind for k in row)
    assert cells.sparsity == pytest.approx(100 * (1 - touched / (q_len * kv_len)))


def test_a_mask_for_all_heads_is_shown_for_any():
    runs = runs_of([[[[FULL, EMPTY], [PARTIAL, FULL]]]], 4, 4)
    one, other = block_cells(runs, 8, 8), block_cells(runs, 8, 8, batch=3, head=5)
    assert torch.equal(one.full, other.full)
    assert one.full.tolist() == [[1, 0], [0, 1]] and one.partial.tolist() == [[0, 0], [1, 0]]


def test_a_million_tokens_are_a_small_grid():
    cells = block_cells(causal_runs(1 << 20, 128), 1 << 20, 1 << 20)
    assert cells.grouped and max(cells.full.shape) <= 96
    assert cells.sparsity == pytest.approx(100 * (8191 / 2) / 8192)
    assert (cells.full.tril(-1) == torch.ones_like(cells.full).tril(-1)).all()
    assert not (cells.full + cells.partial).triu(1).any()


def test_elements(seed):
    attended = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) < 0.4
    cells = element_cells(attended)
    assert torch.equal(cells.full.bool(), attended) and cells.blocks is None
    assert cells.attended == pytest.approx(int(attended.sum()) / 35)
    assert (cells.q_len, cells.kv_len) == (5, 7)


def test_blocks_of_elements_agree():
    attended = torch.ones(10, 10).tril().bool()
    cells = block_cells(runs_of([[kinds_of(attended, 4, 4)]], 4, 4), 10, 10)
    assert cells.full.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert cells.partial.tolist() == torch.eye(3).tolist()
    assert cells.row_edges == [0, 4, 8, 10]


def test_no_queries():
    cells = block_cells(runs_of([[[]]], 4, 4), 0, 10)
    assert cells.full.shape == (0, 3)
