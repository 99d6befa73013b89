import pytest

from flexattn.trace import memo, tracer


@pytest.fixture
def traces(monkeypatch):
    """Every mod that is traced, in an empty memory."""
    traced = []
    for name in ("trace_score_mod", "trace_mask_mod"):
        monkeypatch.setattr(memo, name, lambda fn, *args, name=name: (
            traced.append(fn), getattr(tracer, name)(fn, *args))[1])
    memo._kept.clear()
    return traced
