import pytest

from flexattn.errors import ArgumentError
from flexattn.masks import and_masks, band, causal, chunked, noop_mask, or_masks
from tests.masks.oracle import check, dense


def test_composition_is_pointwise(rng):
    chosen = rng.sample([causal, band(3, 2), chunked(5), noop_mask], rng.randint(1, 4))
    tables = [dense(mask, 1, 1, 12, 14)[0, 0].tolist() for mask in chosen]
    check(and_masks(*chosen), lambda b, h, q, kv: all(t[q][kv] for t in tables), 12, 14)
    check(or_masks(*chosen), lambda b, h, q, kv: any(t[q][kv] for t in tables), 12, 14)


def test_neutral_elements():
    check(noop_mask, lambda *_: True, 5, 7)
    check(and_masks(), lambda *_: True, 5, 7)
    check(or_masks(), lambda *_: False, 5, 7)


def test_not_a_function():
    with pytest.raises(ArgumentError, match="not a function"):
        and_masks(causal, True)
