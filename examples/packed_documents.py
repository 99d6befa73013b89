"""Documents packed into one sequence give what each gives alone: no padding, no extra work.

    python -m examples.packed_documents
"""

import torch

from flexattn import create_block_mask, flex_attention
from flexattn.masks import causal_document, lengths_to_ids


def main() -> None:
    lengths = [300, 45, 700, 211]
    total, heads, head_dim = sum(lengths), 4, 64
    query, key, value = (torch.randn(1, heads, total, head_dim) for _ in range(3))

    mask = causal_document(lengths_to_ids(lengths))
    block_mask = create_block_mask(mask, None, None, total, total)
    packed = flex_attention(query, key, value, block_mask=block_mask)

    worst, start = 0.0, 0
    for length in lengths:
        own = slice(start, start + length)
        alone = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, own], key[:, :, own], value[:, :, own], is_causal=True)
        worst = max(worst, float((packed[:, :, own] - alone).abs().max()))
        start += length
    print(f"{len(lengths)} documents, {block_mask.sparsity():.0f}% of the blocks never visited, "
          f"largest difference to each alone {worst:.0e}")
    assert worst < 1e-5


if __name__ == "__main__":
    main()
