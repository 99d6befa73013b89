"""Biases that depend on the distance of query and key.

Learned tables are [entries, H] floating point, H the number of query heads: the weight of an
`nn.Embedding(entries, H)`, on the device of the query. Those with requires_grad get gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, ShapeError, message
from flexattn.mods.arguments import Index, ScoreMod, count, table


def relative_position(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
    """`score + (q_idx - kv_idx)`: the smallest positional mod. Itself a mod, no factory."""
    return score + (q_idx - kv_idx)


def alibi(slopes: Tensor) -> ScoreMod:
    """Attention with linear biases: `score + slopes[h] * (kv_idx - q_idx)`.

    slopes: floating point [H], usually `alibi_slopes(H)`.

    Source: Press et al. 2022, https://arxiv.org/abs/2108.12409.
    Example: `flex_attention(q, k, v, alibi(alibi_slopes(16, "cuda")), causal_block_mask)`.
    """
    slopes = table("slopes", slopes, "[H]")

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    return mod


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """float32 [num_heads]: 2^(-8 (h + 1) / H) if H is a power of two.

    Otherwise, as the authors do, the slopes for the power of two n below H, and then every second
    one, from the first, of those for 2 n.
    """
    num_heads = count("num_heads", num_heads)
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [-8 * (h + 1) / power for h in range(power)]
    exponents += [-4 * (2 * h + 1) / power for h in range(num_heads - power)]
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float32, device=device)


def relative_bias(bias: Tensor) -> ScoreMod:
    """A learned bias per clipped distance: `score + bias[clamp(kv_idx - q_idx, -R, R) + R, h]`.

    bias: floating point [2 R + 1, H]; or [2 R + 1], the same for all heads.

    Errors: ShapeError for an even number of entries.
    Source: Shaw et al. 2018, https://arxiv.org/abs/1803.02155, as a bias of the score.
    """
    bias = table("bias", bias, "[2 R + 1]", "[2 R + 1, H]")
    if len(bias) % 2 == 0:
        raise ShapeError(message("bias has no entry in the middle for distance 0",
                                 expected="an odd number of entries", got=str(len(bias))))
    reach, per_head = len(bias) // 2, bias.dim() == 2

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        entry = torch.clamp(kv_idx - q_idx, -reach, reach) + reach
        return score + (bias[entry, h] if per_head else bias[entry])

    return mod


def image_relative_bias(bias: Tensor, height: int, width: int) -> ScoreMod:
    """A learned bias per offset of two pixels of a row-major window (Swin Transformer).

    `score + bias[(y_q - y_kv + height - 1) * (2 width - 1) + x_q - x_kv + width - 1, h]`,
    y = idx // width, x = idx % width.

    bias: floating point [(2 height - 1) (2 width - 1), H].

    Errors: ShapeError for another number of entries.
    Source: Liu et al. 2021, https://arxiv.org/abs/2103.14030.
    """
    height, width = count("height", height), count("width", width)
    bias = table("bias", bias, "[offsets, H]")
    across, entries = 2 * width - 1, (2 * height - 1) * (2 * width - 1)
    if len(bias) != entries:
        raise ShapeError(message("bias does not have one entry per offset",
                                 expected=f"[{entries}, H]", got=str(list(bias.shape))))

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        down = q_idx // width - kv_idx // width + height - 1
        right = q_idx % width - kv_idx % width + width - 1
        return score + bias[down * across + right, h]

    return mod


def t5_bias(bias: Tensor, max_distance: int = 128, bidirectional: bool = True) -> ScoreMod:
    """T5's bias per bucket of distances: `score + bias[bucket(kv_idx - q_idx), h]`.

    bias: floating point [num_buckets, H], T5's `relative_attention_bias.weight`. Use scale = 1 for
    T5's weights. The buckets are those of `t5_buckets`.

    Source: Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1.
    """
    bias = table("bias", bias, "[num_buckets, H]")
    reach = count("max_distance", max_distance)
    bucket = t5_buckets(len(bias), reach, bidirectional).to(bias.device)

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        distance = torch.clamp(kv_idx - q_idx, -reach, reach)
        return score + bias[bucket[distance + reach], h]

    return mod


def t5_buckets(num_buckets: int, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """int32 [2 max_distance + 1]: the bucket of each distance kv_idx - q_idx, from -max_distance.

    Half of the buckets of a direction hold one distance each, the others grow in powers up to
    max_distance; what is farther shares the last. With `bidirectional`, keys behind and ahead have
    half of the buckets each; without, keys ahead share bucket 0 with the token itself. Boundaries
    are computed in float32, as they were for the published weights.

    Errors: ArgumentError if there are too few buckets for the scheme, or a distance for each.
    """
    per_side = count("num_buckets", num_buckets) // (2 if bidirectional else 1)
    exact = per_side // 2
    if exact < 1 or max_distance <= exact:
        raise ArgumentError(message("no such buckets", got=f"{num_buckets} up to {max_distance}",
                                    expected="2 per direction, half of them < max_distance"))
    distance = torch.arange(max_distance + 1)
    power = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    grown = (exact + (power * (per_side - exact)).long()).clamp(max=per_side - 1)
    behind = torch.where(distance < exact, distance, grown)
    ahead = behind + per_side if bidirectional else torch.zeros_like(behind)
    return torch.cat([behind.flip(0), ahead[1:]]).to(torch.int32)


def sandwich(num_heads: int, max_distance: int, dim: int = 128,
             device: torch.device | str | None = None) -> ScoreMod:
    """The product of sinusoidal position embeddings as a bias, falling with the distance.

    `score + H / (8 (h + 1)) * sum_i cos((q_idx - kv_idx) / 10000^(2 i / dim))`, i in [0, dim / 2).

    The sums are tabulated up to max_distance (float32 [max_distance + 1] on `device`, that of the
    query): give the length of the longest sequence; beyond it the last value is used.

    Errors: ArgumentError if dim is odd.
    Source: Chi et al. 2023, https://arxiv.org/abs/2212.10356.
    """
    heads, dim = count("num_heads", num_heads), count("dim", dim)
    if dim % 2:
        raise ArgumentError(message("dim is odd", expected="pairs of sine and cosine",
                                    got=str(dim)))
    reach = count("max_distance", max_distance)
    wave = torch.full((reach + 1,), 0.0, dtype=torch.float64)
    for i in range(dim // 2):
        wave += torch.cos(torch.arange(reach + 1, dtype=torch.float64) / 10000 ** (2 * i / dim))
    wave = wave.to(device=device, dtype=torch.float32)
    ratio = heads / (8 * torch.arange(1, heads + 1, device=device, dtype=torch.float32))

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        distance = torch.clamp(torch.abs(q_idx - kv_idx), 0, reach)
        return score + ratio[h] * wave[distance]

    return mod
