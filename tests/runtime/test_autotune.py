"""The candidate that a timer says is fastest serves, and is found again without timing."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from flexattn import compile, create_block_mask
from flexattn.attention import AuxRequest, _call
from flexattn.runtime import autotune


@dataclass
class Prepared:
    """A candidate whose run says which one it is."""

    tile_q: int
    functions: list = field(default_factory=list)

    @property
    def tile(self) -> dict[str, int]:
        return {"tile_q": self.tile_q}


@pytest.fixture
def tune(tmp_path):
    """Tunes among tiles of which each takes the given time; gives the choice and what was timed."""
    def tuned(times: dict[tuple[str, int], float], facts: tuple = ("forward",)):
        timed = []

        def run(prepared):
            timed.append(prepared.tile_q)

        def seconds(step):
            step()
            return next(t for (_, tile), t in times.items() if tile == timed[-1])

        found = autotune.fastest(facts, lambda: ((name, Prepared(tile)) for name, tile in times),
                                 run, seconds)
        return found and (found[0], found[1].tile_q), timed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path))
        patch.setattr(autotune, "_labels", {})
        compile.cache_directory.cache_clear()
        yield tuned
    compile.cache_directory.cache_clear()


TIMES = {("hopper", 192): 3.0, ("hopper", 128): 1.5, ("triton", 64): 2.0}


def test_the_fastest_is_kept(tune):
    assert tune(TIMES) == (("hopper", 128), [192, 128, 64])
    autotune._labels.clear()  # another process
    assert tune(TIMES) == (("hopper", 128), [])
    slower = TIMES | {("hopper", 128): 9.0}
    assert tune(slower) == (("hopper", 128), []), "not timed again"
    assert tune(slower, ("another",)) == (("triton", 64), [192, 128, 64])


def test_a_tile_that_is_gone_is_not_served(tune):
    tune(TIMES)
    left = {kernel: t for kernel, t in TIMES.items() if kernel != ("hopper", 128)}
    assert tune(left) == (("triton", 64), [192, 64])
    assert tune(left) == (("triton", 64), [])


def test_a_tile_for_which_memory_is_too_small_is_passed_over(tune):
    def seconds(run):
        if not run():
            raise torch.cuda.OutOfMemoryError
        return 1.0

    tiles = [("hopper", Prepared(0)), ("triton", Prepared(64))]
    found = autotune.fastest(("small",), lambda: iter(tiles), lambda found: found.tile_q, seconds)
    assert found == tiles[1]


def test_without_candidates_there_is_no_choice(tune):
    assert tune({}) == (None, [])


def test_without_a_disk_every_process_times(tune, monkeypatch):
    monkeypatch.setattr(autotune, "compile", SimpleNamespace(read=lambda *_: None,
                                                             write=lambda *_: None))
    for _ in range(2):
        autotune._labels.clear()
        assert tune(TIMES) == (("hopper", 128), [192, 128, 64])
        assert tune(TIMES) == (("hopper", 128), []), "once"


def test_only_calls_that_ask_are_tuned():
    query = SimpleNamespace(is_cuda=False)
    assert autotune.asked(SimpleNamespace(options={"autotune": True}, query=query))
    for options in ({}, {"autotune": False}, {"BLOCK_M": 64},
                    {"autotune": True, "deterministic": True}):
        assert not autotune.asked(SimpleNamespace(options=options, query=query))


def test_what_decides_who_is_a_candidate_is_told_apart():
    """Or one call would be given, and then forget, what was found for the other."""
    def facts(q, mask=None, *more):
        call = _call(q, q, q, None, mask, 0.125, AuxRequest(), {"autotune": True})
        return autotune.facts_of(call, ["triton"], *more)

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    q, wide = torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 66)
    masks = [create_block_mask(causal, None, None, 200, 200, max_runs=room) for room in (None, 40)]
    found = [facts(q), facts(wide[..., :64]), facts(q, None, q), facts(q, None, wide[..., :64]),
             facts(q[:, :, :9]), *(facts(q, mask) for mask in masks)]
    assert len(set(map(repr, found))) == len(found)
    assert facts(torch.randn(1, 2, 180, 64)) == facts(q)
