"""Score mods to pick from: functions (score, b, h, q_idx, kv_idx) -> score, and factories of them.

They compose with `chain` and with any mask. Tensors that a mod captures may require gradients.
"""

from flexattn.mods.graphs import (
    graphormer_edge,
    graphormer_spatial,
    shortest_path_distances,
    shortest_path_edge_types,
)
from flexattn.mods.position import (
    alibi,
    alibi_slopes,
    image_relative_bias,
    relative_bias,
    relative_position,
    sandwich,
    t5_bias,
    t5_buckets,
)
from flexattn.mods.scores import (
    activation,
    attention_sink,
    chain,
    head_bias,
    learned_bias,
    softcap,
    temperature,
    undo_softmax,
)

__all__ = [
    "activation",
    "alibi",
    "alibi_slopes",
    "attention_sink",
    "chain",
    "graphormer_edge",
    "graphormer_spatial",
    "head_bias",
    "image_relative_bias",
    "learned_bias",
    "relative_bias",
    "relative_position",
    "sandwich",
    "shortest_path_distances",
    "shortest_path_edge_types",
    "softcap",
    "t5_bias",
    "t5_buckets",
    "temperature",
    "undo_softmax",
]
