"""Names of Gluon that changed between Triton releases (3.6 and the newest), or that it lacks.

Everything else of Gluon is imported from Triton by the kernels themselves.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def tma_add(desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Adds shared memory to a tensor; done like a store (tma.store_wait)."""
    place = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, place,
                                              src.handle)


@builtin
def reinterpret(memory: Any, shape: Any, layout: Any, dtype: Any = None, _semantic: Any = None
                ) -> Any:
    """The same bytes of shared memory in another shape, or as another type."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(memory.dtype if dtype is None else dtype, shape, layout, _semantic=_semantic)
