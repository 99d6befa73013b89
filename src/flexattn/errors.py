"""Every error a user can meet: what, expected, got, the line in their mod, the remedy."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_SKIPPED_ROOTS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


@dataclass(frozen=True)
class Location:
    """A line of the user's code."""

    file: str
    line: int
    function: str

    @property
    def source(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        text = f'File "{self.file}", line {self.line}, in {self.function}'
        return f"{text}\n    {self.source}" if self.source else text


class FlexAttnError(Exception):
    """Base class of all errors raised by flexattn."""


class TraceError(FlexAttnError, RuntimeError):
    """A mod does something that cannot be traced."""


class UnsupportedOpError(TraceError, NotImplementedError):
    """A mod calls an operation that flexattn does not know."""


class ControlFlowError(TraceError, TypeError):
    """A mod asks for the Python value of a traced scalar (`if`, `int()`, `.item()`, ...)."""


class ShapeError(FlexAttnError, ValueError):
    """Arguments whose shapes do not fit together."""


class DtypeError(FlexAttnError, TypeError):
    """An argument, or the result of a mod, has the wrong dtype."""


class DeviceError(FlexAttnError, ValueError):
    """Tensors are on devices that do not fit together."""


class ArgumentError(FlexAttnError, ValueError):
    """An argument has a value that is not allowed."""


class MaskMismatchError(FlexAttnError, ValueError):
    """A block mask's blocks contradict its mask_mod."""


class IndexOutOfRangeError(FlexAttnError, IndexError):
    """A mod reads a captured tensor outside of its bounds at an attended position."""


class DerivativeError(FlexAttnError, RuntimeError):
    """A derivative that flexattn does not have is asked for."""


def user_location() -> Location | None:
    """The innermost frame that is neither flexattn's nor torch's: the line in the user's mod."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_SKIPPED_ROOTS):
            return Location(file, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def message(what: str, *, expected: str = "", got: str = "", remedy: str = "",
            where: Location | None = None) -> str:
    """The one form every error message has."""
    lines = [what]
    if expected:
        lines.append(f"  expected: {expected}")
    if got:
        lines.append(f"  got:      {got}")
    if remedy:
        lines.append(f"  remedy:   {remedy}")
    if where is not None:
        lines.append(f"  {where}")
    return "\n".join(lines)
