import pytest
import torch

from flexattn.errors import ArgumentError, ShapeError
from flexattn.masks import ancestor_matrix, tree, tree_training
from tests.masks.oracle import check


def random_tree(rng, nodes):
    return [rng.randint(-1, i - 1) for i in range(nodes)]


def line(parents, node):
    """The node and its ancestors, by walking up."""
    seen = {node}
    while parents[node] >= 0:
        node = parents[node]
        seen.add(node)
    return seen


def test_tree(rng):
    nodes = rng.randint(1, 15)
    parents = [random_tree(rng, nodes) for _ in range(2)]
    prefix = [rng.randint(0, 6) for _ in range(2)]

    def attends(b, h, q, kv):
        return kv < prefix[b] or kv - prefix[b] in line(parents[b], q)

    check(tree(torch.tensor(parents), torch.tensor(prefix)), attends, nodes, nodes + 9, batch=2)
    check(tree(torch.tensor(parents[0]), prefix[0]), attends, nodes, nodes + 9)


def test_ancestor_matrix(rng):
    parents = [random_tree(rng, 12) for _ in range(2)]
    got = ancestor_matrix(torch.tensor(parents, dtype=torch.int32))
    for row, matrix in zip(parents, got.tolist(), strict=True):
        for i in range(12):
            assert {j for j in range(12) if matrix[i][j]} == line(row, i)


def test_tree_training(rng):
    text, nodes = rng.randint(1, 10), rng.randint(1, 12)
    parents = [random_tree(rng, nodes) for _ in range(2)]
    anchor = [[rng.randint(0, text - 1) for _ in range(nodes)] for _ in range(2)]

    def attends(b, h, q, kv):
        if q < text:
            return kv <= q
        if kv < text:
            return kv <= anchor[b][q - text]
        return kv - text in line(parents[b], q - text)

    mask = tree_training(text, torch.tensor(parents), torch.tensor(anchor))
    check(mask, attends, text + nodes, batch=2)
    mask = tree_training(text, torch.tensor(parents[0]), torch.tensor(anchor[0]))
    check(mask, attends, text + nodes)


def test_errors():
    with pytest.raises(ArgumentError, match="number every parent before its children"):
        tree(torch.tensor([-1, 1]))
    with pytest.raises(ArgumentError, match="node 0"):
        tree(torch.tensor([-2]))
    with pytest.raises(ShapeError, match="no node"):
        tree(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ArgumentError, match="outside of the text"):
        tree_training(4, torch.tensor([-1]), torch.tensor([4]))
    with pytest.raises(ShapeError, match="different shapes"):
        tree_training(4, torch.tensor([-1]), torch.tensor([1, 2]))
