"""attn_implementation="flexattn" for Hugging Face transformers.

In: `register()`, once. Out: models built with, or switched to, "flexattn" take their attention and
their masks from here: causal, sliding, chunked, bidirectional and prefix masks, padding, packed
documents, 4-D mask tensors; softcap, position biases, grouped heads and attention sinks. Rejects
attention dropout, for which there is no kernel (ArgumentError).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexattn.attention import AuxRequest, by_operator, flex_attention, score_dtype
from flexattn.block_mask import BlockMask, create_block_mask, settled, undivided
from flexattn.errors import ArgumentError, FlexAttnError, ShapeError, message
from flexattn.integrations.torch_block_mask import as_torch
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph
from flexattn.masks import and_masks, causal
from flexattn.mods import attention_sink, chain, learned_bias, softcap
from flexattn.trace import Mod, Trace, specialize, trace_mask_mod, trace_score_mod


class TransformersMissingError(FlexAttnError, ImportError):
    """transformers is needed, and not installed or too old."""


def register(name: str = "flexattn") -> None:
    """Make `attn_implementation=name` work in every model that asks transformers for attention.

    Errors: TransformersMissingError.

    Examples:
        >>> from flexattn.integrations.transformers import register
        >>> register()
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="flexattn")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise TransformersMissingError(message(
            "register() needs transformers.", expected="transformers 5 or newer", got=str(error),
            remedy="pip install 'flexattn[transformers]'")) from error
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


# Masks: made once per forward pass and kind of layer, by transformers' masking_utils


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0,
                   kv_offset: int = 0, mask_function: Callable = causal,
                   attention_mask: Tensor | None = None, device: torch.device | str = "cpu",
                   allow_is_bidirectional_skip: bool = False, **_: Any) -> BlockMask | None:
    """What transformers calls to make the mask of a kind of layer.

    Args:
        batch_size, q_length, kv_length: sizes of the attention to come.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: `(b, h, q_idx, kv_idx) -> bool` on positions.
        attention_mask: bool [B, positions], False at padding.

    Returns: a BlockMask; None where everything is attended.
    """
    decoding = q_length == 1 and not torch.compiler.is_compiling()
    real = _real_tokens(attention_mask, kv_length + kv_offset, decoding)
    if real is None and allow_is_bidirectional_skip and _attends_all(mask_function):
        return None
    if decoding and isinstance(q_offset, int) and _attends_to_all(
            mask_function, q_offset, kv_offset, kv_length, device):
        return None if real is None else _padded(real[:, kv_offset:], kv_length)
    mask = mask_function if real is None else and_masks(mask_function, _keys_in(real))
    mask = _shifted(mask, q_offset, kv_offset)
    if torch.compiler.is_compiling():  # made in the graph, and not kept beyond it
        return create_block_mask(mask, batch_size, None, q_length, kv_length, device=device)
    trace = trace_mask_mod(mask, device)
    mod = specialize(trace)
    reads = mod.graph.inputs()
    sizes = (batch_size if "b" in reads else None, q_length, kv_length, str(device))
    if decoding and "h" not in reads:
        return as_torch(undivided(mask, sizes[0] or 1, q_length, kv_length, device, mod))
    return _block_mask(mask, *sizes) if trace.captures else _kept(_Pattern(trace, mask), *sizes)


def _real_tokens(attention_mask: Tensor | None, length: int, decoding: bool) -> Tensor | None:
    """bool [B, at least `length`]; None without padding. Positions beyond the mask are padding.
    Decoding waits for no GPU to know whether there is padding."""
    if attention_mask is None:
        return None
    missing = length - attention_mask.shape[-1]
    waits = decoding and attention_mask.device.type != "cpu"
    if missing <= 0 and not waits and not torch.compiler.is_compiling() \
            and bool(attention_mask.all()):
        return None
    return torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask


def _keys_in(real: Tensor) -> Callable:
    return lambda b, h, q_idx, kv_idx: real[b, kv_idx]


def _padded(real: Tensor, keys: int) -> BlockMask:
    """The mask of one query that attends to all real keys."""
    mod = Mod(_reads_of(real.dtype, real.device), (real,))
    return as_torch(undivided(_keys_in(real), real.shape[0], 1, keys, real.device, mod))


@lru_cache(maxsize=32)
def _reads_of(dtype: torch.dtype, device: torch.device) -> Graph:
    """The graph of `_keys_in`, traced once: only its tensor grows from token to token."""
    return specialize(trace_mask_mod(_keys_in(torch.ones(1, 1, dtype=dtype, device=device)),
                                     device)).graph


def _attends_all(mask_function: Callable) -> bool:
    from transformers.masking_utils import bidirectional_mask_function

    return mask_function is bidirectional_mask_function


def _attends_to_all(mask_function: Callable, query: int, first: int, keys: int,
                    device: torch.device | str) -> bool:
    """Whether the query at position `query` attends to all keys, whatever its batch entry and
    head; False where that depends on tensors. Keys of one query are few: all are looked at."""
    mod = specialize(trace_mask_mod(mask_function, device))
    if mod.captures or not mod.graph.inputs() <= {"q_idx", "kv_idx"}:
        return False
    positions = {"q_idx": torch.tensor(query), "kv_idx": torch.arange(first, first + keys)}
    return bool(evaluate(mod.graph, positions, (), mod.numbers)["mask"].all())


def _shifted(mask_function: Callable, q_offset: int | Tensor, kv_offset: int) -> Callable:
    """The mask on indices that start at 0. Static caches count positions up in the tensor they
    give, before the layers run: it is copied."""
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()
    elif q_offset == kv_offset == 0:
        return mask_function

    def shifted(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_function(b, h, q_idx + q_offset, kv_idx + kv_offset)

    return shifted


class _Pattern:
    """A mask function without captured tensors, equal to those that do the same."""

    def __init__(self, trace: Trace, mask: Callable) -> None:
        self.key, self.mask = (trace.key, repr(trace.numbers)), mask

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pattern) and self.key == other.key


@lru_cache(maxsize=32)
def _kept(pattern: _Pattern, *sizes: Any) -> BlockMask:
    return _block_mask(pattern.mask, *sizes)


def _block_mask(mask: Callable, batch: int | None, q_len: int, kv_len: int,
                device: str) -> BlockMask:
    return as_torch(settled(create_block_mask(mask, batch, None, q_len, kv_len, device=device)))


# Attention: called by each layer


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
              attention_mask: BlockMask | Tensor | None, scaling: float | None = None,
              dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None,
              position_bias: Tensor | None = None, is_causal: bool | None = None,
              **kwargs: Any) -> tuple[Tensor, None]:
    """What a layer of transformers calls in place of its eager attention.

    Args:
        query [B, Hq, Q, D], key, value [B, Hkv, KV, D]; attention_mask: from `attention_mask`
            above, or a tensor [B or 1, Hq or 1, Q, >= KV], bool or additive.
        softcap, position_bias: of the score; s_aux: [Hq], the attention sinks.

    Returns: out [B, Q, Hq, D], and None for the weights, which are never formed.

    Errors: ArgumentError for dropout; those of flex_attention.
    """
    _check(dropout, kwargs.get("output_attentions"))
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = _kept(_Pattern(trace_mask_mod(causal, query.device), causal), None,
                               query.shape[2], key.shape[2], str(query.device))
    block_mask, bias = _mask_and_bias(attention_mask, query, key)
    score_mod = _score_mod(query, softcap, bias, position_bias)
    arguments: dict[str, Any] = {"score_mod": score_mod, "block_mask": block_mask,
                                 "scale": scaling, "enable_gqa": True}
    if s_aux is None:
        out = flex_attention(query, key, value, **arguments)
    else:
        out, aux = flex_attention(query, key, value, **arguments, return_aux=AuxRequest(lse=True))
        out = attention_sink(out, aux.lse, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _check(dropout: float, output_attentions: bool | None) -> None:
    if dropout:
        raise ArgumentError(message(
            "There is no attention dropout in flexattn.", expected="dropout 0", got=str(dropout),
            remedy="set the config's attention dropout to 0 (attention_dropout, or "
            "attention_probs_dropout_prob), or call model.eval()"))
    if output_attentions:
        warnings.warn("flexattn never forms the attention weights: output_attentions gives None; "
                      "use attn_implementation='eager' for them", stacklevel=3)


def _score_mod(query: Tensor, cap: float | None, *biases: Tensor | None) -> Callable | Mod | None:
    given = [learned_bias(bias) for bias in biases if bias is not None]
    if cap is not None:
        if not given and not by_operator():
            return _softcap(cap, score_dtype(query))
        given.insert(0, softcap(cap))
    return chain(*given) if given else None


@lru_cache(maxsize=32)
def _softcap(cap: float, dtype: torch.dtype) -> Mod:
    """Traced once for all layers and steps."""
    return specialize(trace_score_mod(softcap(cap), dtype))


# Mask tensors that a caller made: the same object goes to every layer


_converted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _mask_and_bias(mask: BlockMask | Tensor | None, query: Tensor,
                   key: Tensor) -> tuple[BlockMask | None, Tensor | None]:
    if not isinstance(mask, Tensor):
        return mask, None
    if mask.dim() != 4 or mask.shape[-1] < key.shape[2]:
        raise ShapeError(message("The attention mask does not fit.", got=str(list(mask.shape)),
                                 expected=f"[B or 1, heads or 1, {query.shape[2]}, "
                                 f"at least {key.shape[2]}]"))
    if mask.requires_grad:
        return _read_tensor(mask[..., :key.shape[2]])
    kind = (mask._version, key.shape[2])
    found = _converted.get(mask)
    if found is None or found[0] != kind:
        found = _converted[mask] = (kind, _read_tensor(mask[..., :key.shape[2]]))
    return found[1]


def _read_tensor(mask: Tensor) -> tuple[BlockMask, Tensor | None]:
    """The positions that count, and what is added to their scores where that is not 0."""
    counts = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    batch, heads, q_len, kv_len = mask.shape

    def given(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return counts[b if batch > 1 else 0, h if heads > 1 else 0, q_idx, kv_idx]

    block_mask = create_block_mask(given, batch, heads, q_len, kv_len, device=mask.device)
    added = mask.dtype is not torch.bool and bool((counts & (mask != 0)).any())
    return block_mask, mask if added else None
