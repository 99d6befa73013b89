"""What the gallery shows: expressions over flexattn.masks and flexattn.mods.

In an expression, PACKED stands for `lengths_to_ids([9000, 1500, 4000, 12000, 6268])`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A mask, with (q_len, kv_len): for a few tokens, and for as many as a model has."""

    name: str
    small: str
    small_size: tuple[int, int]
    large: str
    large_size: tuple[int, int]
    block: int = 128


@dataclass(frozen=True)
class Mod:
    """A mod for `size` tokens, drawn where `mask` attends, on scores of 0."""

    name: str
    expression: str
    size: int
    mask: str = "noop_mask"


def square(name: str, small: str, n: int, large: str, m: int, block: int = 128) -> Entry:
    return Entry(name, small, (n, n), large, (m, m), block)


MASKS: dict[str, list[Entry]] = {
    "Causal, prefixes and padding": [
        square("causal", "causal", 16, "causal", 1 << 20),
        Entry("bottom_right_causal", "bottom_right_causal(6, 16)", (6, 16),
              "bottom_right_causal(8192, 32768)", (8192, 32768)),
        Entry("offset_causal", "offset_causal(9)", (6, 16),
              "offset_causal(torch.tensor([20000]))", (4096, 32768)),
        square("prefix_lm", "prefix_lm(6)", 16, "prefix_lm(2000)", 8192),
        square("padding", "and_masks(causal, padding(11))", 16,
               "and_masks(causal, padding(torch.tensor([5500])))", 8192),
        square("left_padding", "and_masks(causal, left_padding(5))", 16,
               "and_masks(causal, left_padding(torch.tensor([2700])))", 8192),
    ],
    "Windows": [
        square("sliding_window", "and_masks(causal, sliding_window(4))", 16,
               "and_masks(causal, sliding_window(4096))", 32768),
        square("band", "band(3, 2)", 16, "band(1024, 512)", 8192),
        square("sink_window", "and_masks(causal, sink_window(4, 2))", 16,
               "and_masks(causal, sink_window(1020, 4))", 8192),
        square("global_sliding_window", "global_sliding_window(2, 2)", 16,
               "global_sliding_window(512, 256)", 8192),
        square("dilated_window", "and_masks(causal, dilated_window(9, 3))", 16,
               "and_masks(causal, dilated_window(2048, 4))", 8192),
        square("chunked", "and_masks(causal, chunked(5))", 16,
               "and_masks(causal, chunked(8192))", 65536),
        square("strided", "and_masks(causal, strided(4))", 16,
               "and_masks(causal, strided(512))", 8192),
        square("fixed_strided", "and_masks(causal, fixed_strided(4))", 16,
               "and_masks(causal, fixed_strided(512, 16))", 8192),
    ],
    "Documents": [
        square("document", "document(lengths_to_ids([5, 3, 8]))", 16, "document(PACKED)", 32768),
        square("causal_document", "causal_document(lengths_to_ids([5, 3, 8]))", 16,
               "causal_document(PACKED)", 32768),
        square("per_document", "per_document(prefix_lm(2), lengths_to_ids([5, 3, 8]))", 16,
               "per_document(and_masks(causal, sliding_window(1024)), PACKED)", 32768),
        square("document_prefix_lm",
               "document_prefix_lm(lengths_to_ids([6, 10]), torch.tensor([3, 4]))", 16,
               "document_prefix_lm(PACKED, torch.tensor([4000, 500, 500, 6000, 200]))", 32768),
        square("shared_prefix", "shared_prefix(lengths_to_ids([4, 4, 3, 5]))", 16,
               "shared_prefix(lengths_to_ids([4096, 900, 1100, 700, 1396]))", 8192),
        square("bidirectional_spans",
               "bidirectional_spans(lengths_to_ids([4, 5], 16))", 16,
               "bidirectional_spans(lengths_to_ids([2048, 1024, 1600], 8192))", 8192),
        square("flattened_batch", "flattened_batch(causal, 4)", 16,
               "flattened_batch(causal, 1000)", 8000),
    ],
    "Images and videos": [
        square("natten", "natten((5, 5), (3, 3))", 25, "natten((128, 128), (13, 13))", 16384),
        square("tiled_natten", "tiled_natten((4, 6), (3, 3), (2, 3))", 24,
               "tiled_natten((128, 128), (13, 13), (8, 16))", 16384),
        square("morton_natten", "morton_natten((5, 5), (3, 3))", 25,
               "morton_natten((128, 128), (13, 13))", 16384),
        square("sliding_tile", "sliding_tile((4, 6), (2, 6), (2, 2), 2)", 26,
               "sliding_tile((12, 48, 48), (12, 24, 24), (4, 8, 8), 256)", 27904, 256),
        square("spatial_head", "spatial_head(4, 1.5, 2)", 22, "spatial_head(1350, 2, 226)", 17776),
        square("temporal_head", "temporal_head(6, 3, 1.5, 2)", 20,
               "temporal_head(1350, 13, 2, 226)", 17776),
        Entry("vision_cross_attention",
              "vision_cross_attention(torch.tensor([[0, 5], [5, 8], [8, 16]]), 4)", (16, 12),
              "vision_cross_attention(torch.tensor([[0, 900], [900, 1400], [1400, 4096]]), 1024)",
              (4096, 3072)),
    ],
    "Trees, diffusion, random blocks and heads": [
        Entry("tree", "tree(torch.tensor([-1, 0, 0, 1, 1, 2, 3, 6]), 6)", (8, 14),
              "tree((torch.arange(255) - 1) // 2, 512)", (255, 767), 16),
        square("tree_training", "tree_training(8, torch.tensor([-1, 0, 0, 1, -1, 4, 4, 5]), "
               "torch.tensor([2] * 4 + [5] * 4))", 16,
               "tree_training(1024, torch.tensor([-1, 0, 0, 1] * 1024) + torch.arange(4096) // 4 "
               "* torch.tensor([0, 4, 4, 4] * 1024), torch.arange(4096) // 4)", 5120, 64),
        square("block_causal", "block_causal(4)", 16, "block_causal(512)", 8192),
        square("block_diffusion", "block_diffusion(8, 2)", 16, "block_diffusion(4096, 256)", 8192),
        square("random_blocks", "random_blocks(16, 2, 2)", 16, "random_blocks(8192, 128, 4)", 8192),
        square("bigbird", "bigbird(16, 2, 1)", 16, "bigbird(8192, 128)", 8192),
        square("per_head", "per_head(torch.tensor([1, 0]), causal, band(2, 2))", 16,
               "per_head(torch.tensor([1, 0]), causal, band(1024, 1024))", 8192),
    ],
}

MODS = [
    Mod("relative_position", "relative_position", 16),
    Mod("alibi", "alibi(alibi_slopes(8))", 16, "causal"),
    Mod("relative_bias", "relative_bias(torch.linspace(-3, 3, 9).sin().view(-1, 1))", 16),
    Mod("image_relative_bias", "image_relative_bias(-torch.cartesian_prod(torch.arange(-3, 4), "
        "torch.arange(-3, 4)).float().norm(dim=1, keepdim=True), 4, 4)", 16),
    Mod("t5_bias", "t5_bias(torch.arange(16.0).cos().view(-1, 1), 20)", 24),
    Mod("sandwich", "sandwich(8, 32)", 24, "causal"),
    Mod("graphormer_spatial", "graphormer_spatial(-torch.arange(9.0).view(-1, 1), "
        "shortest_path_distances(torch.eye(16).roll(1, 1).int(), 8))", 16),
    Mod("graphormer_edge", "graphormer_edge(torch.tensor([[[1.0], [-1.0]]] * 3), "
        "shortest_path_edge_types((torch.eye(16).roll(1, 1) * torch.arange(1, 17) % 3).int() - 1,"
        " 3))", 16),
    Mod("learned_bias", "learned_bias(torch.randn(16, 16, generator=torch.Generator()"
        ".manual_seed(0)))", 16),
    Mod("softcap", "chain(relative_position, softcap(5.0))", 16),
    Mod("temperature", "chain(relative_position, temperature(2.0))", 16),
    Mod("activation", "chain(relative_position, activation(torch.relu))", 16),
]
