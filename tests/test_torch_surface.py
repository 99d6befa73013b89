"""The public surface is a superset of torch's flex_attention: names, arguments, objects."""

import inspect
import warnings

import pytest
import torch
from torch.nn.attention import flex_attention as theirs

import flexattn
from flexattn import AuxOutput, AuxRequest, create_block_mask, flex_attention, masks
from flexattn.errors import ArgumentError

FUNCTIONS = ("flex_attention", "create_block_mask", "create_mask", "and_masks", "or_masks",
             "noop_mask")
IGNORED = {"_compile", "compute_dq_write_order", "dq_kv_order", "dq_write_order",
           "dq_write_order_full", "compute_q_blocks"}  # accepted, and change nothing


def parameters(fn):
    return inspect.signature(fn).parameters


def takes_keywords(fn):
    return any(p.kind is p.VAR_KEYWORD for p in parameters(fn).values())


def test_every_public_name_exists():
    assert set(theirs.__all__) <= {*flexattn.__all__, "BlockMask"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments(name):
    """Same names in the same places with the same defaults."""
    ours, torchs = (parameters(getattr(m, name)) for m in (flexattn, theirs))
    positional = [p for p in torchs.values() if p.kind is not p.KEYWORD_ONLY]
    for p, q in zip(positional, ours.values(), strict=False):
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in IGNORED:
            continue
        if name not in ("noop_mask", "create_mask", "and_masks", "or_masks"):
            assert p.name == q.name
        assert p.default == q.default or p.default is p.empty or q.default is None
    for p in torchs.values():
        if p.kind is p.KEYWORD_ONLY:
            assert p.name in ours or takes_keywords(getattr(flexattn, name))


def test_block_mask_attributes_and_methods():
    public = {n for n in dir(theirs.BlockMask) if not n.startswith("_")}
    mask = create_block_mask(masks.causal, None, None, 256, 256)
    missing = {n for n in public if not hasattr(mask, n)}
    annotated = set(theirs.BlockMask.__annotations__) - {n for n in dir(mask)}
    assert not missing | annotated


@pytest.mark.parametrize("flatten", [True, False])
def test_the_tuple_has_torchs_places(flatten):
    """The same lengths, counts and lists at the same places, block sizes and mask_mod at the end;
    what hints torch's own kernels is None."""
    ours, torchs = (m.create_block_mask(masks.causal, 1, 1, 256, 256, device="cpu").as_tuple(
        flatten) for m in (flexattn, theirs))
    assert len(ours) == len(torchs)
    for x, y in zip(ours, torchs, strict=True):
        if x is not None and isinstance(y, torch.Tensor) and y.dim() == 3:
            assert torch.equal(x, y)
        elif not isinstance(y, torch.Tensor):
            assert x == y or x is None and not isinstance(y, (int, tuple))


def inputs(heads=4):
    return [torch.randn(1, heads, 40, 16) for _ in range(3)]


def test_a_torch_block_mask_is_converted_once():
    q, k, v = inputs()
    mask = theirs.create_block_mask(lambda b, h, q, k: q >= k, None, None, 40, 40, device="cpu")
    expected = flex_attention(q, k, v,
                              block_mask=create_block_mask(masks.causal, None, None, 40, 40))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected, rtol=1e-6,
                               atol=1e-6)
    assert flexattn.BlockMask.from_torch(mask) is flexattn.BlockMask.from_torch(mask)


@pytest.mark.parametrize("request_type", [AuxRequest, theirs.AuxRequest])
def test_statistics_by_either_request(request_type):
    q, k, v = inputs()
    out, aux = flex_attention(q, k, v, return_aux=request_type(lse=True, max_scores=True))
    score = (q.double() @ k.double().transpose(-1, -2)) / 4
    assert isinstance(aux, AuxOutput) and out.shape == q.shape
    torch.testing.assert_close(aux.lse.double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.max_scores.double(), score.amax(-1), rtol=1e-5, atol=1e-5)
    _, nothing = flex_attention(q, k, v, return_aux=request_type())
    assert nothing.lse is None and nothing.max_scores is None


def test_return_lse_is_deprecated():
    q, k, v = inputs()
    with pytest.warns(FutureWarning, match="return_aux"):
        out, lse = flex_attention(q, k, v, return_lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    assert torch.equal(out, expected) and torch.equal(lse, aux.lse)
    with pytest.raises(ArgumentError, match="alone"):
        flex_attention(q, k, v, return_lse=True, return_aux=AuxRequest(lse=True))


@pytest.mark.parametrize("options", [
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4}, {"BACKEND": "TRITON"},
    {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True}, {"an unknown key": 1}])
def test_results_do_not_depend_on_kernel_options(options):
    q, k, v = inputs()
    got = flex_attention(q, k, v, kernel_options=options)
    assert torch.equal(got, flex_attention(q, k, v))


def test_a_sliced_mask_gets_its_mask_mod():
    """As written for torch: m = base[:, :, i]; m.mask_mod = ..."""
    q, k, v = (torch.randn(1, 1, 256, 16) for _ in range(3))
    row = create_block_mask(masks.causal, None, None, 256, 256)[:, :, 1]
    row.mask_mod = lambda b, h, q_idx, kv_idx: q_idx + 128 >= kv_idx
    expected = flex_attention(q, k, v, block_mask=create_block_mask(masks.causal, None, None, 256,
                                                                    256))[:, :, 128:]
    torch.testing.assert_close(flex_attention(q[:, :, 128:], k, v, block_mask=row), expected,
                               rtol=1e-5, atol=1e-5)


def test_public_docstrings():
    """Each public function says what it takes, gives and shows."""
    for name in ("flex_attention", "create_block_mask"):
        doc = getattr(flexattn, name).__doc__
        assert all(word in doc for word in ("Args:", "Raises:", "Examples:"))
