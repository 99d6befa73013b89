from collections import deque

import pytest
import torch

from flexattn.errors import DtypeError, ShapeError
from flexattn.mods import (
    graphormer_edge,
    graphormer_spatial,
    shortest_path_distances,
    shortest_path_edge_types,
)
from tests.mods.oracle import check


def random_graph(rng, nodes, types=3):
    """Directed, sparse enough that some nodes are far apart or unreachable; -1: no edge."""
    return [[rng.randrange(types) if rng.random() < 1.6 / nodes else -1 for _ in range(nodes)]
            for _ in range(nodes)]


def breadth_first(edges, source):
    """Number of edges from source to each node that can be reached."""
    found, queue = {source: 0}, deque([source])
    while queue:
        here = queue.popleft()
        for there, kind in enumerate(edges[here]):
            if kind >= 0 and there not in found:
                found[there] = found[here] + 1
                queue.append(there)
    return found


def first_path(edges, source, target):
    """Types along the shortest path with the smallest node numbers, or None."""
    path, here = [], source
    while here != target:
        left = breadth_first(edges, here).get(target)
        if left is None:
            return None
        here_next = next(n for n, kind in enumerate(edges[here]) if kind >= 0
                         and breadth_first(edges, n).get(target) == left - 1)
        path.append(edges[here][here_next])
        here = here_next
    return path


def test_distances(rng):
    graphs = [random_graph(rng, 9) for _ in range(2)]
    limit = rng.randint(1, 6)
    got = shortest_path_distances(torch.tensor(graphs) >= 0, limit).tolist()
    for graph, one in zip(graphs, got, strict=True):
        for i in range(9):
            found = breadth_first(graph, i)
            assert one[i] == [min(found.get(j, limit + 1), limit + 1) for j in range(9)]
    assert shortest_path_distances(torch.tensor(graphs[0]) >= 0, limit).tolist() == got[0]


def test_edge_types(rng):
    graphs = [random_graph(rng, 8) for _ in range(2)]
    limit = rng.randint(1, 5)
    got = shortest_path_edge_types(torch.tensor(graphs), limit).tolist()
    for graph, one in zip(graphs, got, strict=True):
        for i in range(8):
            for j in range(8):
                path = first_path(graph, i, j)
                path = path if path is not None and len(path) <= limit else []
                assert one[i][j] == path + [-1] * (limit - len(path))


def test_spatial(rng):
    graphs = torch.tensor([random_graph(rng, 7) for _ in range(2)])
    distance = shortest_path_distances(graphs >= 0, 4)
    bias = torch.randn(rng.randint(2, 6), 3)

    def expected(s, b, h, q, kv):
        return s + bias[min(int(distance[b, q, kv]), len(bias) - 1), h].item()

    check(graphormer_spatial(bias, distance), expected, (2, 3, 7, 7))
    check(graphormer_spatial(bias, distance[0]),
          lambda s, b, h, q, kv: expected(s, 0, h, q, kv), (2, 3, 7, 7))


def test_edge(rng):
    graphs = [random_graph(rng, 6) for _ in range(2)]
    bias = torch.randn(4, 3, 2)

    def expected(s, b, h, q, kv):
        path = first_path(graphs[b], q, kv)
        if not path or len(path) > 4:
            return s
        return s + sum(bias[i, kind, h].item() for i, kind in enumerate(path)) / len(path)

    path = shortest_path_edge_types(torch.tensor(graphs), 4)
    check(graphormer_edge(bias, path), expected, (2, 2, 6, 6))
    check(graphormer_edge(bias, path[1]), lambda s, b, h, q, kv: expected(s, 1, h, q, kv),
          (1, 2, 6, 6))


def test_errors():
    with pytest.raises(ShapeError, match="different length"):
        graphormer_edge(torch.ones(3, 2, 1), torch.zeros(4, 4, 2, dtype=torch.int32))
    with pytest.raises(DtypeError, match="an integer tensor"):
        graphormer_spatial(torch.ones(3, 2), torch.ones(4, 4))
