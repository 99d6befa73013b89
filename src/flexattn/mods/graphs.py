"""Graphormer: biases from the shortest paths between the nodes of a graph.

Tokens are nodes. Graphs are integer tensors of shape [N, N] or, one per sequence, [B, N, N]. A
learned table has a trailing dimension H, the query heads. The path functions take O(N^3) time and
memory; graphs in a batch are padded to one N with nodes that have no edges.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
from torch import Tensor

from flexattn.errors import ShapeError, message
from flexattn.mods.arguments import Index, ScoreMod, count, table


def graphormer_spatial(bias: Tensor, distance: Tensor) -> ScoreMod:
    """A learned bias per distance of two nodes: `score + bias[distance[b, q_idx, kv_idx], h]`.

    bias: floating point [entries, H]. distance: integer [N, N] or [B, N, N], at least 0; distances
    of `entries` and more, and so unreachable nodes (see `shortest_path_distances`), share the last.

    Source: Ying et al. 2021, https://arxiv.org/abs/2106.05234, section 3.1.2.
    """
    bias = table("bias", bias, "[entries, H]")
    distance = table("distance", distance, "[N, N]", "[B, N, N]", floating=False)
    batched, last = distance.dim() == 3, len(bias) - 1

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        hops = distance[b, q_idx, kv_idx] if batched else distance[q_idx, kv_idx]
        return score + bias[torch.clamp(hops, 0, last), h]

    return mod


def graphormer_edge(bias: Tensor, path: Tensor) -> ScoreMod:
    """The mean of a learned bias over the edges of the shortest path.

    `score + sum_l bias[l, path[b, q_idx, kv_idx, l], h] / (number of edges)`; 0 without a path.

    bias: floating point [L, edge types, H]: it depends on the place l in the path and on the type.
    path: integer [N, N, L] or [B, N, N, L], types of the edges in order, -1 after the last
    (`shortest_path_edge_types`). With edges of several features, sum several of these mods.

    Errors: ShapeError if the two L differ.
    Source: Ying et al. 2021, https://arxiv.org/abs/2106.05234, section 3.1.3.
    """
    bias = table("bias", bias, "[L, edge types, H]")
    path = table("path", path, "[N, N, L]", "[B, N, N, L]", floating=False)
    if len(bias) != path.shape[-1]:
        raise ShapeError(message("bias and path are of different length", got=str(len(bias)),
                                 expected=f"{path.shape[-1]} places in bias"))
    batched, steps, last = path.dim() == 4, len(bias), bias.shape[1] - 1

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        total, edges = [], []
        for step in range(steps):
            kind = path[b, q_idx, kv_idx, step] if batched else path[q_idx, kv_idx, step]
            there = kind >= 0
            total.append(torch.where(there, bias[step, torch.clamp(kind, 0, last), h], 0.0))
            edges.append(torch.where(there, 1, 0))
        return score + reduce(add, total) / torch.clamp(reduce(add, edges), 1, steps)

    return mod


def shortest_path_distances(adjacency: Tensor, max_distance: int) -> Tensor:
    """int32 like adjacency: edges from i to j; max_distance + 1 if there are more, or no path.

    adjacency: bool or integer [N, N] or [B, N, N]; True (not 0) where an edge leads from i to j.
    """
    adjacency = table("adjacency", adjacency, "[N, N]", "[B, N, N]", floating=False)
    max_distance = count("max_distance", max_distance)
    edges = (adjacency != 0).float()
    reached = torch.eye(edges.shape[-1], device=edges.device).expand_as(edges)
    distance = torch.full(edges.shape, max_distance + 1, dtype=torch.int32, device=edges.device)
    distance[reached > 0] = 0
    for hops in range(1, max_distance + 1):
        reached = ((reached + reached @ edges) > 0).float()
        distance[(reached > 0) & (distance > hops)] = hops
    return distance


def shortest_path_edge_types(edge_type: Tensor, max_length: int) -> Tensor:
    """int32 [..., N, N, max_length]: the types of the edges of a shortest path, then -1.

    edge_type: integer [N, N] or [B, N, N], -1 where there is no edge. Of several shortest paths,
    the one whose nodes have the smallest numbers. Pairs that are farther apart than max_length, or
    have no path, are all -1.
    """
    edge_type = table("edge_type", edge_type, "[N, N]", "[B, N, N]", floating=False)
    if edge_type.dim() == 3:
        return torch.stack([shortest_path_edge_types(one, max_length) for one in edge_type])
    nodes = edge_type.shape[0]
    distance = shortest_path_distances(edge_type >= 0, max_length)
    target = torch.arange(nodes, device=edge_type.device)
    here = target[:, None].expand(nodes, nodes)  # where the path from i to j has come
    path = torch.full((nodes, nodes, max_length), -1, dtype=torch.int32, device=edge_type.device)
    for step in range(max_length):
        left = distance[here, target]
        closer = (edge_type[here] >= 0) & (left[..., None] - 1 == distance.T)
        walking = (left > 0) & (left <= max_length)
        following = torch.where(walking, closer.int().argmax(-1), here)
        path[..., step] = torch.where(walking, edge_type[here, following], -1)
        here = following
    return path
