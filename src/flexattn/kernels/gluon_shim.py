"""Names of Gluon that changed between Triton releases (3.6 and the newest), under one name each.

Everything else of Gluon is imported from Triton by the kernels themselves.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@builtin
def reinterpret(memory: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same bytes of shared memory in another shape."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(memory.dtype, shape, layout, _semantic=_semantic)
