"""`module:expression` -> the mod it names.

In: "package.module:function", "file.py:function", or an expression of the module's names, such as
"flexattn.masks:and_masks(causal, sliding_window(256))". Out: the mod, and whether it is a mask.
Rejects what cannot be imported or is no mod (ArgumentError).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from flexattn.errors import ArgumentError, FlexAttnError, message

_EXAMPLE = "flexattn.masks:sliding_window(256), or mods.py:my_mod"


@dataclass(frozen=True)
class Target:
    """A mod of the command line."""

    function: Callable
    is_mask: bool


def load(words: str) -> Target:
    """The mod that `words` name."""
    place, colon, expression = words.partition(":")
    if not colon or not expression:
        raise ArgumentError(message("This names no mod.", expected=_EXAMPLE, got=words))
    try:
        function = eval(expression, vars(_module(place)))
    except FlexAttnError:
        raise
    except Exception as error:
        raise ArgumentError(message(f"{words} cannot be loaded.", expected=_EXAMPLE,
                                    got=f"{type(error).__name__}: {error}")) from error
    return Target(function, _arguments(function, words) == 4)


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        sys.path[:0] = [""] if "" not in sys.path else []
        return importlib.import_module(place)
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(function: object, words: str) -> int:
    """4 for a mask_mod, 5 for a score_mod."""
    try:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        count = sum(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)
    except (TypeError, ValueError):
        count = 0
    if count not in (4, 5):
        raise ArgumentError(message(
            f"{words} is no mod.", got=f"{type(function).__name__} of {count} arguments",
            expected="mask_mod(b, h, q_idx, kv_idx) or score_mod(score, b, h, q_idx, kv_idx)",
            remedy="a factory is called: module:factory(arguments)"))
    return count
