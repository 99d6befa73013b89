"""Masks to pick from: nouns (`causal`); factories are nouns with arguments (`sliding_window(w)`).

Every mask is a function (b, h, q_idx, kv_idx) -> bool, True where attended, and composes with
`and_masks` and `or_masks`. Pictures of all of them: docs/gallery.md.
"""

from flexattn.masks.basic import (
    bottom_right_causal,
    causal,
    left_padding,
    offset_causal,
    padding,
    prefix_lm,
)
from flexattn.masks.compose import and_masks, noop_mask, or_masks
from flexattn.masks.diffusion import block_causal, block_diffusion
from flexattn.masks.documents import (
    bidirectional_spans,
    causal_document,
    document,
    document_prefix_lm,
    flattened_batch,
    per_document,
    shared_prefix,
)
from flexattn.masks.heads import per_head
from flexattn.masks.layouts import inverse, morton_order, tiled_order
from flexattn.masks.lengths import (
    document_starts,
    ids_to_lengths,
    ids_to_offsets,
    lengths_to_ids,
    lengths_to_offsets,
    offsets_to_ids,
    offsets_to_lengths,
    random_lengths,
)
from flexattn.masks.random_blocks import bigbird, random_blocks
from flexattn.masks.trees import ancestor_matrix, tree, tree_training
from flexattn.masks.video import spatial_head, temporal_head, vision_cross_attention
from flexattn.masks.vision import morton_natten, natten, sliding_tile, tiled_natten
from flexattn.masks.windows import (
    band,
    chunked,
    dilated_window,
    fixed_strided,
    global_sliding_window,
    sink_window,
    sliding_window,
    strided,
)

__all__ = [
    "ancestor_matrix",
    "and_masks",
    "band",
    "bidirectional_spans",
    "bigbird",
    "block_causal",
    "block_diffusion",
    "bottom_right_causal",
    "causal",
    "causal_document",
    "chunked",
    "dilated_window",
    "document",
    "document_prefix_lm",
    "document_starts",
    "fixed_strided",
    "flattened_batch",
    "global_sliding_window",
    "ids_to_lengths",
    "ids_to_offsets",
    "inverse",
    "left_padding",
    "lengths_to_ids",
    "lengths_to_offsets",
    "morton_natten",
    "morton_order",
    "natten",
    "noop_mask",
    "offset_causal",
    "offsets_to_ids",
    "offsets_to_lengths",
    "or_masks",
    "padding",
    "per_document",
    "per_head",
    "prefix_lm",
    "random_blocks",
    "random_lengths",
    "shared_prefix",
    "sink_window",
    "sliding_tile",
    "sliding_window",
    "spatial_head",
    "strided",
    "temporal_head",
    "tiled_natten",
    "tiled_order",
    "tree",
    "tree_training",
    "vision_cross_attention",
]
