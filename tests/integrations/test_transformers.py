"""Models of transformers give with attn_implementation="flexattn" what their eager attention
gives: logits, gradients, generated tokens."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None and not os.environ.get("CI"):
    pytest.skip("needs transformers: pip install -e '.[dev]'", allow_module_level=True)

import transformers
from transformers import masking_utils

import flexattn.attention as attention_room
import flexattn.block_mask.mask as block_mask_room
from flexattn import BlockMask, create_mask
from flexattn.errors import ArgumentError, ShapeError
from flexattn.integrations import transformers as integration
from tests.integrations.tiny_models import (
    DECODERS,
    ENCODERS,
    VOCABULARY,
    loss_and_gradients,
    model,
    padded,
    pair,
)

pytestmark = pytest.mark.usefixtures("registered", "rng")


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    integration.register()
    yield
    transformers.logging.set_verbosity(verbosity)


def assert_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 2e-5) -> None:
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{what}: {error:.1e}"


def assert_models_agree(name: str, tokens: Tensor, real: Tensor) -> None:
    eager, ours = pair(name)
    logits, gradients = loss_and_gradients(ours, tokens, real)
    eager_logits, wanted_gradients = loss_and_gradients(eager, tokens, real)
    assert_close(logits[real.bool()], eager_logits[real.bool()], "logits")
    assert gradients.keys() == wanted_gradients.keys()
    noise = 1e-6 * max(float(g.abs().max()) for g in wanted_gradients.values())
    for key, gradient in gradients.items():  # a key's bias has none: all of it is noise
        wanted = wanted_gradients[key]
        error = float((gradient - wanted).abs().max())
        assert error < 2e-4 * float(wanted.abs().max()) + noise, f"{key}: {error:.1e}"


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_logits_and_gradients_are_eagers(name: str, left: bool, rng: np.random.Generator) -> None:
    total = int(rng.integers(130, 180))
    lengths = [int(rng.integers(60, total)), total]
    assert_models_agree(name, *padded(lengths, total, left))


def test_gradients_of_sinks_are_compared() -> None:
    net = model("gpt_oss", "flexattn")
    _, gradients = loss_and_gradients(net, *padded([50], 50, left=True))
    sinks = [g for key, g in gradients.items() if key.endswith("sinks")]
    assert len(sinks) == 2 and all(g.abs().min() > 0 for g in sinks)


# Generation


def generated(net: Any, tokens: Tensor, real: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens [B, n], and the logits that chose them [B, n, V]."""
    made = net.generate(tokens, attention_mask=real, max_new_tokens=24, do_sample=False,
                        return_dict_in_generate=True, output_logits=True, **options)
    return made.sequences[:, tokens.shape[1]:], torch.stack(made.logits, 1)


def assert_same_tokens(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Equal but where the first difference of a row lies between two logits that rounding cannot
    tell apart."""
    for tokens, other, logits in zip(got[0], *wanted, strict=True):
        for i in (tokens != other).nonzero()[:1, 0].tolist():
            first, second = logits[i].topk(2).values
            assert first - second < 1e-4, f"token {i}: {tokens[i]} instead of {other[i]}"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_eagers(name: str, cache: str, rng: np.random.Generator) -> None:
    """Past the window and the chunk, with left padding."""
    total = int(rng.integers(25, 60))
    tokens, real = padded([int(rng.integers(5, total)), total], total, left=True)
    eager, ours = pair(name)
    options = {"cache_implementation": cache}
    assert_same_tokens(generated(ours, tokens, real, **options), generated(eager, tokens, real))


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "gpt_oss"])
def test_left_padding_changes_nothing(name: str, rng: np.random.Generator) -> None:
    length, total = int(rng.integers(5, 40)), 50
    tokens, real = padded([length, total], total, left=True)
    net = model(name, "flexattn")
    alone = generated(net, tokens[:1, -length:], real[:1, -length:])
    both = generated(net, tokens, real)
    assert_same_tokens((both[0][:1], both[1][:1]), alone)


def test_chunked_prefill_continues_a_cache(rng: np.random.Generator) -> None:
    net = model("gemma2", "flexattn")
    tokens = torch.randint(3, VOCABULARY, (2, 90))
    cut = int(rng.integers(20, 70))
    with torch.no_grad():
        whole = net(tokens).logits
        cache = transformers.DynamicCache(config=net.config)
        parts = [net(part, **{CACHE: cache}, use_cache=True).logits
                 for part in (tokens[:, :cut], tokens[:, cut:])]
    assert_close(torch.cat(parts, 1), whole, "logits")


def _cache_argument() -> str:
    named = inspect.signature(transformers.LlamaModel.forward).parameters
    return "cache" if "cache" in named else "past_key_values"


CACHE = _cache_argument()
CACHE_OUTPUT = "past_key_values"


# Packed documents


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4", "qwen3"])
def test_packed_documents_are_as_alone(name: str, rng: np.random.Generator) -> None:
    lengths = [int(n) for n in rng.integers(3, 80, 4)]
    tokens = torch.randint(3, VOCABULARY, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    net = model(name, "flexattn")
    with torch.no_grad():
        packed = net(tokens, position_ids=positions, use_cache=False).logits
        alone = [net(part, use_cache=False).logits for part in tokens.split(lengths, 1)]
    assert_close(packed, torch.cat(alone, 1), "logits")


# torch.compile


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_training_step_compiles_as_one_graph(name: str) -> None:
    """Masks made inside, softcap, windows, sinks."""
    net = model(name, "flexattn")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    tokens = torch.randint(3, VOCABULARY, (2, 70))
    wanted = net(tokens, use_cache=False).logits
    got = compiled(tokens, use_cache=False).logits
    assert_close(got, wanted, "logits")
    d_logits = torch.randn_like(got)
    weights = [p for p in net.parameters() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(got, weights, d_logits, allow_unused=True),
                          torch.autograd.grad(wanted, weights, d_logits, allow_unused=True),
                          strict=True):
        if other is not None and other.abs().max() > 1e-3:
            assert_close(one, other, "gradient", 1e-4)


# Mask tensors, mistakes, work done once


@pytest.mark.parametrize("additive", [False, True])
def test_mask_tensors_of_a_caller(additive: bool) -> None:
    eager, ours = pair("llama")
    tokens = torch.randint(3, VOCABULARY, (2, 70))
    keep = (torch.rand(2, 1, 70, 70) < 0.5) | torch.eye(70, dtype=torch.bool)
    bias = torch.where(keep, torch.randn(2, 1, 70, 70) if additive else 0.0,
                       torch.finfo(torch.float32).min)
    with torch.no_grad():
        got = ours(tokens, attention_mask=bias if additive else keep).logits
        assert_close(got, eager(tokens, attention_mask=bias).logits, "logits")


def test_a_mask_tensor_written_in_place_is_read_anew() -> None:
    query = key = torch.randn(1, 1, 20, 16)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    layer = torch.nn.Identity()
    integration.attention(layer, query, key, key, mask)
    mask[..., 3:] = False
    got, _ = integration.attention(layer, query, key, key, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, key, mask)
    assert_close(got.transpose(1, 2), wanted, "out")


def test_mask_tensors_that_do_not_fit_are_refused() -> None:
    query = torch.randn(1, 1, 20, 16)
    with pytest.raises(ShapeError, match="attention mask"):
        integration.attention(torch.nn.Identity(), query, query, query, torch.ones(20, 20))


def test_is_causal_without_a_mask() -> None:
    query, key, value = torch.randn(3, 2, 2, 33, 16)
    got, weights = integration.attention(torch.nn.Identity(), query, key, value, None,
                                         is_causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert weights is None
    assert_close(got.transpose(1, 2), wanted, "out")


def test_masks_are_made_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real_create = integration.create_block_mask
    monkeypatch.setattr(integration, "create_block_mask",
                        lambda *a, **k: made.append(a) or real_create(*a, **k))
    integration._kept.cache_clear()
    net = model("gemma2", "flexattn")
    tokens, real = padded([40, 77], 77, left=True)
    net(tokens, attention_mask=real)
    assert len(made) == 2  # one for the sliding layers, one for the full ones
    net(tokens)
    assert len(made) == 4
    net(tokens)  # without padding nothing depends on the batch: kept across forwards
    assert len(made) == 4


def test_a_decoded_token_without_padding_has_no_mask() -> None:
    """Nor has one whose window is all there is in the cache."""
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_causal_mask_function(40)
    for mask_function, first in ((causal, 0), (window, 61)):
        made = [integration.attention_mask(2, 1, 101 - first, 100, first, mask_function, real)
                for real in (None, torch.ones(2, 101, dtype=torch.bool))]
        assert made == [None, None]
    assert integration.attention_mask(2, 1, 101, 100, 0, window) is not None
    assert integration.attention_mask(2, 1, 101, 99, 0, causal) is not None


def test_the_mask_of_a_decoded_token_reads_no_value_and_looks_at_no_block(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A read would make a GPU wait: tensors without values raise."""
    monkeypatch.setattr(integration, "create_block_mask", None)
    real = torch.ones(2, 101, dtype=torch.bool, device="meta")
    for offset in (100, torch.empty((), dtype=torch.int64, device="meta")):
        for mask_function in (masking_utils.causal_mask_function,
                              masking_utils.sliding_window_causal_mask_function(40)):
            made = integration.attention_mask(2, 1, 101, offset, 0, mask_function, real, "meta")
            assert isinstance(made, BlockMask) and made.shape == (2, 1, 1, 101)


def test_masks_and_softcap_are_traced_once_for_all_layers_and_steps(
        monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for room in (block_mask_room, attention_room, integration):
        for name in ("trace_mask_mod", "trace_score_mod"):
            if hasattr(room, name):
                real_trace = getattr(room, name)
                monkeypatch.setattr(room, name, lambda *a, f=real_trace: calls.append(a) or f(*a))
    net = model("gemma2", "flexattn")
    tokens, real = padded([40, 77], 77, left=True)
    with torch.no_grad():
        cache = net(tokens, attention_mask=real, use_cache=True)[CACHE_OUTPUT]
        net(tokens[:, :1], attention_mask=torch.cat([real, real[:, :1] | 1], 1), **{CACHE: cache})
        calls.clear()
        net(tokens[:, :1], attention_mask=torch.cat([real, real[:, :2] | 1], 1), **{CACHE: cache})
    masks_a_kind = 3  # does it attend to all; its graph; once for all layers
    assert len(calls) <= 2 * masks_a_kind


def prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx < 11


def kinds_of_masks() -> dict[str, Any]:
    groups = torch.randint(-1, 3, (2, 100))
    left, positions = torch.tensor([0, 7]), torch.randint(0, 4, (2, 100)).cumsum(1)
    theirs = masking_utils
    return {
        "causal": theirs.causal_mask_function,
        "sliding": theirs.sliding_window_causal_mask_function(20),
        "sliding both ways": theirs.sliding_window_bidirectional_mask_function(20),
        "chunked": theirs.chunked_causal_mask_function(16, left),
        "bidirectional": theirs.bidirectional_mask_function,
        "prefix": theirs.or_masks(theirs.causal_mask_function, prefix),
        "blockwise": theirs.or_masks(theirs.causal_mask_function,
                                     theirs.blockwise_overlay(groups)),
        "packed": theirs.and_masks(theirs.causal_mask_function,
                                   theirs.packed_sequence_mask_function(positions)),
    }


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sizes", [(100, 100, 0, 0), (30, 100, 70, 0), (1, 100, 99, 0),
                                   (1, 40, 99, 60), (1, 100, torch.tensor(70), 0)], ids=str)
@pytest.mark.parametrize("kind", list(kinds_of_masks()))
def test_masks_are_those_that_sdpa_is_given(kind: str, sizes: tuple[Any, ...], padding: bool
                                            ) -> None:
    """Every kind of mask, for a prompt, its second part, a token, a full window, a static cache."""
    mask_function = kinds_of_masks()[kind]
    real = (torch.rand(2, 100) < 0.8) if padding else None
    made = integration.attention_mask(2, *sizes, mask_function, real)
    wanted = masking_utils.sdpa_mask(2, *sizes, mask_function, real, allow_is_causal_skip=False)
    assert wanted is not None
    dense = torch.ones(2, 1, *sizes[:2], dtype=torch.bool) if made is None else create_mask(
        made.element_mod(), 2, 1, *sizes[:2], device="cpu")
    assert torch.equal(dense, wanted.expand_as(dense))
    if made is not None:
        query, key = torch.randn(2, 1, sizes[0], 16), torch.randn(2, 1, sizes[1], 16)
        got, _ = integration.attention(torch.nn.Identity(), query, key, key, made)
        eager = torch.nn.functional.scaled_dot_product_attention(query, key, key, wanted)
        assert_close(got.transpose(1, 2), eager.nan_to_num(), "out")


def test_dropout_is_refused() -> None:
    query = torch.randn(1, 1, 20, 16)
    with pytest.raises(ArgumentError, match="attention_probs_dropout_prob"):
        integration.attention(torch.nn.Identity(), query, query, query, None, dropout=0.1)


def test_asking_for_weights_warns() -> None:
    query = torch.randn(1, 1, 20, 16)
    with pytest.warns(UserWarning, match="eager"):
        integration.attention(torch.nn.Identity(), query, query, query, None,
                              output_attentions=True)


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(integration.TransformersMissingError, match=r"flexattn\[transformers\]"):
        integration.register()
