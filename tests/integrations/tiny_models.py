"""Small randomly initialised models of transformers, the same weights under two attentions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

WINDOW, CHUNK, VOCABULARY = 40, 48, 99
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, **_ALTERNATING,
                                                query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, **_ALTERNATING,
                                                    query_pre_attn_scalar=16),
    "gpt_oss": lambda: transformers.GptOssConfig(**_GROUPED, **_ALTERNATING, **_EXPERTS),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_GROUPED, **_EXPERTS, intermediate_size_mlp=96, attention_chunk_size=CHUNK,
        layer_types=["chunked_attention", "full_attention"]),
    "phi3": lambda: transformers.Phi3Config(**_SIZES, num_key_value_heads=2),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**_SIZES, attention_probs_dropout_prob=0.0,
                                            hidden_dropout_prob=0.0),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SIZES, local_attention=WINDOW, layer_types=["sliding_attention", "full_attention"],
        cls_token_id=1, sep_token_id=2),
}


def model(name: str, attention: str, like: torch.nn.Module | None = None) -> Any:
    """The model in `attention`, with new weights or with those of `like`."""
    decoder = name in DECODERS
    config = copy.deepcopy((DECODERS if decoder else ENCODERS)[name]())
    kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
    made = kind.from_config(config, attn_implementation=attention).eval()
    if like is not None:
        made.load_state_dict(like.state_dict())
        return made
    with torch.no_grad():
        for key, weight in made.named_parameters():
            if weight.dim() > 1 or "sinks" in key:
                weight.normal_(0, 1.0 if "sinks" in key else 0.15)
    return made


def pair(name: str) -> tuple[Any, Any]:
    """(eager, flexattn), with equal weights."""
    eager = model(name, "eager")
    return eager, model(name, "flexattn", eager)


def padded(lengths: list[int], total: int, left: bool) -> tuple[Tensor, Tensor]:
    """Random tokens [B, total], and which of them are real."""
    tokens = torch.randint(3, VOCABULARY, (len(lengths), total))
    order = torch.arange(total).flip(0) if left else torch.arange(total)
    return tokens, (order < torch.tensor(lengths)[:, None]).long()


def loss_and_gradients(net: Any, tokens: Tensor, real: Tensor, **inputs: Any
                       ) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss that rests on the real positions alone."""
    net.zero_grad()
    logits = net(tokens, attention_mask=real, **inputs).logits
    weights = torch.linspace(-1, 1, logits.shape[-1], device=real.device) * real[..., None]
    (logits.log_softmax(-1) * weights).sum().backward()
    return logits, {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
