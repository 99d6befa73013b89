"""A user's Python mod -> Graph: proxies record what it does (see tracer.py)."""

from flexattn.ir.mod import Mod
from flexattn.trace.tracer import Trace, definition, specialize, trace_mask_mod, trace_score_mod

__all__ = ["Mod", "Trace", "definition", "specialize", "trace_mask_mod", "trace_score_mod"]
