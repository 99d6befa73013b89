"""Decoding with a KV cache: the query is the last position, so causal needs an offset.

The cache is one tensor of full length, filled as tokens come. Its current length is a captured
tensor: a new length is a new value, never new code.

    python -m examples.kv_cache
"""

import torch

from flexattn import create_block_mask, flex_attention
from flexattn.masks import offset_causal


def main() -> None:
    batch, heads, kv_heads, max_length, head_dim = 2, 8, 2, 160, 64
    query = torch.randn(batch, heads, max_length, head_dim)
    key, value = (torch.randn(batch, kv_heads, max_length, head_dim) for _ in range(2))
    at_once = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True)

    key_cache, value_cache = torch.zeros_like(key), torch.zeros_like(value)
    cached = torch.tensor(0)
    worst = 0.0
    for step in range(max_length):
        key_cache[:, :, step] = key[:, :, step]
        value_cache[:, :, step] = value[:, :, step]
        cached.fill_(step)
        block_mask = create_block_mask(offset_causal(cached), None, None, 1, max_length)
        out = flex_attention(query[:, :, step:step + 1], key_cache, value_cache,
                             block_mask=block_mask, enable_gqa=True)
        worst = max(worst, float((out - at_once[:, :, step:step + 1]).abs().max()))
    print(f"{max_length} steps, largest difference to all at once {worst:.0e}")
    assert worst < 1e-5


if __name__ == "__main__":
    main()
