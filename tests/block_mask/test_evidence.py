"""Explanations: counts of how blocks were decided, and what is named as undecided."""

import torch

from flexattn import masks
from flexattn.block_mask import create_block_mask


def test_everything_proved():
    found = create_block_mask(masks.causal, None, None, 1000, 1000).explain()
    assert (found.empty, found.partial, found.full) == (28, 8, 28)
    assert found.evaluated == found.split == 0 and found.proved == 56 and found.witnessed == 8
    assert "no block had its elements evaluated" in str(found)


def test_what_defeats_the_proof_is_named():
    table = torch.randint(0, 1 << 30, (700,)) * 2

    def scattered(b, h, q, k):
        return (q >= k) & ((table[q] ^ table[k]) % 2 == 1)  # never, but who would know

    found = create_block_mask(scattered, None, None, 700, 700).explain()
    assert found.empty == found.blocks == 36
    assert found.evaluated > 0 and found.evaluated_share > 0
    assert "captured0[q_idx] ^ captured0[kv_idx]" in str(found)
