"""Fine-tune a small model of transformers on documents packed into one sequence, without padding.

The collator flattens a batch and marks where documents start in position_ids; transformers makes
the mask from them, flexattn visits only the blocks inside documents. Bytes are the tokens.

    python -m examples.finetune_packed
"""

import random

import torch
from transformers import DataCollatorWithFlattening, MistralConfig, MistralForCausalLM

from flexattn.integrations.transformers import register

TEXT = ("Attention variants differ in one small function. You write that function in Python on "
        "scalars, and it becomes a fused kernel, forward and backward. ")


def documents(count: int) -> list[dict[str, list[int]]]:
    """Pieces of the text of different lengths, as a tokenizer would give them."""
    starts = [random.randrange(len(TEXT)) for _ in range(count)]
    return [{"input_ids": list((TEXT[s:] + TEXT[:s])[:random.randrange(40, 150)].encode())}
            for s in starts]


def main() -> None:
    register()
    config = MistralConfig(vocab_size=256, hidden_size=96, intermediate_size=192,
                           num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           sliding_window=64, attention_dropout=0.0)
    model = MistralForCausalLM._from_config(config, attn_implementation="flexattn")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = DataCollatorWithFlattening(return_tensors="pt")

    losses = []
    for _ in range(40):
        loss = model(**collate(documents(6)), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats a byte in {len(losses)} steps")
    assert losses[-1] < 0.6 * losses[0]

    batch = documents(3)
    with torch.no_grad():
        packed = model(**collate(batch), use_cache=False).logits
        alone = [model(torch.tensor([one["input_ids"]]), use_cache=False).logits for one in batch]
    worst = float((packed - torch.cat(alone, 1)).abs().max())
    print(f"packed or alone, the logits are the same: largest difference {worst:.0e}")
    assert worst < 1e-4


if __name__ == "__main__":
    main()
