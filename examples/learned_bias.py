"""A bias for every head and distance, trained: one head learns to look three positions back.

Queries and keys are noise, so only the bias can tell where to look. It is captured by the mod and
gets its gradient from the fused backward; no [S, S] tensor is ever made.

    python -m examples.learned_bias
"""

import torch

from flexattn import create_block_mask, flex_attention
from flexattn.masks import causal

LOOK_BACK = 3


def main() -> None:
    length, head_dim = 256, 32
    block_mask = create_block_mask(causal, None, None, length, length)
    bias = torch.zeros(1, length, requires_grad=True)
    optimizer = torch.optim.Adam([bias], lr=0.3)

    def distance_bias(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + bias[h, q_idx - kv_idx]

    for step in range(60):
        query, key, value = (torch.randn(4, 1, length, head_dim) for _ in range(3))
        out = flex_attention(query, key, value, score_mod=distance_bias, block_mask=block_mask)
        loss = (out[:, :, LOOK_BACK:] - value[:, :, :-LOOK_BACK]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == 59:
            print(f"step {step:2}: loss {loss.item():.3f}, looks {int(bias.argmax())} back")
    assert int(bias.argmax()) == LOOK_BACK


if __name__ == "__main__":
    main()
