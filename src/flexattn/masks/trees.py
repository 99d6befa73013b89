"""Trees of draft tokens: a token attends its ancestors and itself.

A tree is given by `parents`, an integer tensor of shape [N] or [B, N] on the device of the query:
the node before each node, -1 for a root (there may be several), always smaller than the node's own
number. Nodes are numbered in preorder once, when a mask is made (on the CPU, so tensors on a GPU
are copied to the host and back); then j is an ancestor of i, or i itself, exactly if
`enter[j] <= enter[i] < leave[j]`: two tables of N numbers in place of an N x N matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, ShapeError, message
from flexattn.masks.arguments import Index, MaskMod, by_batch, by_token, index_tensor, integer


def tree(parents: Tensor, prefix_length: int | Tensor = 0) -> MaskMod:
    """Verification of a token tree: all of the cache, then the ancestors and the token itself.

    Queries are the N nodes. Keys are `prefix_length` cached tokens, which all are attended, and
    then the nodes; keys after those are hidden: `kv_idx < p or node kv_idx - p is an ancestor of,
    or is, node q_idx`.

    prefix_length: int, or an integer tensor of shape [] or [B].

    Errors: ArgumentError if a parent does not come before its child.
    Source: SpecInfer, Miao et al. 2024, https://arxiv.org/abs/2305.09781; Medusa, Cai et al. 2024,
    https://arxiv.org/abs/2401.10774.
    Example: `tree(torch.tensor([-1, 0, 0, 1]), cache_lengths)`.
    """
    nodes = parents.shape[-1] if isinstance(parents, Tensor) and parents.dim() else 0
    enter, leave = preorder(parents)
    enter_of, leave_of = by_token("enter", enter), by_token("leave", leave)
    prefix_of = by_batch("prefix_length", prefix_length)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        cached = prefix_of(b)
        node = torch.clamp(kv_idx - cached, 0, nodes - 1)
        position = enter_of(b, q_idx)
        ancestor = (enter_of(b, node) <= position) & (position < leave_of(b, node))
        ancestor = (node <= q_idx) & ancestor  # implied, but not to the proof of block masks
        return (kv_idx < cached) | (ancestor & (kv_idx < cached + nodes))

    return mask


def tree_training(text_length: int, parents: Tensor, anchor: Tensor) -> MaskMod:
    """Text followed by draft trees that hang on it, for training a tree drafter in one pass.

    The sequence is `text_length` causal tokens, then the N nodes of all trees. A node attends the
    text up to `anchor[node]`, the ancestors and itself; text never attends nodes.

    anchor: integer tensor with the shape of `parents`, the last text position that a node sees.

    Errors: ShapeError if the shapes differ, ArgumentError as in `tree` or if an anchor lies outside
    of the text.
    Source: the tree masks of EAGLE-2, Li et al. 2024, https://arxiv.org/abs/2406.16858, for all
    positions of a text at once.
    """
    text_length = integer("text_length", text_length, at_least=1)
    anchor = index_tensor("anchor", anchor, "[N]", "[B, N]")
    enter, leave = preorder(parents)
    if anchor.shape != parents.shape:
        raise ShapeError(message("anchor and parents have different shapes",
                                 expected=str(list(parents.shape)), got=str(list(anchor.shape))))
    lowest, highest = (int(bound) for bound in anchor.aminmax())
    if lowest < 0 or highest >= text_length:
        raise ArgumentError(message("an anchor lies outside of the text",
                                    expected=f"0 to {text_length - 1}",
                                    got=f"{lowest} to {highest}"))
    text = torch.arange(text_length, device=anchor.device, dtype=torch.int32)
    outside = torch.full_like(text, -1)
    seen_of = by_token("anchor", _append(text, anchor))
    enter_of, leave_of = (by_token("parents", _append(outside, t)) for t in (enter, leave))

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        position = enter_of(b, q_idx)
        ancestor = (enter_of(b, kv_idx) <= position) & (position < leave_of(b, kv_idx))
        ancestor = (kv_idx <= q_idx) & ancestor  # implied, but not to the proof of block masks
        return (kv_idx <= seen_of(b, q_idx)) | ancestor

    return mask


def ancestor_matrix(parents: Tensor) -> Tensor:
    """bool [N, N] or [B, N, N]: whether node j is node i or one of its ancestors, at [i, j]."""
    enter, leave = preorder(parents)
    position = enter.unsqueeze(-1)
    return (enter.unsqueeze(-2) <= position) & (position < leave.unsqueeze(-2))


def preorder(parents: Tensor) -> tuple[Tensor, Tensor]:
    """(enter, leave), int32 like `parents`: each subtree is [enter, leave) in preorder."""
    parents = index_tensor("parents", parents, "[N]", "[B, N]")
    if parents.shape[-1] == 0:
        raise ShapeError(message("the tree has no node", expected="at least one",
                                 got=str(list(parents.shape))))
    rows = [_preorder(row) for row in parents.reshape(-1, parents.shape[-1]).tolist()]
    both = torch.tensor(rows, dtype=torch.int32, device=parents.device)
    enter, leave = both.unbind(1)
    return enter.reshape(parents.shape), leave.reshape(parents.shape)


def _preorder(parents: list[int]) -> tuple[list[int], list[int]]:
    """Sizes of the subtrees from the last node to the first, then the numbers in one pass."""
    nodes = len(parents)
    size = [1] * nodes
    for node in reversed(range(nodes)):
        if not -1 <= parents[node] < node:
            raise ArgumentError(message(f"node {node} comes before its parent, or has none",
                                        expected=f"-1 to {node - 1}", got=str(parents[node]),
                                        remedy="number every parent before its children"))
        if parents[node] >= 0:
            size[parents[node]] += size[node]
    free = [0] * (nodes + 1)  # next number for a child of each node; last entry: for a root
    enter = [0] * nodes
    for node, parent in enumerate(parents):
        enter[node] = free[parent]
        free[parent] += size[node]
        free[node] = enter[node] + 1
    return enter, [first + count for first, count in zip(enter, size, strict=True)]


def _append(text: Tensor, nodes: Tensor) -> Tensor:
    return torch.cat([text.expand(*nodes.shape[:-1], -1), nodes.to(text.dtype)], -1)
