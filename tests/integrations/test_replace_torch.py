"""Code written for torch's flex_attention runs ours under replace_torch, and torch's after it.

What tells them apart: torch's flex_attention has no backward on a CPU, ours has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_module

# As third-party code does, before any replacement:
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)
from torch.utils._pytree import tree_map

import flexattn
from flexattn.integrations import replace_torch as routes

pytestmark = pytest.mark.usefixtures("rng")


@pytest.fixture
def replaced() -> Iterator[None]:
    with flexattn.replace_torch():
        yield


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx - kv_idx < 20


def inputs(length: int = 50) -> list[Tensor]:
    return [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]


def by_the_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    i = torch.arange(query.shape[2])
    keep = (i[:, None] >= i) & (i[:, None] - i < 20)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, keep)


def assert_trains(attend: Callable[..., Tensor]) -> None:
    """Out and gradients are the formula's."""
    tensors = inputs()
    length = tensors[0].shape[2]
    mask = create_block_mask(and_masks(causal, window), None, None, length, length, "cpu")
    out, wanted = attend(*tensors, block_mask=mask), by_the_formula(*tensors)
    torch.testing.assert_close(out, wanted)
    d_out = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, tensors, d_out),
                         torch.autograd.grad(wanted, tensors, d_out), strict=True):
        torch.testing.assert_close(got, want)


def assert_torch_is_back() -> None:
    mask = create_block_mask(causal, None, None, 50, 50, "cpu")
    assert type(mask) is BlockMask
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(*inputs(), block_mask=mask)


def test_names_imported_before_and_after_are_ours(replaced: None) -> None:
    from torch.nn.attention.flex_attention import flex_attention as imported_after

    assert_trains(flex_attention)
    assert_trains(imported_after)
    assert_trains(torch_module.flex_attention)


def test_a_function_wrapped_in_torch_compile_before() -> None:
    compiled = torch.compile(flex_attention)
    with flexattn.replace_torch():
        assert_trains(compiled)
    with flexattn.replace_torch():
        assert_trains(compiled)
    assert_torch_is_back()


def test_code_that_was_compiled_with_torchs_is_compiled_anew(
        monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.compile(backend="eager")
    def layer(*tensors: Tensor) -> Tensor:
        return flex_attention(*tensors)

    calls = []
    ours = routes.flex_attention
    monkeypatch.setattr(routes, "flex_attention", lambda **k: calls.append(1) or ours(**k))
    tensors = [t.detach() for t in inputs()]
    layer(*tensors)
    with flexattn.replace_torch():
        layer(*tensors)
    assert len(calls) == 1
    layer(*tensors)
    assert len(calls) == 1


def test_a_model_compiles_as_one_graph(replaced: None) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(*tensors: Tensor) -> Tensor:
        length = tensors[0].shape[2]
        mask = create_block_mask(and_masks(causal, window), None, None, length, length, "cpu")
        return flex_attention(*tensors, block_mask=mask)

    tensors = inputs()
    got, wanted = layer(*tensors), by_the_formula(*tensors)
    torch.testing.assert_close(got, wanted)
    for one, other in zip(torch.autograd.grad(got.sum(), tensors),
                          torch.autograd.grad(wanted.sum(), tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_masks_are_instances_of_both_classes(replaced: None) -> None:
    mask = create_block_mask(causal, 2, 3, 300, 300, "cpu")
    for one in (mask, mask[:, 1], mask.to("cpu"), mask & mask, mask.adjust(200, 300),
                tree_map(torch.clone, mask)):
        assert isinstance(one, BlockMask) and isinstance(one, flexattn.BlockMask)
    assert mask.shape == (2, 3, 300, 300) and mask.BLOCK_SIZE == (128, 128)


def test_masks_survive_the_end_of_the_replacement() -> None:
    with flexattn.replace_torch():
        mask = create_block_mask(causal, None, None, 50, 50, "cpu")
    query, key, value = inputs()
    out = flexattn.flex_attention(query, key, value, block_mask=mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, wanted)


def test_torchs_own_masks_are_taken(replaced: None) -> None:
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(one, one[..., None] * 0, mask_mod=causal,
                                    seq_lengths=(50, 50))
    query, key, value = inputs()
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=mask), wanted)


def test_auxiliary_outputs_are_torchs_named_tuple(replaced: None) -> None:
    query, key, value = inputs()
    out, aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))
    lse, max_scores = aux
    scores = query @ key.transpose(-1, -2) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert max_scores is None and out.shape == query.shape


def test_signatures_stay() -> None:
    before = inspect.signature(flex_attention)
    with flexattn.replace_torch():
        assert inspect.signature(flex_attention) == before
    assert inspect.signature(flex_attention) == before


def test_torch_is_back_when_every_replacement_has_ended() -> None:
    outer = flexattn.replace_torch()
    with flexattn.replace_torch():
        assert_trains(flex_attention)
    assert_trains(flex_attention)
    outer.restore()
    assert_torch_is_back()
    outer.restore()  # again: nothing left to end
    assert_torch_is_back()


def test_an_error_inside_ends_it_as_well() -> None:
    with pytest.raises(ZeroDivisionError), flexattn.replace_torch():
        _ = 1 / 0
    assert_torch_is_back()
