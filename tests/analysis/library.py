"""Every mask of flexattn.masks with random arguments, valid for the sizes it is made for."""

from __future__ import annotations

import torch

from flexattn.masks import (
    and_masks,
    band,
    bidirectional_spans,
    bigbird,
    block_causal,
    block_diffusion,
    bottom_right_causal,
    causal,
    causal_document,
    chunked,
    dilated_window,
    document,
    document_prefix_lm,
    fixed_strided,
    flattened_batch,
    global_sliding_window,
    left_padding,
    morton_natten,
    natten,
    noop_mask,
    offset_causal,
    or_masks,
    padding,
    per_document,
    per_head,
    prefix_lm,
    random_blocks,
    shared_prefix,
    sink_window,
    sliding_tile,
    sliding_window,
    spatial_head,
    strided,
    temporal_head,
    tiled_natten,
    tree,
    tree_training,
    vision_cross_attention,
)


def ids(count, *shape):
    """Ids of contiguous documents."""
    return torch.randint(0, count, shape).sort(-1).values


def lengths(batch, most):
    return torch.randint(0, most, (batch,))


def canvas(width, q, k):
    """Rows of `width` cells for all positions, at least 5."""
    return max(-(-max(q, k) // width), 5)


def parents_of(rng, nodes):
    """A forest: a node hangs on one of the few before it, or is a root."""
    return torch.tensor([rng.randint(max(i - 4, -1), i - 1) for i in range(nodes)])


def random_tree(rng, q_len, kv_len):
    """(parents of q_len nodes, the cached prefix before them)."""
    return parents_of(rng, q_len), max(kv_len - q_len, 0)


def random_training_tree(rng, length):
    text = rng.randint(1, max(length - 1, 1))
    nodes = max(length - text, 1)
    return tree_training(text, parents_of(rng, nodes), torch.randint(0, text, (nodes,)))


# name, with what it is composed with: function(rng, batch, heads, q_len, kv_len) -> mask
LIBRARY = {
    "noop_mask": lambda r, b, h, q, k: noop_mask,
    "causal": lambda r, b, h, q, k: causal,
    "offset_causal": lambda r, b, h, q, k: offset_causal(torch.randint(-100, 300, (b,))),
    "bottom_right_causal": lambda r, b, h, q, k: bottom_right_causal(q, k),
    "prefix_lm": lambda r, b, h, q, k: prefix_lm(lengths(b, k)),
    "padding": lambda r, b, h, q, k: padding(lengths(b, k)),
    "padding,causal": lambda r, b, h, q, k: and_masks(causal, padding(lengths(b, k))),
    "left_padding": lambda r, b, h, q, k: and_masks(causal, left_padding(lengths(b, k))),
    "and_masks": lambda r, b, h, q, k: and_masks(causal, sliding_window(torch.randint(
        0, 300, (h,))), padding(r.randint(1, k))),
    "or_masks": lambda r, b, h, q, k: or_masks(causal, padding(r.randint(1, k))),
    "sliding_window": lambda r, b, h, q, k: sliding_window(r.randint(0, 300)),
    "sliding_window,causal": lambda r, b, h, q, k: and_masks(causal, sliding_window(r.randint(
        0, 300))),
    "band": lambda r, b, h, q, k: band(r.randint(0, 200), torch.randint(0, 200, (h,))),
    "sink_window": lambda r, b, h, q, k: and_masks(causal, sink_window(r.randint(0, 200), 4)),
    "chunked": lambda r, b, h, q, k: chunked(r.randint(1, 300)),
    "chunked,causal": lambda r, b, h, q, k: and_masks(causal, chunked(r.randint(1, 300))),
    "global_sliding_window": lambda r, b, h, q, k: global_sliding_window(
        r.randint(0, 200), torch.rand(max(q, k)) < 0.01),
    "dilated_window": lambda r, b, h, q, k: and_masks(causal, dilated_window(
        r.randint(0, 300), r.randint(1, 40))),
    "strided": lambda r, b, h, q, k: and_masks(causal, strided(r.randint(1, 300))),
    "fixed_strided": lambda r, b, h, q, k: fixed_strided(r.randint(5, 300), r.randint(0, 5)),
    "document": lambda r, b, h, q, k: document(ids(9, b, max(q, k))),
    "document,padding": lambda r, b, h, q, k: and_masks(document(ids(9, max(q, k))), padding(
        lengths(b, k))),
    "causal_document": lambda r, b, h, q, k: causal_document(ids(9, max(q, k))),
    "per_document": lambda r, b, h, q, k: per_document(prefix_lm(r.randint(0, 90)), ids(
        5, max(q, k))),
    "document_prefix_lm": lambda r, b, h, q, k: document_prefix_lm(
        ids(6, b, max(q, k)), torch.randint(0, 90, (b, 6))),
    "shared_prefix": lambda r, b, h, q, k: shared_prefix(ids(7, max(q, k))),
    "bidirectional_spans": lambda r, b, h, q, k: bidirectional_spans(ids(9, max(q, k)) - 4),
    "flattened_batch": lambda r, b, h, q, k: flattened_batch(causal, r.randint(1, 300)),
    "block_causal": lambda r, b, h, q, k: block_causal(r.randint(1, 200)),
    "block_diffusion": lambda r, b, h, q, k: block_diffusion(max(-(-max(q, k) // 2), 8),
                                                             r.randint(1, 8)),
    "natten": lambda r, b, h, q, k: natten((canvas(32, q, k), 32), (5, r.randint(1, 32))),
    "tiled_natten": lambda r, b, h, q, k: tiled_natten(
        (4 * canvas(128, q, k), 32), (5, r.randint(1, 32)), (4, 8)),
    "morton_natten": lambda r, b, h, q, k: morton_natten((canvas(32, q, k), 32), (5, 7)),
    "sliding_tile": lambda r, b, h, q, k: sliding_tile(
        (4 * canvas(64, q, k), 16), (8, 8), (4, 4), r.randint(0, 50)),
    "spatial_head": lambda r, b, h, q, k: spatial_head(r.randint(5, 90), 1.5, r.randint(0, 20)),
    "temporal_head": lambda r, b, h, q, k: temporal_head(r.randint(30, 90), 5, 1.5, r.randint(
        0, 20)),
    "vision_cross_attention": lambda r, b, h, q, k: vision_cross_attention(
        torch.randint(0, max(q, 2), (b, -(-k // 50), 2)).sort(-1).values, 50),
    "tree": lambda r, b, h, q, k: tree(*random_tree(r, q, k)),
    "tree_training": lambda r, b, h, q, k: random_training_tree(r, max(q, k)),
    "random_blocks": lambda r, b, h, q, k: random_blocks(max(q, k) + 32, 16, 2, r.randint(0, 99)),
    "bigbird": lambda r, b, h, q, k: bigbird(max(q, k) + 100, 32, 2, seed=r.randint(0, 99)),
    "per_head": lambda r, b, h, q, k: per_head(torch.randint(0, 4, (h,)), causal, band(
        r.randint(0, 90), 5), prefix_lm(9)),
}
RANDOM_BY_NATURE = {"random_blocks", "bigbird"}
NEVER_EVALUATED = {
    "noop_mask", "causal", "offset_causal", "bottom_right_causal", "prefix_lm", "padding",
    "padding,causal", "left_padding", "and_masks", "or_masks", "sliding_window",
    "sliding_window,causal", "band", "sink_window", "chunked", "chunked,causal", "document",
    "document,padding", "causal_document", "natten"}
