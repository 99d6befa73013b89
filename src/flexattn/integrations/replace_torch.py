"""flexattn in place of torch.nn.attention.flex_attention, in code that imports torch's.

In: `replace_torch()`. Out: torch's `flex_attention` and `create_block_mask` run ours, whoever
holds them: the code of torch's function objects is exchanged, so that names imported before, names
imported after, and functions already wrapped in torch.compile are all routed. Block masks made
meanwhile are instances of torch's BlockMask, too. Reversible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from threading import Lock
from types import CodeType, TracebackType
from typing import Any

import torch

from flexattn import attention, block_mask
from flexattn.integrations.torch_block_mask import as_torch

_lock = Lock()
_active: list[Replacement] = []
_originals: dict[str, CodeType] = {}


class Replacement:
    """The routing that one `replace_torch()` asked for; a context manager that ends it."""

    def restore(self) -> None:
        """End it. torch's own functions are back when every replacement has ended."""
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _give_back()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.restore()


def replace_torch() -> Replacement:
    """Route torch.nn.attention.flex_attention's functions to flexattn, from now on.

    Returns: a Replacement: leaving it as a context manager, or calling its `restore()`, gives
        torch's functions back. Kept neither way, it lasts for the process.

    A model that torch.compile has compiled is compiled anew when it is next called.

    Examples:
        >>> import flexattn
        >>> from torch.nn.attention.flex_attention import BlockMask, create_block_mask
        >>> with flexattn.replace_torch():
        ...     mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 256, 256, "cpu")
        >>> isinstance(mask, BlockMask), isinstance(mask, flexattn.BlockMask)
        (True, True)
    """
    made = Replacement()
    with _lock:
        if not _active:
            _take()
        _active.append(made)
    return made


def _take() -> None:
    from torch.nn.attention import flex_attention as module

    for name in _ROUTED:
        theirs = getattr(module, name)
        _originals[name] = theirs.__code__
        theirs.__code__ = _route(name, theirs)


def _give_back() -> None:
    from torch.nn.attention import flex_attention as module

    for name, original in _originals.items():
        getattr(module, name).__code__ = original


def _route(name: str, theirs: Callable) -> CodeType:
    """Code that calls ours. It has the parameters of torch's function, whose defaults stay and
    whose signature Dynamo remembers, and runs with the globals of torch's module."""
    kinds = inspect.signature(theirs).parameters.values()
    plain = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in kinds if p.kind is p.KEYWORD_ONLY]
    assert len(plain) + len(keywords) == len(kinds), name
    parameters = ", ".join([*plain, *(["*"] if keywords else []), *keywords])
    given = ", ".join(f"{p}={p}" for p in (*plain, *keywords))
    text = (f"def {name}({parameters}):\n"
            f"    from flexattn.integrations.replace_torch import {name} as ours\n"
            f"    return ours({given})\n")
    made: dict[str, Any] = {}
    exec(compile(text, __file__, "exec"), made)
    return made[name].__code__


_ROUTED = ("flex_attention", "create_block_mask")


# What torch's functions do meanwhile


def flex_attention(*, return_aux: Any = None, **arguments: Any) -> Any:
    """flexattn.flex_attention, with torch's AuxOutput where auxiliary outputs are asked for."""
    result = attention.flex_attention(return_aux=return_aux, **arguments)
    if return_aux is None:
        return result
    from torch.nn.attention.flex_attention import AuxOutput

    out, aux = result
    return out, AuxOutput(lse=aux.lse, max_scores=aux.max_scores)


def create_block_mask(*, device: Any = None, **arguments: Any) -> block_mask.BlockMask:
    """flexattn.create_block_mask, on torch's default device, as an instance of torch's class."""
    return as_torch(block_mask.create_block_mask(device=_device(device), **arguments))


def _device(device: Any) -> Any:
    if device is not None:
        return device
    found = torch.accelerator.current_accelerator()
    return found if found is not None else "cpu"
